-- The previous version inserts endpoints without it and never updates it: endpoints added by that version expire after
-- one retention period.
ALTER TABLE usage_endpoints ADD COLUMN seen_on date NOT NULL DEFAULT CURRENT_DATE;
COMMENT ON COLUMN usage_endpoints.seen_on IS
    'The day of its last request. After the retention of the rollups it makes room for another endpoint';
CREATE INDEX usage_endpoints_seen_on_idx ON usage_endpoints (seen_on);
