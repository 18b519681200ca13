DROP INDEX mails_pending_idx;
DROP INDEX webhook_deliveries_status_idx;
DROP INDEX webhook_deliveries_pending_idx;
COMMENT ON COLUMN webhook_deliveries.webhook_id IS NULL;
DELETE FROM webhook_deliveries d
WHERE NOT EXISTS (SELECT FROM webhooks w WHERE w.tenant_id = d.tenant_id AND w.id = d.webhook_id);
ALTER TABLE webhook_deliveries
    DROP CONSTRAINT webhook_deliveries_tenant_fkey,
    ADD CONSTRAINT webhook_deliveries_webhook_fkey FOREIGN KEY (tenant_id, webhook_id)
        REFERENCES webhooks (tenant_id, id) ON DELETE CASCADE;
ALTER TABLE quota_alert_progress DROP COLUMN until_seq, DROP COLUMN after_key;
