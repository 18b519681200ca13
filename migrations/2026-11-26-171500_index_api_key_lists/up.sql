-- Indexes for listing and searching a tenant's keys. While the indexes are built, changes to keys wait, for a few
-- seconds per million keys. Decisions continue, because they only read keys.

CREATE INDEX api_keys_name_idx ON api_keys (tenant_id, lower(name) COLLATE "C", id);
CREATE INDEX api_keys_prefix_idx ON api_keys (tenant_id, prefix text_pattern_ops);
COMMENT ON INDEX api_keys_name_idx IS 'Lists keys by name';
COMMENT ON INDEX api_keys_prefix_idx IS 'Finds keys by the beginning of their prefix';

-- Searches find substrings of names. Without the pg_trgm extension, a search reads all keys of the tenant. The
-- extension is part of PostgreSQL, but is not always installed or allowed.
DO $$
DECLARE
    extension_schema text;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'pg_trgm') THEN
        BEGIN
            CREATE EXTENSION pg_trgm;
            COMMENT ON EXTENSION pg_trgm IS 'Created by Quota, for searches by name';
        EXCEPTION WHEN OTHERS THEN
            RAISE NOTICE 'pg_trgm is not available: %', SQLERRM;
            RETURN;
        END;
    END IF;
    SELECT n.nspname INTO extension_schema
    FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'pg_trgm';
    EXECUTE format('CREATE INDEX api_keys_name_trgm_idx ON api_keys USING gin (name %I.gin_trgm_ops)', extension_schema);
    COMMENT ON INDEX api_keys_name_trgm_idx IS 'Finds keys by a part of their name';
END $$;
