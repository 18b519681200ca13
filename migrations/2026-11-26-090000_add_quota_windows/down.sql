DROP TABLE quota_returns;
ALTER TABLE quota_usage
    DROP COLUMN window_end,
    DROP COLUMN period_seconds;
