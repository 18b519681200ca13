-- Creates each partition in its own transaction, and limits how many rows without a partition are deleted at a time.
-- Therefore, a table that is busy, or that has many rows to move, does not delay the other tables.

CREATE FUNCTION usage_create_partition(parent text, day date) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    name text := format('%s_%s', parent, to_char(day, 'YYYYMMDD'));
    by_column text := CASE parent WHEN 'usage_log' THEN 'timestamp' ELSE 'start' END;
    lower_bound timestamptz := day::timestamp AT TIME ZONE 'UTC';
    upper_bound timestamptz := (day + 1)::timestamp AT TIME ZONE 'UTC';
BEGIN
    IF parent NOT IN ('usage_log', 'usage_quarters', 'usage_days') THEN
        RAISE EXCEPTION 'not a table of usage: %', parent;
    END IF;
    IF to_regclass(name) IS NOT NULL THEN
        RETURN false;
    END IF;
    PERFORM pg_advisory_xact_lock(7226423);
    IF to_regclass(name) IS NOT NULL THEN
        RETURN false;
    END IF;
    EXECUTE format('CREATE TABLE %I (LIKE %I INCLUDING DEFAULTS INCLUDING CONSTRAINTS) WITH (fillfactor = %s)',
        name, parent, CASE parent WHEN 'usage_log' THEN 100 ELSE 80 END);
    EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', name);
    -- Move the rows that arrived before their partition existed. The lock keeps other transactions from adding more.
    EXECUTE format('LOCK TABLE %I IN ACCESS EXCLUSIVE MODE', parent || '_default');
    EXECUTE format(
        'WITH moved AS (DELETE FROM %I WHERE %I >= %L AND %I < %L RETURNING *) INSERT INTO %I SELECT * FROM moved',
        parent || '_default', by_column, lower_bound, by_column, upper_bound, name);
    EXECUTE format('ALTER TABLE %I ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
        parent, name, lower_bound, upper_bound);
    RETURN true;
END $$;
COMMENT ON FUNCTION usage_create_partition(text, date) IS
    'Creates the partition of a day unless it exists, and moves its rows from the default partition. Returns whether the partition was created';

-- Kept for servers of the previous version.
CREATE OR REPLACE FUNCTION usage_create_partitions(first date, last date) RETURNS integer
    LANGUAGE sql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    SELECT count(*) FILTER (WHERE usage_create_partition(parent, day::date))::integer
    FROM unnest(ARRAY['usage_log', 'usage_quarters', 'usage_days']) AS parent,
        generate_series(first::timestamp, last::timestamp, interval '1 day') AS day
$$;

CREATE FUNCTION usage_delete_unpartitioned(parent text, before date, at_most integer) RETURNS integer
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    deleted integer;
BEGIN
    IF parent NOT IN ('usage_log', 'usage_quarters', 'usage_days') THEN
        RAISE EXCEPTION 'not a table of usage: %', parent;
    END IF;
    EXECUTE format('DELETE FROM %1$I WHERE ctid = ANY (ARRAY(SELECT ctid FROM %1$I WHERE %2$I < $1 LIMIT $2))',
        parent || '_default', CASE parent WHEN 'usage_log' THEN 'timestamp' ELSE 'start' END)
        USING before::timestamp AT TIME ZONE 'UTC', at_most;
    GET DIAGNOSTICS deleted = ROW_COUNT;
    RETURN deleted;
END $$;
COMMENT ON FUNCTION usage_delete_unpartitioned(text, date, integer) IS
    'Deletes at most this many rows of days before that date from the default partition. Returns the number of rows deleted';

CREATE OR REPLACE FUNCTION usage_drop_partitions(parent text, before date) RETURNS integer
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    name text;
BEGIN
    IF parent NOT IN ('usage_log', 'usage_quarters', 'usage_days') THEN
        RAISE EXCEPTION 'not a table of usage: %', parent;
    END IF;
    PERFORM pg_advisory_xact_lock(7226423);
    -- Drop one partition per call, because dropping a partition locks the whole table.
    SELECT c.relname INTO name FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
    WHERE i.inhparent = parent::regclass AND c.relname ~ ('^' || parent || '_\d{8}$')
        AND to_date(right(c.relname, 8), 'YYYYMMDD') < before
    ORDER BY c.relname LIMIT 1;
    IF name IS NULL THEN
        RETURN 0;
    END IF;
    EXECUTE format('DROP TABLE %I', name);
    RETURN 1;
END $$;
COMMENT ON FUNCTION usage_drop_partitions(text, date) IS
    'Drops the oldest partition of days before that date. Returns the number of partitions dropped, at most 1';

REVOKE ALL ON FUNCTION usage_create_partition(text, date), usage_delete_unpartitioned(text, date, integer) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION usage_create_partition(text, date), usage_delete_unpartitioned(text, date, integer)
    TO quota_system;
