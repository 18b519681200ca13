-- Charged usage: its amount, and what has been reported to the Stripe meter.

ALTER TABLE billing_subscriptions
    ADD COLUMN ended_at timestamptz,
    ADD COLUMN is_metered boolean NOT NULL DEFAULT false;
COMMENT ON COLUMN billing_subscriptions.ended_at IS 'When the subscription ended permanently';
COMMENT ON COLUMN billing_subscriptions.is_metered IS 'Whether the subscription has a price per unit of usage';

CREATE TABLE billing_usage (
    tenant_id uuid NOT NULL,
    start timestamptz NOT NULL,
    cost bigint NOT NULL,
    planned bigint NOT NULL DEFAULT 0,
    CONSTRAINT billing_usage_pkey PRIMARY KEY (tenant_id, start),
    CONSTRAINT billing_usage_planned_range CHECK (planned BETWEEN 0 AND cost)
);
CREATE INDEX billing_usage_unplanned_idx ON billing_usage (start) WHERE cost <> planned;
CREATE INDEX billing_usage_start_idx ON billing_usage (start);
COMMENT ON TABLE billing_usage IS 'The cost of admitted requests on plans marked paid, for each hour. Written with usage_log';
COMMENT ON COLUMN billing_usage.planned IS 'How much of the usage is in billing_reports, or needs no report';

CREATE TABLE billing_reports (
    tenant_id uuid NOT NULL,
    start timestamptz NOT NULL,
    revision integer NOT NULL,
    until timestamptz NOT NULL,
    subscription_id text,
    value bigint NOT NULL,
    state text NOT NULL DEFAULT 'pending',
    reason text,
    attempts integer NOT NULL DEFAULT 0,
    first_attempt_at timestamptz,
    due_at timestamptz DEFAULT now(),
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT billing_reports_pkey PRIMARY KEY (tenant_id, start, revision),
    CONSTRAINT billing_reports_value_positive CHECK (value > 0),
    CONSTRAINT billing_reports_range CHECK (start < until),
    CONSTRAINT billing_reports_state_known CHECK (state IN ('pending', 'sent', 'unbilled')),
    CONSTRAINT billing_reports_due_while_pending CHECK ((due_at IS NOT NULL) = (state = 'pending'))
);
CREATE INDEX billing_reports_due_at_idx ON billing_reports (due_at) WHERE due_at IS NOT NULL;
CREATE INDEX billing_reports_created_at_idx ON billing_reports (created_at);
COMMENT ON TABLE billing_reports IS 'Reports to the Stripe meter. Each row is one meter event, identified by its tenant, start and revision';
COMMENT ON COLUMN billing_reports.start IS 'Start of an hour, or of the part of an hour after the end of a billing period';
COMMENT ON COLUMN billing_reports.revision IS '0, or higher for usage that was recorded after earlier revisions. Each revision contains the difference';
COMMENT ON COLUMN billing_reports.subscription_id IS 'The subscription that the usage belongs to; NULL if there was none';
COMMENT ON COLUMN billing_reports.state IS 'sent: Stripe has received it; unbilled: it will not be charged, see `reason`';
COMMENT ON COLUMN billing_reports.first_attempt_at IS 'When the report was first sent. Stripe recognizes its identifier for a day after that';
COMMENT ON COLUMN billing_reports.due_at IS 'When the next attempt to send the report is due';

CREATE TABLE billing_senders (
    tenant_id uuid NOT NULL,
    until timestamptz NOT NULL,
    CONSTRAINT billing_senders_pkey PRIMARY KEY (tenant_id)
);
COMMENT ON TABLE billing_senders IS 'Customers whose usage a replica is reporting. Stripe accepts one meter event at a time for each customer';
COMMENT ON COLUMN billing_senders.until IS 'When another replica may take over';

GRANT SELECT ON billing_usage, billing_reports TO quota_app;
GRANT SELECT, INSERT, UPDATE, DELETE ON billing_usage, billing_reports, billing_senders TO quota_system;

ALTER TABLE billing_usage ENABLE ROW LEVEL SECURITY;
ALTER TABLE billing_usage FORCE ROW LEVEL SECURITY;
CREATE POLICY billing_usage_own ON billing_usage TO quota_app USING (tenant_id = current_tenant());
CREATE POLICY billing_usage_system ON billing_usage TO quota_system USING (true);

ALTER TABLE billing_reports ENABLE ROW LEVEL SECURITY;
ALTER TABLE billing_reports FORCE ROW LEVEL SECURITY;
CREATE POLICY billing_reports_own ON billing_reports TO quota_app USING (tenant_id = current_tenant());
CREATE POLICY billing_reports_system ON billing_reports TO quota_system USING (true);

ALTER TABLE billing_senders ENABLE ROW LEVEL SECURITY;
ALTER TABLE billing_senders FORCE ROW LEVEL SECURITY;
CREATE POLICY billing_senders_system ON billing_senders TO quota_system USING (true);
