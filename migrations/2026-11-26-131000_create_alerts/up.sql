-- Alerts about quotas, and their delivery by webhook and email.

ALTER TABLE tenants
    ADD COLUMN alert_email boolean NOT NULL DEFAULT true,
    ADD COLUMN alert_email_roles text[] NOT NULL DEFAULT '{owner,admin}';
COMMENT ON COLUMN tenants.alert_email IS 'Whether quota alerts are sent by email';
COMMENT ON COLUMN tenants.alert_email_roles IS 'The roles whose members get these emails';

CREATE TABLE quota_alerts (
    tenant_id uuid NOT NULL,
    id uuid NOT NULL,
    key_id uuid NOT NULL,
    key_name text,
    policy text NOT NULL,
    threshold integer NOT NULL,
    quota bigint NOT NULL,
    used bigint NOT NULL,
    window_start timestamptz NOT NULL,
    window_end timestamptz NOT NULL,
    email_pending boolean NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT quota_alerts_pkey PRIMARY KEY (tenant_id, id),
    CONSTRAINT quota_alerts_once UNIQUE (tenant_id, key_id, policy, window_start, threshold),
    CONSTRAINT quota_alerts_tenant_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE,
    CONSTRAINT quota_alerts_policy_known CHECK (policy IN ('daily', 'monthly', 'tenant_monthly')),
    CONSTRAINT quota_alerts_threshold_range CHECK (threshold BETWEEN 1 AND 100),
    CONSTRAINT quota_alerts_window_order CHECK (window_start < window_end)
);
CREATE INDEX quota_alerts_email_pending_idx ON quota_alerts (tenant_id) WHERE email_pending;
CREATE INDEX quota_alerts_window_end_idx ON quota_alerts (window_end);
COMMENT ON TABLE quota_alerts IS
    'Quota alerts: one row for each threshold of a quota that was reached in a window, inserted together with the alert''s deliveries. Rows outlive their keys';
COMMENT ON COLUMN quota_alerts.key_id IS 'The key that the quota belongs to; the zero UUID for a quota of the tenant';
COMMENT ON COLUMN quota_alerts.key_name IS 'The key''s name at the time';
COMMENT ON COLUMN quota_alerts.threshold IS 'The threshold, in percent of the quota';
COMMENT ON COLUMN quota_alerts.quota IS 'The quota for the window';
COMMENT ON COLUMN quota_alerts.used IS 'How much of the quota was used when the alert was created';
COMMENT ON COLUMN quota_alerts.email_pending IS 'Whether the alert has yet to be sent by email';

CREATE TABLE quota_alert_progress (
    tenant_id uuid NOT NULL,
    seq bigint NOT NULL,
    CONSTRAINT quota_alert_progress_pkey PRIMARY KEY (tenant_id),
    CONSTRAINT quota_alert_progress_tenant_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE
);
COMMENT ON TABLE quota_alert_progress IS 'How much usage of each tenant has been checked against its quotas';
COMMENT ON COLUMN quota_alert_progress.seq IS 'The last position in usage_log that was checked';

CREATE TABLE webhooks (
    tenant_id uuid NOT NULL,
    id uuid NOT NULL,
    name text NOT NULL,
    url text NOT NULL,
    secret bytea NOT NULL,
    previous_secret bytea,
    previous_secret_expires_at timestamptz,
    is_active boolean NOT NULL DEFAULT true,
    disabled_reason text,
    failing_since timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT webhooks_pkey PRIMARY KEY (tenant_id, id),
    CONSTRAINT webhooks_tenant_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE,
    CONSTRAINT webhooks_name_length CHECK (char_length(name) BETWEEN 1 AND 200),
    CONSTRAINT webhooks_url_length CHECK (char_length(url) BETWEEN 8 AND 2000),
    CONSTRAINT webhooks_previous_together CHECK ((previous_secret IS NULL) = (previous_secret_expires_at IS NULL)),
    CONSTRAINT webhooks_reason_while_disabled CHECK (disabled_reason IS NULL OR NOT is_active)
);
-- Recording the result of a delivery does not change updated_at, unless it disables the webhook.
CREATE TRIGGER webhooks_touch BEFORE UPDATE OF name, url, is_active, previous_secret_expires_at ON webhooks
    FOR EACH ROW EXECUTE FUNCTION touch_updated_at();
COMMENT ON TABLE webhooks IS 'Endpoints to which a tenant''s events are sent';
COMMENT ON COLUMN webhooks.secret IS 'The key that signs deliveries, encrypted with a key derived from QUOTA_SECRET';
COMMENT ON COLUMN webhooks.previous_secret IS 'The key before the last rotation, encrypted. Deliveries are also signed with this key until previous_secret_expires_at';
COMMENT ON COLUMN webhooks.disabled_reason IS 'Why the server disabled the webhook; NULL if the server did not';
COMMENT ON COLUMN webhooks.failing_since IS 'When the first attempt since the last successful one failed';

CREATE TABLE webhook_deliveries (
    tenant_id uuid NOT NULL,
    id uuid NOT NULL,
    webhook_id uuid NOT NULL,
    event_id text NOT NULL,
    event_type text NOT NULL,
    payload text NOT NULL,
    status text NOT NULL DEFAULT 'pending',
    attempts integer NOT NULL DEFAULT 0,
    due_at timestamptz DEFAULT now(),
    last_attempt_at timestamptz,
    response_status integer,
    error text,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT webhook_deliveries_pkey PRIMARY KEY (tenant_id, id),
    CONSTRAINT webhook_deliveries_once UNIQUE (tenant_id, webhook_id, event_id),
    CONSTRAINT webhook_deliveries_webhook_fkey FOREIGN KEY (tenant_id, webhook_id)
        REFERENCES webhooks (tenant_id, id) ON DELETE CASCADE,
    CONSTRAINT webhook_deliveries_status_known CHECK (status IN ('pending', 'delivered', 'failed')),
    CONSTRAINT webhook_deliveries_due_while_pending CHECK ((due_at IS NOT NULL) = (status = 'pending'))
);
CREATE INDEX webhook_deliveries_due_at_idx ON webhook_deliveries (due_at) WHERE due_at IS NOT NULL;
CREATE INDEX webhook_deliveries_webhook_id_idx ON webhook_deliveries (tenant_id, webhook_id, id);
CREATE INDEX webhook_deliveries_created_at_idx ON webhook_deliveries (created_at);
COMMENT ON TABLE webhook_deliveries IS 'Events sent to webhooks. Kept for 30 days';
COMMENT ON COLUMN webhook_deliveries.event_id IS 'Sent as webhook-id: the same for every attempt and every endpoint';
COMMENT ON COLUMN webhook_deliveries.payload IS 'The body, byte for byte';
COMMENT ON COLUMN webhook_deliveries.attempts IS 'The number of attempts since the delivery was created or last redelivered, increased before each attempt';
COMMENT ON COLUMN webhook_deliveries.due_at IS
    'When the next attempt is due. During an attempt: when another replica may retry if the replica that made the attempt has exited';
COMMENT ON COLUMN webhook_deliveries.response_status IS 'HTTP status of the last attempt; NULL if there was no response';
COMMENT ON COLUMN webhook_deliveries.error IS 'Why the last attempt failed';

CREATE TABLE mails (
    tenant_id uuid NOT NULL,
    id uuid NOT NULL,
    recipient text NOT NULL,
    subject text NOT NULL,
    text_body text NOT NULL,
    html_body text NOT NULL,
    status text NOT NULL DEFAULT 'pending',
    attempts integer NOT NULL DEFAULT 0,
    due_at timestamptz DEFAULT now(),
    error text,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT mails_pkey PRIMARY KEY (tenant_id, id),
    CONSTRAINT mails_tenant_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE,
    CONSTRAINT mails_status_known CHECK (status IN ('pending', 'sent', 'failed')),
    CONSTRAINT mails_due_while_pending CHECK ((due_at IS NOT NULL) = (status = 'pending'))
);
CREATE INDEX mails_due_at_idx ON mails (due_at) WHERE due_at IS NOT NULL;
CREATE INDEX mails_created_at_idx ON mails (created_at);
COMMENT ON TABLE mails IS 'Outgoing email. Kept for 7 days';
COMMENT ON COLUMN mails.due_at IS
    'When the next attempt is due. During an attempt: when another replica may retry if the replica that made the attempt has exited';
COMMENT ON COLUMN mails.error IS 'Why the last attempt failed';

-- A tenant manages its webhooks and can redeliver events. Only the server creates alerts and emails.
GRANT SELECT, INSERT, UPDATE, DELETE ON webhooks TO quota_app;
GRANT SELECT, INSERT, UPDATE ON webhook_deliveries TO quota_app;
GRANT SELECT ON quota_alerts TO quota_app;
GRANT SELECT, INSERT, UPDATE, DELETE ON quota_alerts, quota_alert_progress, webhooks, webhook_deliveries, mails
    TO quota_system;
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['quota_alerts', 'quota_alert_progress', 'webhooks', 'webhook_deliveries', 'mails'] LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', name);
        EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', name);
        EXECUTE format('CREATE POLICY %I ON %I TO quota_system USING (true)', name || '_system', name);
    END LOOP;
    FOREACH name IN ARRAY ARRAY['quota_alerts', 'webhooks', 'webhook_deliveries'] LOOP
        EXECUTE format(
            'CREATE POLICY %I ON %I TO quota_app USING (tenant_id = current_tenant())', name || '_own', name);
    END LOOP;
END $$;
