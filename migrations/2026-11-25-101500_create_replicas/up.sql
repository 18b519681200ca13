-- Each replica updates its row while it runs. While Redis is unreachable, a replica may enforce its share of the
-- limits. The share depends on the number of replicas in this table.
CREATE TABLE replicas (
    id uuid NOT NULL,
    joined_at timestamptz NOT NULL DEFAULT now(),
    seen_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT replicas_pkey PRIMARY KEY (id)
);
COMMENT ON TABLE replicas IS 'Running servers; a row that is no longer updated belongs to a server that has stopped';

-- Whether counters have ever been stored in Redis. If not, an empty Redis is new; otherwise it has lost its state.
CREATE TABLE shared_counters (
    single boolean NOT NULL DEFAULT true,
    begun_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT shared_counters_pkey PRIMARY KEY (single),
    CONSTRAINT shared_counters_only CHECK (single)
);
COMMENT ON TABLE shared_counters IS 'Has one row once counters have been stored in Redis';

GRANT SELECT, INSERT, UPDATE, DELETE ON replicas TO quota_system;
GRANT SELECT, INSERT ON shared_counters TO quota_system;

DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['replicas', 'shared_counters'] LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', name);
        EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', name);
        EXECUTE format('CREATE POLICY %I ON %I TO quota_system USING (true)', name || '_system', name);
    END LOOP;
END $$;
