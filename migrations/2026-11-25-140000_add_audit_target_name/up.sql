-- A new column without a default: nothing is rewritten, and the version before, which does not name it, goes on.
ALTER TABLE audit_events ADD COLUMN target_name text;
COMMENT ON COLUMN audit_events.target_name IS
    'What the target was called once the change was made; NULL where it has no name, and in events from before this column';
