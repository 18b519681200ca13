CREATE FUNCTION database_history() RETURNS text
LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN concat_ws('-',
        (SELECT system_identifier FROM pg_control_system()),
        left(pg_walfile_name(pg_current_wal_lsn()), 8),
        pg_relation_filenode('revocations'));
EXCEPTION WHEN OTHERS THEN
    -- Some hosted databases do not have all of these functions.
    RETURN pg_relation_filenode('revocations')::text;
END $$;
COMMENT ON FUNCTION database_history() IS
    'Changes when the database is restored from a backup or fails over: the cluster, its timeline, and the file of the table that numbers changes';
GRANT EXECUTE ON FUNCTION database_history() TO quota_system;
