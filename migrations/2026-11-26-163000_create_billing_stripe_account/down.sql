DROP TABLE billing_stripe_account;
