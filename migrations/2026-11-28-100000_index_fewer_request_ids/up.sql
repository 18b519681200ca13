-- Most request IDs are UUIDs of version 7 that were generated when the request arrived. Their rows are found by time,
-- so only other request IDs need an index with an entry per row. While the new index is built, usage is not shipped,
-- for up to about a second per million rows. Decisions continue, and their usage is shipped afterward.

ALTER TABLE usage_log ADD COLUMN request_id_has_time boolean NOT NULL DEFAULT false;
COMMENT ON COLUMN usage_log.request_id_has_time IS
    'Whether the request ID is a UUID of version 7 whose time differs from the timestamp by at most a second. False for rows of previous versions';

CREATE INDEX usage_log_timestamp_idx ON usage_log USING brin ("timestamp")
    WITH (pages_per_range = 32, autosummarize = on);
CREATE INDEX usage_log_other_request_id_idx ON usage_log (tenant_id, request_id, seq) WHERE NOT request_id_has_time;
DROP INDEX usage_log_request_id_idx;
COMMENT ON INDEX usage_log_timestamp_idx IS 'Finds rows whose request ID has a time';
COMMENT ON INDEX usage_log_other_request_id_idx IS 'Finds rows with other request IDs';
