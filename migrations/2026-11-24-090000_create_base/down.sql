-- The roles are kept: they belong to the cluster, and other databases in it may use them.
DROP TABLE server_secrets, revocations, idempotency_keys, audit_events, quota_usage, service_tokens, api_keys,
    plans, refresh_tokens, sessions, memberships, users, tenants;
DROP FUNCTION revocations_in_order(), touch_api_key(), touch_updated_at(), current_tenant();
REVOKE USAGE ON SCHEMA public FROM quota_app, quota_system;
