-- Neither column requires rewriting the table. The previous version, which does not use the columns, keeps inserting
-- keys.
ALTER TABLE api_keys
    ADD COLUMN external_id text,
    ADD COLUMN metadata jsonb NOT NULL DEFAULT '{}';
-- NOT VALID: all existing rows pass, and checking them would read the table under an exclusive lock.
ALTER TABLE api_keys
    ADD CONSTRAINT api_keys_external_id_length CHECK (char_length(external_id) BETWEEN 1 AND 200) NOT VALID,
    ADD CONSTRAINT api_keys_metadata_object CHECK (jsonb_typeof(metadata) = 'object') NOT VALID;
-- The index is partial and contains no existing rows, so building it is quick.
CREATE INDEX api_keys_external_id_idx ON api_keys (tenant_id, external_id text_pattern_ops)
    WHERE external_id IS NOT NULL;
COMMENT ON COLUMN api_keys.external_id IS 'The key''s identifier in the tenant''s own system. Not unique';
COMMENT ON COLUMN api_keys.metadata IS 'Name-value pairs of the tenant, which are stored but not interpreted';
COMMENT ON INDEX api_keys_external_id_idx IS 'Finds keys by external ID or its prefix';
