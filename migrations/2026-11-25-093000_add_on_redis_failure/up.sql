-- A new column without a default: nothing is rewritten, and the version before, which does not name it, goes on.
ALTER TABLE plans
    ADD COLUMN on_redis_failure text
    CONSTRAINT plans_on_redis_failure_known CHECK (on_redis_failure IN ('share', 'open', 'closed'));
COMMENT ON COLUMN plans.on_redis_failure IS 'What happens to requests while Redis is away; NULL for as the server is set';
