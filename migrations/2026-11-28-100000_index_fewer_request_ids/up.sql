-- Most request IDs are UUIDs of version 7 that were generated when the request arrived. Their rows are found by time,
-- so only other request IDs need an index with an entry per row.
--
-- While the new index is built, for a second or two per million rows, usage is not shipped, and decisions cannot be
-- listed. Requests are still decided, and their usage is shipped afterward. Servers of the previous version read the
-- whole log to find a request ID.

ALTER TABLE usage_log ADD COLUMN request_id_has_time boolean NOT NULL DEFAULT false;
COMMENT ON COLUMN usage_log.request_id_has_time IS
    'Whether the request ID is a UUID of version 7 whose time differs from the timestamp by at most a second. False for rows of previous versions';

-- A range of pages can contain rows of several times, for example of a backlog and of current requests.
CREATE INDEX usage_log_timestamp_idx ON usage_log USING brin ("timestamp" timestamptz_minmax_multi_ops)
    WITH (autosummarize = on);
CREATE INDEX usage_log_other_request_id_idx ON usage_log (tenant_id, request_id, seq) WHERE NOT request_id_has_time;
DROP INDEX usage_log_request_id_idx;
COMMENT ON INDEX usage_log_timestamp_idx IS 'Finds rows whose request ID has a time';
COMMENT ON INDEX usage_log_other_request_id_idx IS 'Finds rows with other request IDs';
