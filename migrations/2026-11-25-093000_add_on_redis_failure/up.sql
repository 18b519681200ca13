-- A new column without a default: no rows are rewritten, and the previous version, which does not use the column, keeps
-- working.
ALTER TABLE plans
    ADD COLUMN on_redis_failure text
    CONSTRAINT plans_on_redis_failure_known CHECK (on_redis_failure IN ('share', 'open', 'closed'));
COMMENT ON COLUMN plans.on_redis_failure IS 'Behavior while Redis is unreachable; NULL for the server default';
