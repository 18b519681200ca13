-- For finding expired rows in batches, oldest first. Both indexes are partial and contain few rows, so building them is
-- quick and blocks writes by the previous version only briefly.
CREATE INDEX sessions_revoked_at_idx ON sessions (revoked_at) WHERE revoked_at IS NOT NULL;
CREATE INDEX api_keys_previous_expires_at_idx ON api_keys (previous_expires_at)
    WHERE previous_expires_at IS NOT NULL;
COMMENT ON INDEX sessions_revoked_at_idx IS 'Finds revoked sessions to delete';
COMMENT ON INDEX api_keys_previous_expires_at_idx IS 'Finds previous secrets whose grace period has ended';
