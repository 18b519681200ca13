-- Billing through Stripe. Only the server itself writes to these tables, as quota_system: a tenant's transaction can
-- read the tenant's rows, but cannot give the tenant access to paid plans.

CREATE TABLE billing_accounts (
    tenant_id uuid NOT NULL,
    customer_id text,
    customer_email text NOT NULL,
    customer_name text NOT NULL,
    customer_attempt integer NOT NULL DEFAULT 0,
    customer_requested boolean NOT NULL DEFAULT false,
    access text NOT NULL DEFAULT 'free',
    has_paid_access boolean NOT NULL DEFAULT false,
    paid_access_until timestamptz,
    subscription_id text,
    reads_begun bigint NOT NULL DEFAULT 0,
    read_applied bigint NOT NULL DEFAULT 0,
    read_at timestamptz,
    read_due_at timestamptz NOT NULL DEFAULT now() + interval '10 minutes',
    checkout_attempt integer NOT NULL DEFAULT 0,
    checkout_id text,
    CONSTRAINT billing_accounts_pkey PRIMARY KEY (tenant_id),
    CONSTRAINT billing_accounts_customer_id_key UNIQUE (customer_id),
    CONSTRAINT billing_accounts_tenant_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE,
    CONSTRAINT billing_accounts_access_known CHECK (
        access IN ('free', 'trialing', 'active', 'past_due', 'unpaid', 'canceled', 'paused')
    ),
    CONSTRAINT billing_accounts_paid_access CHECK (
        has_paid_access = (access IN ('trialing', 'active', 'past_due'))
        AND (has_paid_access OR paid_access_until IS NULL)
    ),
    CONSTRAINT billing_accounts_reads_in_order CHECK (read_applied <= reads_begun)
);
CREATE INDEX billing_accounts_read_due_at_idx ON billing_accounts (read_due_at);
COMMENT ON TABLE billing_accounts IS 'Tenants that have started a subscription, with their Stripe customer and their access';
COMMENT ON COLUMN billing_accounts.customer_id IS 'The Stripe customer; NULL until it has been created';
COMMENT ON COLUMN billing_accounts.customer_email IS 'The email address that the customer was created with, so that a retry sends the same address';
COMMENT ON COLUMN billing_accounts.customer_name IS 'The name that the customer was created with';
COMMENT ON COLUMN billing_accounts.customer_attempt IS 'Part of the idempotency key for creating the customer. Increases after a permanent failure';
COMMENT ON COLUMN billing_accounts.customer_requested IS 'Whether the server has tried to create the customer, which may therefore exist in Stripe';
COMMENT ON COLUMN billing_accounts.access IS 'The access that the subscriptions provide, as of the last read';
COMMENT ON COLUMN billing_accounts.has_paid_access IS 'Whether keys on plans marked paid work, until paid_access_until';
COMMENT ON COLUMN billing_accounts.paid_access_until IS 'When paid access ends if nothing changes; NULL for never';
COMMENT ON COLUMN billing_accounts.subscription_id IS 'The subscription that access comes from';
COMMENT ON COLUMN billing_accounts.reads_begun IS 'The number of reads of the subscriptions that have started. A read gets its number before Stripe is called';
COMMENT ON COLUMN billing_accounts.read_applied IS 'The number of the read that was applied last. Earlier reads are discarded';
COMMENT ON COLUMN billing_accounts.read_at IS 'When that read started';
COMMENT ON COLUMN billing_accounts.read_due_at IS 'When the subscriptions are next read without an event';
COMMENT ON COLUMN billing_accounts.checkout_attempt IS 'Part of the idempotency key for creating a Checkout Session';
COMMENT ON COLUMN billing_accounts.checkout_id IS 'The last Checkout Session';

CREATE TABLE billing_subscriptions (
    tenant_id uuid NOT NULL,
    id text NOT NULL,
    status text NOT NULL,
    started_at timestamptz NOT NULL,
    trial_ends_at timestamptz,
    cancels_at timestamptz,
    unpaid_since timestamptz,
    period_start timestamptz,
    period_end timestamptz,
    CONSTRAINT billing_subscriptions_pkey PRIMARY KEY (tenant_id, id),
    CONSTRAINT billing_subscriptions_id_key UNIQUE (id),
    CONSTRAINT billing_subscriptions_account_fkey FOREIGN KEY (tenant_id)
        REFERENCES billing_accounts (tenant_id) ON DELETE CASCADE
);
COMMENT ON TABLE billing_subscriptions IS 'Stripe subscriptions, as of the last read that was applied';
COMMENT ON COLUMN billing_subscriptions.status IS 'The name of the status in Stripe';
COMMENT ON COLUMN billing_subscriptions.cancels_at IS 'When the subscription is scheduled to be canceled, or was canceled';
COMMENT ON COLUMN billing_subscriptions.unpaid_since IS 'When the oldest unpaid invoice was finalized, while the subscription is past due';
COMMENT ON COLUMN billing_subscriptions.period_start IS 'Start of the current billing period';
COMMENT ON COLUMN billing_subscriptions.period_end IS 'End of the current billing period';

CREATE TABLE billing_events (
    id text NOT NULL,
    kind text NOT NULL,
    object_id text,
    customer_id text,
    api_version text,
    livemode boolean NOT NULL,
    body text NOT NULL,
    received_at timestamptz NOT NULL DEFAULT now(),
    attempts integer NOT NULL DEFAULT 0,
    due_at timestamptz DEFAULT now(),
    outcome text,
    error text,
    CONSTRAINT billing_events_pkey PRIMARY KEY (id),
    CONSTRAINT billing_events_outcome_known CHECK (outcome IN ('applied', 'ignored', 'failed')),
    CONSTRAINT billing_events_due_until_handled CHECK ((due_at IS NULL) = (outcome IS NOT NULL))
);
CREATE INDEX billing_events_due_at_idx ON billing_events (due_at) WHERE due_at IS NOT NULL;
CREATE INDEX billing_events_received_at_idx ON billing_events (received_at);
COMMENT ON TABLE billing_events IS 'Stripe webhooks with a valid signature. Each is stored once, and kept for 30 days after it was processed';
COMMENT ON COLUMN billing_events.kind IS 'The type of the event';
COMMENT ON COLUMN billing_events.object_id IS 'The object that the event concerns';
COMMENT ON COLUMN billing_events.customer_id IS 'The customer that the event refers to';
COMMENT ON COLUMN billing_events.api_version IS 'The Stripe API version of the body; NULL for thin events';
COMMENT ON COLUMN billing_events.body IS 'The body as received. Its contents are never applied: events only cause reads';
COMMENT ON COLUMN billing_events.due_at IS 'When the event is processed next; NULL once it has been processed';
COMMENT ON COLUMN billing_events.outcome IS 'applied: the customer was read afterwards; ignored: does not concern a customer of this server; failed: abandoned';

GRANT SELECT ON billing_accounts, billing_subscriptions TO quota_app;
GRANT SELECT, INSERT, UPDATE, DELETE ON billing_accounts, billing_subscriptions, billing_events TO quota_system;

ALTER TABLE billing_accounts ENABLE ROW LEVEL SECURITY;
ALTER TABLE billing_accounts FORCE ROW LEVEL SECURITY;
CREATE POLICY billing_accounts_own ON billing_accounts TO quota_app USING (tenant_id = current_tenant());
CREATE POLICY billing_accounts_system ON billing_accounts TO quota_system USING (true);

ALTER TABLE billing_subscriptions ENABLE ROW LEVEL SECURITY;
ALTER TABLE billing_subscriptions FORCE ROW LEVEL SECURITY;
CREATE POLICY billing_subscriptions_own ON billing_subscriptions TO quota_app USING (tenant_id = current_tenant());
CREATE POLICY billing_subscriptions_system ON billing_subscriptions TO quota_system USING (true);

ALTER TABLE billing_events ENABLE ROW LEVEL SECURITY;
ALTER TABLE billing_events FORCE ROW LEVEL SECURITY;
CREATE POLICY billing_events_system ON billing_events TO quota_system USING (true);
