-- A new column without a default: no rows are rewritten, and the previous version, which does not use the column, keeps
-- working.
ALTER TABLE audit_events ADD COLUMN target_name text;
COMMENT ON COLUMN audit_events.target_name IS
    'The name of the target after the change; NULL if it has no name, and in events that are older than this column';
