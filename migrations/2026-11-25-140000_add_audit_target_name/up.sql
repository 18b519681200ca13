-- A new column without a default: no rows are rewritten, and the previous version, which does not use the column, keeps
-- working.
ALTER TABLE audit_events ADD COLUMN target_name text;
COMMENT ON COLUMN audit_events.target_name IS
    'What the target was called once the change was made; NULL where it has no name, and in events from before this column';
