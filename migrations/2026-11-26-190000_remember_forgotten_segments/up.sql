-- Cursors of old segments are deleted. If the retention period of the log is extended later, these segments must not be
-- shipped a second time.
CREATE TABLE usage_forgotten_segments (
    is_only_row boolean NOT NULL DEFAULT true,
    started_at timestamptz NOT NULL,
    CONSTRAINT usage_forgotten_segments_pkey PRIMARY KEY (is_only_row),
    CONSTRAINT usage_forgotten_segments_one_row CHECK (is_only_row)
);
COMMENT ON TABLE usage_forgotten_segments IS 'One row. Segments created up to started_at may have been shipped although they no longer have a cursor';
COMMENT ON COLUMN usage_forgotten_segments.started_at IS 'Creation time of the newest segment whose cursor has been deleted';
GRANT SELECT, INSERT, UPDATE ON usage_forgotten_segments TO quota_system;
ALTER TABLE usage_forgotten_segments ENABLE ROW LEVEL SECURITY;
ALTER TABLE usage_forgotten_segments FORCE ROW LEVEL SECURITY;
CREATE POLICY usage_forgotten_segments_system ON usage_forgotten_segments TO quota_system USING (true);
