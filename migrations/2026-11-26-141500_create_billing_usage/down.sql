DROP TABLE billing_senders;
DROP TABLE billing_reports;
DROP TABLE billing_usage;
ALTER TABLE billing_subscriptions DROP COLUMN ended_at, DROP COLUMN is_metered;
