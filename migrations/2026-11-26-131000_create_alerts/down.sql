DROP TABLE mails, webhook_deliveries, webhooks, quota_alert_progress, quota_alerts;
ALTER TABLE tenants DROP COLUMN alert_email, DROP COLUMN alert_email_roles;
