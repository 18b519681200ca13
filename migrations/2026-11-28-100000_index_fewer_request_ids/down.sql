CREATE INDEX usage_log_request_id_idx ON usage_log (tenant_id, request_id, seq);
DROP INDEX usage_log_other_request_id_idx, usage_log_timestamp_idx;
ALTER TABLE usage_log DROP COLUMN request_id_has_time;
