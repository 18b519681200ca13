ALTER TABLE plans DROP COLUMN on_redis_failure;
