-- Prices of subscriptions, quotas of tenants, and problems that Stripe reports about usage.

ALTER TABLE billing_subscriptions
    ADD COLUMN product_name text,
    ADD COLUMN currency text,
    ADD COLUMN monthly_price text,
    ADD COLUMN usage_price text;
COMMENT ON COLUMN billing_subscriptions.product_name IS 'The name of the product that the subscription pays for';
COMMENT ON COLUMN billing_subscriptions.currency IS 'The ISO 4217 code of the subscription''s currency, in lower case';
COMMENT ON COLUMN billing_subscriptions.monthly_price IS 'The price per month: a decimal number in the smallest unit of the currency. NULL if the price is not a plain amount';
COMMENT ON COLUMN billing_subscriptions.usage_price IS 'The price per unit of usage, in the same unit. NULL if usage is not charged by a plain amount';

ALTER TABLE billing_usage ADD COLUMN divided_at timestamptz;
COMMENT ON COLUMN billing_usage.divided_at IS 'The end of a billing period within the hour, up to which usage was planned before the hour ended';

ALTER TABLE billing_senders ADD COLUMN owner uuid;
COMMENT ON COLUMN billing_senders.owner IS 'Identifies the claim, so that a replica that was too slow does not release or extend another replica''s claim';

CREATE TABLE billing_meter_errors (
    event_id text NOT NULL,
    tenant_id uuid NOT NULL,
    code text NOT NULL,
    received_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT billing_meter_errors_pkey PRIMARY KEY (event_id, tenant_id, code)
);
CREATE INDEX billing_meter_errors_tenant_id_idx ON billing_meter_errors (tenant_id, received_at);
CREATE INDEX billing_meter_errors_received_at_idx ON billing_meter_errors (received_at);
COMMENT ON TABLE billing_meter_errors IS 'Problems that Stripe found in reported usage after accepting the report';
COMMENT ON COLUMN billing_meter_errors.event_id IS 'Stripe''s event, which is also in billing_events';
COMMENT ON COLUMN billing_meter_errors.code IS 'The code of the problem in Stripe';

CREATE TABLE tenant_quota_usage (
    tenant_id uuid NOT NULL,
    window_start timestamptz NOT NULL,
    used bigint NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT tenant_quota_usage_pkey PRIMARY KEY (tenant_id, window_start),
    CONSTRAINT tenant_quota_usage_tenant_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE,
    CONSTRAINT tenant_quota_usage_used_positive CHECK (used >= 0)
);
CREATE INDEX tenant_quota_usage_window_start_idx ON tenant_quota_usage (window_start);
COMMENT ON TABLE tenant_quota_usage IS 'How much of a tenant''s monthly quota replicas have taken in blocks, whether spent or not';
COMMENT ON COLUMN tenant_quota_usage.window_start IS 'The start of the calendar month in UTC';

GRANT SELECT ON billing_meter_errors, tenant_quota_usage TO quota_app;
GRANT SELECT, INSERT, UPDATE, DELETE ON billing_meter_errors, tenant_quota_usage TO quota_system;

ALTER TABLE billing_meter_errors ENABLE ROW LEVEL SECURITY;
ALTER TABLE billing_meter_errors FORCE ROW LEVEL SECURITY;
CREATE POLICY billing_meter_errors_own ON billing_meter_errors TO quota_app USING (tenant_id = current_tenant());
CREATE POLICY billing_meter_errors_system ON billing_meter_errors TO quota_system USING (true);

ALTER TABLE tenant_quota_usage ENABLE ROW LEVEL SECURITY;
ALTER TABLE tenant_quota_usage FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant_quota_usage_own ON tenant_quota_usage TO quota_app USING (tenant_id = current_tenant());
CREATE POLICY tenant_quota_usage_system ON tenant_quota_usage TO quota_system USING (true);
