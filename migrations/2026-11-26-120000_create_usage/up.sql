-- Usage: the log of decisions, its rollups, and how far each replica's segments have been shipped.
--
-- The primary key of every table with tenants' rows starts with tenant_id, so these tables can be distributed by
-- tenant. They have no foreign keys: usage outlives its API keys, and a late batch must not fail because an API key was
-- deleted.

-- The log ----------------------------------------------------------------------------------------------

CREATE TABLE usage_log (
    tenant_id uuid NOT NULL,
    seq bigint NOT NULL,
    "timestamp" timestamptz NOT NULL,
    event_id uuid NOT NULL,
    key_id uuid NOT NULL,
    plan_id uuid NOT NULL,
    cost bigint NOT NULL,
    retry_after_seconds integer,
    was_rejected boolean NOT NULL,
    billing text NOT NULL,
    policy text,
    endpoint text COLLATE "C" NOT NULL,
    request_id text COLLATE "C" NOT NULL,
    CONSTRAINT usage_log_pkey PRIMARY KEY (tenant_id, seq, "timestamp"),
    CONSTRAINT usage_log_cost_positive CHECK (cost >= 1),
    CONSTRAINT usage_log_billing_known CHECK (billing IN ('free', 'paid')),
    CONSTRAINT usage_log_policy_of_rejection CHECK (was_rejected OR (policy IS NULL AND retry_after_seconds IS NULL))
) PARTITION BY RANGE ("timestamp");
CREATE INDEX usage_log_key_id_idx ON usage_log (tenant_id, key_id, seq);
CREATE INDEX usage_log_request_id_idx ON usage_log (tenant_id, request_id, seq);
COMMENT ON TABLE usage_log IS 'One row for each decision on a known key. Partitioned by day in UTC';
COMMENT ON COLUMN usage_log.seq IS
    'Position in the tenant''s log. Positions have no gaps, and rows become visible in their order. See usage_tenants';
COMMENT ON COLUMN usage_log."timestamp" IS 'When the request was decided, according to PostgreSQL''s clock';
COMMENT ON COLUMN usage_log.event_id IS 'The record''s ID, which is the same no matter how often the record is sent';
COMMENT ON COLUMN usage_log.plan_id IS 'The key''s plan at that time';
COMMENT ON COLUMN usage_log.billing IS 'The plan''s billing at that time';
COMMENT ON COLUMN usage_log.cost IS 'The cost of the request, which is taken only if the request is admitted';
COMMENT ON COLUMN usage_log.policy IS 'The policy that denied the request; NULL if the request was admitted, or was denied while capacity was reduced';
COMMENT ON COLUMN usage_log.endpoint IS 'As sent by the caller; empty if none was sent';

CREATE TABLE usage_log_default PARTITION OF usage_log DEFAULT;
COMMENT ON TABLE usage_log_default IS 'Rows of days that have no partition';

CREATE TABLE usage_tenants (
    tenant_id uuid NOT NULL,
    last_seq bigint NOT NULL,
    CONSTRAINT usage_tenants_pkey PRIMARY KEY (tenant_id)
);
COMMENT ON TABLE usage_tenants IS 'The last position in each tenant''s log';
COMMENT ON COLUMN usage_tenants.last_seq IS
    'The last number in usage_log.seq. Its row is locked until the rows with the new numbers are committed, so a reader who has read up to a number has missed none before it';

-- Rollups ----------------------------------------------------------------------------------------------
--
-- Each row counts the requests with one key or all keys, to one endpoint or all endpoints, and on one plan or all
-- plans. Therefore, several rows with the same start count the same request. The zero UUID stands for all keys or all
-- plans. E'\x01' stands for all endpoints. E'\x02' stands for the endpoints that are not counted separately, because
-- there are too many. Names of endpoints do not contain these characters. Rows of a single key always belong to a
-- single plan. The endpoint comes before the key in the primary key, so that the rows of all keys for one endpoint are
-- next to each other. usage_endpoints lists the endpoints of each key.

CREATE TABLE usage_quarters (
    tenant_id uuid NOT NULL,
    key_id uuid NOT NULL,
    endpoint text COLLATE "C" NOT NULL,
    plan_id uuid NOT NULL,
    start timestamptz NOT NULL,
    policy text COLLATE "C" NOT NULL,
    requests bigint NOT NULL,
    cost bigint NOT NULL,
    CONSTRAINT usage_quarters_pkey PRIMARY KEY (tenant_id, endpoint, key_id, plan_id, start, policy)
) PARTITION BY RANGE (start);
COMMENT ON TABLE usage_quarters IS 'Requests per 15 minutes. Partitioned by day in UTC';
COMMENT ON COLUMN usage_quarters.policy IS
    'The policy that denied the requests; empty for admitted requests, and reduced_capacity for those that no policy denied';

CREATE TABLE usage_quarters_default PARTITION OF usage_quarters DEFAULT;
COMMENT ON TABLE usage_quarters_default IS 'Rows of days that have no partition';

CREATE TABLE usage_days (
    tenant_id uuid NOT NULL,
    key_id uuid NOT NULL,
    endpoint text COLLATE "C" NOT NULL,
    plan_id uuid NOT NULL,
    start timestamptz NOT NULL,
    policy text COLLATE "C" NOT NULL,
    requests bigint NOT NULL,
    cost bigint NOT NULL,
    last_at timestamptz NOT NULL,
    CONSTRAINT usage_days_pkey PRIMARY KEY (tenant_id, endpoint, key_id, plan_id, start, policy)
) PARTITION BY RANGE (start);
COMMENT ON TABLE usage_days IS
    'The same as usage_quarters, for each day in UTC. Used to rank keys and endpoints over long ranges. Partitioned by day';
COMMENT ON COLUMN usage_days.last_at IS 'Time of the latest request';

CREATE TABLE usage_days_default PARTITION OF usage_days DEFAULT;
COMMENT ON TABLE usage_days_default IS 'Rows of days that have no partition';

CREATE TABLE usage_endpoints (
    tenant_id uuid NOT NULL,
    key_id uuid NOT NULL,
    endpoint text COLLATE "C" NOT NULL,
    CONSTRAINT usage_endpoints_pkey PRIMARY KEY (tenant_id, key_id, endpoint)
);
COMMENT ON TABLE usage_endpoints IS
    'Endpoints that have their own rollups, for each key or, with the zero UUID, for the tenant. Endpoints above the limit count as E''\x02''';

-- Shipping ---------------------------------------------------------------------------------------------

CREATE TABLE usage_segments (
    segment_id uuid NOT NULL,
    "position" bigint NOT NULL,
    started_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT usage_segments_pkey PRIMARY KEY (segment_id),
    CONSTRAINT usage_segments_position_range CHECK ("position" >= 0)
);
CREATE INDEX usage_segments_started_at_idx ON usage_segments (started_at);
COMMENT ON TABLE usage_segments IS 'The position up to which each segment has been shipped, updated in the transaction that inserts its records';
COMMENT ON COLUMN usage_segments."position" IS 'All records before this position are in usage_log';
COMMENT ON COLUMN usage_segments.started_at IS 'When the segment was created';

CREATE TABLE usage_shippers (
    directory_id uuid NOT NULL,
    host text NOT NULL,
    reported_at timestamptz NOT NULL DEFAULT now(),
    pending_records bigint NOT NULL,
    pending_bytes bigint NOT NULL,
    oldest_pending_at timestamptz,
    CONSTRAINT usage_shippers_pkey PRIMARY KEY (directory_id),
    CONSTRAINT usage_shippers_pending_range CHECK (pending_records >= 0 AND pending_bytes >= 0)
);
COMMENT ON TABLE usage_shippers IS
    'What the owner of each usage directory has not shipped yet, as reported by that owner. A row that is no longer updated belongs to a replica that exited without shipping everything';

-- Partitions -------------------------------------------------------------------------------------------

CREATE FUNCTION usage_create_partitions(first date, last date) RETURNS integer
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

CREATE FUNCTION usage_drop_partitions(parent text, before date) RETURNS integer
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

-- Rights -----------------------------------------------------------------------------------------------

REVOKE ALL ON FUNCTION usage_create_partitions(date, date), usage_drop_partitions(text, date) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION usage_create_partitions(date, date), usage_drop_partitions(text, date) TO quota_system;
GRANT SELECT ON usage_log, usage_tenants, usage_quarters, usage_days, usage_endpoints TO quota_app;
GRANT SELECT ON quota_usage TO quota_app;
GRANT SELECT, INSERT, UPDATE, DELETE ON
    usage_log, usage_tenants, usage_quarters, usage_days, usage_endpoints, usage_segments, usage_shippers
    TO quota_system;

-- Partitions have no policies: they are accessed only through their parent.
ALTER TABLE usage_log_default ENABLE ROW LEVEL SECURITY;
ALTER TABLE usage_quarters_default ENABLE ROW LEVEL SECURITY;
ALTER TABLE usage_days_default ENABLE ROW LEVEL SECURITY;
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['usage_log', 'usage_tenants', 'usage_quarters', 'usage_days', 'usage_endpoints'] LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', name);
        EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', name);
        EXECUTE format(
            'CREATE POLICY %I ON %I TO quota_app USING (tenant_id = current_tenant())', name || '_own', name);
        EXECUTE format('CREATE POLICY %I ON %I TO quota_system USING (true)', name || '_system', name);
    END LOOP;
    FOREACH name IN ARRAY ARRAY['usage_segments', 'usage_shippers'] LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', name);
        EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', name);
        EXECUTE format('CREATE POLICY %I ON %I TO quota_system USING (true)', name || '_system', name);
    END LOOP;
END $$;
CREATE POLICY quota_usage_own ON quota_usage TO quota_app USING (tenant_id = current_tenant());
