-- The previous version inserts endpoints without this column and never updates it, so endpoints added by that version
-- expire after one retention period.
ALTER TABLE usage_endpoints ADD COLUMN seen_on date NOT NULL DEFAULT CURRENT_DATE;
COMMENT ON COLUMN usage_endpoints.seen_on IS
    'The day of the endpoint''s last request. The endpoint is removed after the retention period of the rollups';
CREATE INDEX usage_endpoints_seen_on_idx ON usage_endpoints (seen_on);
