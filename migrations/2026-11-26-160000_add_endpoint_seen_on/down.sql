DROP INDEX usage_endpoints_seen_on_idx;
ALTER TABLE usage_endpoints DROP COLUMN seen_on;
