-- The Stripe account that the customers belong to. With a secret key of another account, all subscriptions would seem
-- to be missing, and tenants would lose access.

CREATE TABLE billing_stripe_account (
    is_only boolean NOT NULL DEFAULT true,
    account_id text,
    livemode boolean NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT billing_stripe_account_pkey PRIMARY KEY (is_only),
    CONSTRAINT billing_stripe_account_one_row CHECK (is_only)
);
COMMENT ON TABLE billing_stripe_account IS 'The Stripe account to which all customers belong: one row, or none before billing is used';
COMMENT ON COLUMN billing_stripe_account.is_only IS 'Always true, so that there is one row at most';
COMMENT ON COLUMN billing_stripe_account.account_id IS 'The account''s ID in Stripe; NULL if the secret key does not have permission to read the account';
COMMENT ON COLUMN billing_stripe_account.livemode IS 'Whether the customers are in live mode';

GRANT SELECT, INSERT, UPDATE, DELETE ON billing_stripe_account TO quota_system;
ALTER TABLE billing_stripe_account ENABLE ROW LEVEL SECURITY;
ALTER TABLE billing_stripe_account FORCE ROW LEVEL SECURITY;
CREATE POLICY billing_stripe_account_system ON billing_stripe_account TO quota_system USING (true);
