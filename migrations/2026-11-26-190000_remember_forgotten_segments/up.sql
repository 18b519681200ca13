-- Cursors of old segments are deleted. If the retention period of the log is extended later, these segments must not be
-- shipped a second time.
CREATE TABLE usage_forgotten_segments (
    is_only_row boolean NOT NULL DEFAULT true,
    started_at timestamptz NOT NULL,
    CONSTRAINT usage_forgotten_segments_pkey PRIMARY KEY (is_only_row),
    CONSTRAINT usage_forgotten_segments_one_row CHECK (is_only_row)
);
COMMENT ON TABLE usage_forgotten_segments IS 'One row: up to when segments may have been shipped without having a cursor now';
COMMENT ON COLUMN usage_forgotten_segments.started_at IS 'When the newest segment was created whose cursor has been deleted';
GRANT SELECT, INSERT, UPDATE ON usage_forgotten_segments TO quota_system;
ALTER TABLE usage_forgotten_segments ENABLE ROW LEVEL SECURITY;
ALTER TABLE usage_forgotten_segments FORCE ROW LEVEL SECURITY;
CREATE POLICY usage_forgotten_segments_system ON usage_forgotten_segments TO quota_system USING (true);
