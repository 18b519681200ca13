DROP INDEX IF EXISTS api_keys_name_trgm_idx;
DROP INDEX api_keys_name_idx, api_keys_prefix_idx;
DO $$
BEGIN
    IF EXISTS (
        SELECT FROM pg_extension
        WHERE extname = 'pg_trgm' AND obj_description(oid, 'pg_extension') LIKE 'Created by Quota%'
    ) THEN
        DROP EXTENSION pg_trgm;
    END IF;
EXCEPTION WHEN dependent_objects_still_exist OR insufficient_privilege THEN
    -- Something else now uses the extension, or this role is not allowed to drop the extension.
    NULL;
END $$;
