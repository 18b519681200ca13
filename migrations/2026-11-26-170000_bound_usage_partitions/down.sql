CREATE OR REPLACE FUNCTION usage_create_partitions(first date, last date) RETURNS integer
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    parent text;
    name text;
    day date;
    lower_bound timestamptz;
    upper_bound timestamptz;
    by_column text;
    created integer := 0;
BEGIN
    PERFORM pg_advisory_xact_lock(7226423);
    FOREACH parent IN ARRAY ARRAY['usage_log', 'usage_quarters', 'usage_days'] LOOP
        by_column := CASE parent WHEN 'usage_log' THEN 'timestamp' ELSE 'start' END;
        FOR day IN SELECT generate_series(first::timestamp, last::timestamp, interval '1 day')::date LOOP
            name := format('%s_%s', parent, to_char(day, 'YYYYMMDD'));
            CONTINUE WHEN to_regclass(name) IS NOT NULL;
            lower_bound := day::timestamp AT TIME ZONE 'UTC';
            upper_bound := (day + 1)::timestamp AT TIME ZONE 'UTC';
            EXECUTE format('CREATE TABLE %I (LIKE %I INCLUDING DEFAULTS INCLUDING CONSTRAINTS) WITH (fillfactor = %s)',
                name, parent, CASE parent WHEN 'usage_log' THEN 100 ELSE 80 END);
            EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', name);
            -- Move the rows that arrived before their partition existed. The lock keeps other transactions from adding
            -- more.
            EXECUTE format('LOCK TABLE %I IN ACCESS EXCLUSIVE MODE', parent || '_default');
            EXECUTE format(
                'WITH moved AS (DELETE FROM %I WHERE %I >= %L AND %I < %L RETURNING *) INSERT INTO %I SELECT * FROM moved',
                parent || '_default', by_column, lower_bound, by_column, upper_bound, name);
            EXECUTE format('ALTER TABLE %I ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                parent, name, lower_bound, upper_bound);
            created := created + 1;
        END LOOP;
    END LOOP;
    RETURN created;
END $$;
COMMENT ON FUNCTION usage_create_partitions(date, date) IS
    'Creates the missing partitions of the days from first to last, and moves their rows from the default partition. Returns the number of partitions created';

CREATE OR REPLACE FUNCTION usage_drop_partitions(parent text, before date) RETURNS integer
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    name text;
    dropped integer := 0;
BEGIN
    IF parent NOT IN ('usage_log', 'usage_quarters', 'usage_days') THEN
        RAISE EXCEPTION 'not a table of usage: %', parent;
    END IF;
    PERFORM pg_advisory_xact_lock(7226423);
    -- Drop one partition per call, because dropping a partition locks the whole table.
    FOR name IN
        SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent = parent::regclass AND c.relname ~ ('^' || parent || '_\d{8}$')
            AND to_date(right(c.relname, 8), 'YYYYMMDD') < before
        ORDER BY c.relname LIMIT 1
    LOOP
        EXECUTE format('DROP TABLE %I', name);
        dropped := dropped + 1;
    END LOOP;
    EXECUTE format('DELETE FROM %I WHERE %I < %L', parent || '_default',
        CASE parent WHEN 'usage_log' THEN 'timestamp' ELSE 'start' END, before::timestamp AT TIME ZONE 'UTC');
    RETURN dropped;
END $$;
COMMENT ON FUNCTION usage_drop_partitions(text, date) IS
    'Drops the oldest partition of days before that date, and deletes rows of those days from the default partition. Returns the number of partitions dropped, at most 1';

DROP FUNCTION usage_create_partition(text, date);
DROP FUNCTION usage_delete_unpartitioned(text, date, integer);
