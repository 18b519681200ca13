-- Each row has its own window, so that replicas that briefly disagree about the tenant's time zone still count in the
-- same window. The previous version inserts rows without these columns. This version fills them in later.
ALTER TABLE quota_usage
    ADD COLUMN window_end timestamptz,
    ADD COLUMN period_seconds bigint;
-- NOT VALID: the columns are NULL in every existing row, and checking the rows would read the table under an exclusive
-- lock.
ALTER TABLE quota_usage
    ADD CONSTRAINT quota_usage_window_order CHECK (window_end > window_start) NOT VALID,
    ADD CONSTRAINT quota_usage_period_positive CHECK (period_seconds > 0) NOT VALID,
    ADD CONSTRAINT quota_usage_window_complete
        CHECK ((window_end IS NULL) = (period_seconds IS NULL)) NOT VALID;
COMMENT ON COLUMN quota_usage.window_end IS
    'End of the window, exclusive; NULL in rows of earlier versions, whose window is the calendar day or month';
COMMENT ON COLUMN quota_usage.period_seconds IS
    'Length of the calendar day or month that the window belongs to. A window that was shortened by a time zone change is shorter than that, and its quota is reduced in proportion';

CREATE TABLE quota_returns (
    id uuid NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT quota_returns_pkey PRIMARY KEY (id)
);
CREATE INDEX quota_returns_applied_at_idx ON quota_returns (applied_at);
COMMENT ON TABLE quota_returns IS
    'Batches of unused tokens that were credited to quota_usage, so that a retried batch is credited once. Kept for as long as the windows';

GRANT SELECT, INSERT, UPDATE, DELETE ON quota_returns TO quota_system;
ALTER TABLE quota_returns ENABLE ROW LEVEL SECURITY;
ALTER TABLE quota_returns FORCE ROW LEVEL SECURITY;
CREATE POLICY quota_returns_system ON quota_returns TO quota_system USING (true);
