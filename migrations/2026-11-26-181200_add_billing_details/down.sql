DROP TABLE tenant_quota_usage, billing_meter_errors;
ALTER TABLE billing_senders DROP COLUMN owner;
ALTER TABLE billing_usage DROP COLUMN divided_at;
ALTER TABLE billing_subscriptions
    DROP COLUMN product_name,
    DROP COLUMN currency,
    DROP COLUMN monthly_price,
    DROP COLUMN usage_price;
