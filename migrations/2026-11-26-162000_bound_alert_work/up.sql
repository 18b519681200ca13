-- Bounds the work for alerts, webhooks and email, so that one tenant cannot delay the work for other tenants.
--
-- When a server of the previous version deletes a webhook, it does not delete the webhook's deliveries. This version
-- deletes them later.

ALTER TABLE quota_alert_progress
    ADD COLUMN until_seq bigint,
    ADD COLUMN after_key uuid,
    ADD CONSTRAINT quota_alert_progress_part_together CHECK ((until_seq IS NULL) = (after_key IS NULL));
COMMENT ON COLUMN quota_alert_progress.until_seq IS 'The position up to which keys are being checked; NULL if no keys are being checked';
COMMENT ON COLUMN quota_alert_progress.after_key IS 'The last key that was checked up to until_seq';

ALTER TABLE webhook_deliveries
    DROP CONSTRAINT webhook_deliveries_webhook_fkey,
    ADD CONSTRAINT webhook_deliveries_tenant_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE;
COMMENT ON COLUMN webhook_deliveries.webhook_id IS
    'Not a foreign key: the deliveries of a deleted webhook are deleted in batches afterwards';
CREATE INDEX webhook_deliveries_pending_idx ON webhook_deliveries (tenant_id, webhook_id, due_at)
    WHERE due_at IS NOT NULL;
COMMENT ON INDEX webhook_deliveries_pending_idx IS 'Finds the deliveries of each webhook that are due, and counts pending ones';
CREATE INDEX webhook_deliveries_status_idx ON webhook_deliveries (tenant_id, webhook_id, status, id);
COMMENT ON INDEX webhook_deliveries_status_idx IS 'Lists the deliveries of a webhook with a certain status';

CREATE INDEX mails_pending_idx ON mails (tenant_id, due_at) WHERE due_at IS NOT NULL;
COMMENT ON INDEX mails_pending_idx IS 'Finds the next due email of each tenant in turn';
