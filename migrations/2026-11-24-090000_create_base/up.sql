-- The roles that the server uses. They own nothing, so row-level security applies to them, regardless of the role that
-- the server connects as. Roles belong to the cluster, not to the database, so migrations of two databases may create
-- them at the same time. If the migrating role may not create roles, create these two beforehand.
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['quota_app', 'quota_system'] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) THEN
            BEGIN
                EXECUTE format('CREATE ROLE %I NOLOGIN NOINHERIT', name);
            EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;
            END;
        END IF;
        IF NOT pg_has_role(current_user, name, 'MEMBER') THEN
            EXECUTE format('GRANT %I TO %I', name, current_user);
        END IF;
    END LOOP;
END $$;
GRANT USAGE ON SCHEMA public TO quota_app, quota_system;

-- The tenant of the current transaction. If unset, it is NULL, which equals no row's tenant.
CREATE FUNCTION current_tenant() RETURNS uuid
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN nullif(current_setting('quota.tenant', true), '')::uuid;
COMMENT ON FUNCTION current_tenant() IS 'The tenant set by SET LOCAL quota.tenant; NULL if unset, which matches no rows';

CREATE FUNCTION touch_updated_at() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    NEW.updated_at := now();
    RETURN NEW;
END $$;

-- Tenants, users, memberships ------------------------------------------------------------------------

CREATE TABLE tenants (
    id uuid NOT NULL,
    name text NOT NULL,
    time_zone text NOT NULL DEFAULT 'UTC',
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT tenants_pkey PRIMARY KEY (id),
    CONSTRAINT tenants_name_length CHECK (char_length(name) BETWEEN 1 AND 200)
);
COMMENT ON TABLE tenants IS 'Accounts that own plans, keys, service tokens and usage';
COMMENT ON COLUMN tenants.time_zone IS 'IANA time zone in which daily and monthly quotas reset';

CREATE TABLE users (
    id uuid NOT NULL,
    email text NOT NULL,
    name text NOT NULL DEFAULT '',
    password_hash text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT users_pkey PRIMARY KEY (id),
    CONSTRAINT users_email_key UNIQUE (email),
    CONSTRAINT users_email_lower CHECK (email = lower(email))
);
COMMENT ON TABLE users IS 'Users who can sign in';
COMMENT ON COLUMN users.email IS 'In lower case, so that each address has only one account';
COMMENT ON COLUMN users.password_hash IS 'PHC string (Argon2id)';

CREATE TABLE memberships (
    tenant_id uuid NOT NULL,
    user_id uuid NOT NULL,
    role text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT memberships_pkey PRIMARY KEY (tenant_id, user_id),
    CONSTRAINT memberships_tenant_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE,
    CONSTRAINT memberships_user_fkey FOREIGN KEY (user_id) REFERENCES users (id) ON DELETE CASCADE,
    CONSTRAINT memberships_role_known CHECK (role IN ('owner', 'admin', 'developer', 'billing', 'viewer'))
);
CREATE INDEX memberships_user_id_idx ON memberships (user_id);
COMMENT ON TABLE memberships IS 'The roles of users in tenants';

-- Sessions -------------------------------------------------------------------------------------------

CREATE TABLE sessions (
    id uuid NOT NULL,
    user_id uuid NOT NULL,
    tenant_id uuid NOT NULL,
    user_agent text,
    ip inet,
    created_at timestamptz NOT NULL DEFAULT now(),
    last_used_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    revoked_at timestamptz,
    CONSTRAINT sessions_pkey PRIMARY KEY (id),
    CONSTRAINT sessions_membership_fkey FOREIGN KEY (tenant_id, user_id)
        REFERENCES memberships (tenant_id, user_id) ON DELETE CASCADE
);
CREATE INDEX sessions_user_id_idx ON sessions (user_id);
CREATE INDEX sessions_expires_at_idx ON sessions (expires_at);
COMMENT ON TABLE sessions IS 'Session families: a sign-in and all refresh tokens issued for it';
COMMENT ON COLUMN sessions.tenant_id IS 'The tenant that the session acts for';

CREATE TABLE refresh_tokens (
    token_hash bytea NOT NULL,
    session_id uuid NOT NULL,
    used_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT refresh_tokens_pkey PRIMARY KEY (token_hash),
    CONSTRAINT refresh_tokens_session_fkey FOREIGN KEY (session_id) REFERENCES sessions (id) ON DELETE CASCADE,
    CONSTRAINT refresh_tokens_hash_length CHECK (octet_length(token_hash) = 32)
);
CREATE INDEX refresh_tokens_session_id_idx ON refresh_tokens (session_id);
COMMENT ON TABLE refresh_tokens IS 'All refresh tokens of all session families, including used ones: reusing a token indicates theft';
COMMENT ON COLUMN refresh_tokens.token_hash IS 'SHA-256 of the token';

-- Plans and keys -------------------------------------------------------------------------------------

CREATE TABLE plans (
    tenant_id uuid NOT NULL,
    id uuid NOT NULL,
    name text NOT NULL,
    default_rpm integer NOT NULL,
    burst integer NOT NULL,
    daily_quota bigint,
    monthly_quota bigint,
    strict boolean NOT NULL DEFAULT false,
    billing text NOT NULL DEFAULT 'free',
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT plans_pkey PRIMARY KEY (tenant_id, id),
    CONSTRAINT plans_id_key UNIQUE (id),
    CONSTRAINT plans_tenant_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE,
    CONSTRAINT plans_name_key UNIQUE (tenant_id, name),
    CONSTRAINT plans_name_length CHECK (char_length(name) BETWEEN 1 AND 200),
    CONSTRAINT plans_default_rpm_range CHECK (default_rpm BETWEEN 1 AND 60000000),
    CONSTRAINT plans_burst_range CHECK (burst BETWEEN 1 AND 60000000),
    CONSTRAINT plans_daily_quota_range CHECK (daily_quota BETWEEN 1 AND 999999999999999),
    CONSTRAINT plans_monthly_quota_range CHECK (monthly_quota BETWEEN 1 AND 999999999999999),
    CONSTRAINT plans_billing_known CHECK (billing IN ('free', 'paid'))
);
CREATE TRIGGER plans_touch BEFORE UPDATE ON plans FOR EACH ROW EXECUTE FUNCTION touch_updated_at();
COMMENT ON TABLE plans IS 'Limits shared by a group of keys; each key has its own bucket and quotas';
COMMENT ON COLUMN plans.default_rpm IS 'Sustained requests per minute';
COMMENT ON COLUMN plans.burst IS 'Maximum burst: requests an idle key may send immediately';
COMMENT ON COLUMN plans.daily_quota IS 'Requests per calendar day in the tenant''s time zone; NULL for no limit';
COMMENT ON COLUMN plans.monthly_quota IS 'Requests per calendar month in the tenant''s time zone; NULL for no limit';

CREATE TABLE api_keys (
    tenant_id uuid NOT NULL,
    id uuid NOT NULL,
    plan_id uuid NOT NULL,
    name text NOT NULL,
    prefix text NOT NULL,
    key_hash bytea NOT NULL,
    previous_key_hash bytea,
    previous_expires_at timestamptz,
    is_active boolean NOT NULL DEFAULT true,
    expires_at timestamptz,
    rpm_override integer,
    last_used_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT api_keys_pkey PRIMARY KEY (tenant_id, id),
    CONSTRAINT api_keys_id_key UNIQUE (id),
    CONSTRAINT api_keys_plan_fkey FOREIGN KEY (tenant_id, plan_id)
        REFERENCES plans (tenant_id, id) ON DELETE RESTRICT,
    CONSTRAINT api_keys_tenant_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE,
    CONSTRAINT api_keys_name_length CHECK (char_length(name) BETWEEN 1 AND 200),
    CONSTRAINT api_keys_rpm_override_range CHECK (rpm_override BETWEEN 1 AND 60000000),
    CONSTRAINT api_keys_key_hash_length CHECK (octet_length(key_hash) = 32),
    CONSTRAINT api_keys_previous_together CHECK ((previous_key_hash IS NULL) = (previous_expires_at IS NULL))
);
CREATE UNIQUE INDEX api_keys_key_hash_idx ON api_keys (key_hash);
CREATE UNIQUE INDEX api_keys_previous_key_hash_idx ON api_keys (previous_key_hash)
    WHERE previous_key_hash IS NOT NULL;
CREATE INDEX api_keys_plan_id_idx ON api_keys (plan_id);
COMMENT ON TABLE api_keys IS 'API keys of consumers. The secret is not stored';
COMMENT ON COLUMN api_keys.key_hash IS 'SHA-256 of the secret, which has 190 random bits';
COMMENT ON COLUMN api_keys.previous_key_hash IS 'SHA-256 of the secret before the last rotation';
COMMENT ON COLUMN api_keys.previous_expires_at IS 'The time until which the previous secret works';
COMMENT ON COLUMN api_keys.rpm_override IS 'Sustained requests per minute, overriding the plan''s';
-- Recording when a key was last used is not an edit, so it does not change updated_at.
CREATE FUNCTION touch_api_key() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.last_used_at IS NOT DISTINCT FROM OLD.last_used_at THEN
        NEW.updated_at := now();
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER api_keys_touch BEFORE UPDATE ON api_keys FOR EACH ROW EXECUTE FUNCTION touch_api_key();

CREATE TABLE service_tokens (
    tenant_id uuid NOT NULL,
    id uuid NOT NULL,
    name text NOT NULL,
    prefix text NOT NULL,
    token_hash bytea NOT NULL,
    last_used_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT service_tokens_pkey PRIMARY KEY (tenant_id, id),
    CONSTRAINT service_tokens_tenant_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE,
    CONSTRAINT service_tokens_name_length CHECK (char_length(name) BETWEEN 1 AND 200),
    CONSTRAINT service_tokens_hash_length CHECK (octet_length(token_hash) = 32)
);
CREATE UNIQUE INDEX service_tokens_token_hash_idx ON service_tokens (token_hash);
COMMENT ON TABLE service_tokens IS 'Credentials of a tenant''s gateways. The secret is not stored';
COMMENT ON COLUMN service_tokens.token_hash IS 'SHA-256 of the secret';

CREATE TABLE quota_usage (
    tenant_id uuid NOT NULL,
    key_id uuid NOT NULL,
    policy text NOT NULL,
    window_start timestamptz NOT NULL,
    used bigint NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT quota_usage_pkey PRIMARY KEY (tenant_id, key_id, policy, window_start),
    CONSTRAINT quota_usage_key_fkey FOREIGN KEY (tenant_id, key_id)
        REFERENCES api_keys (tenant_id, id) ON DELETE CASCADE,
    CONSTRAINT quota_usage_policy_known CHECK (policy IN ('daily', 'monthly')),
    CONSTRAINT quota_usage_used_positive CHECK (used >= 0)
);
CREATE INDEX quota_usage_window_start_idx ON quota_usage (window_start);
COMMENT ON TABLE quota_usage IS 'How much of each calendar quota replicas have taken in blocks, whether spent or not';

-- Audit, idempotency, revocations --------------------------------------------------------------------

CREATE TABLE audit_events (
    tenant_id uuid NOT NULL,
    id uuid NOT NULL,
    at timestamptz NOT NULL DEFAULT now(),
    user_id uuid,
    action text NOT NULL,
    target_type text NOT NULL,
    target_id text,
    ip inet,
    before jsonb,
    after jsonb,
    CONSTRAINT audit_events_pkey PRIMARY KEY (tenant_id, id),
    CONSTRAINT audit_events_tenant_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE,
    CONSTRAINT audit_events_user_fkey FOREIGN KEY (user_id) REFERENCES users (id) ON DELETE SET NULL
);
COMMENT ON TABLE audit_events IS 'Who changed what, when and from where. Rows are only added, never changed';

CREATE TABLE idempotency_keys (
    tenant_id uuid NOT NULL,
    operation text NOT NULL,
    key text NOT NULL,
    request_hash bytea NOT NULL,
    status smallint,
    response jsonb,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT idempotency_keys_pkey PRIMARY KEY (tenant_id, operation, key),
    CONSTRAINT idempotency_keys_tenant_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE,
    CONSTRAINT idempotency_keys_key_length CHECK (char_length(key) BETWEEN 1 AND 255)
);
CREATE INDEX idempotency_keys_created_at_idx ON idempotency_keys (created_at);
COMMENT ON TABLE idempotency_keys IS 'Responses to requests with an Idempotency-Key, kept for 24 hours, without secrets';
COMMENT ON COLUMN idempotency_keys.request_hash IS 'SHA-256 of the request body';

CREATE TABLE revocations (
    seq bigint GENERATED ALWAYS AS IDENTITY,
    tenant_id uuid NOT NULL,
    target_type text NOT NULL,
    target_id uuid NOT NULL,
    at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT revocations_pkey PRIMARY KEY (seq),
    CONSTRAINT revocations_target_known
        CHECK (target_type IN ('tenant', 'plan', 'api_key', 'service_token', 'session', 'user'))
);
CREATE INDEX revocations_at_idx ON revocations (at);
COMMENT ON TABLE revocations IS 'Changes after which replicas discard cached records, in commit order';
COMMENT ON COLUMN revocations.seq IS 'Assigned under an advisory lock, so that a reader of seq > n misses no row';

-- An identity value is assigned before its transaction commits. Without the lock, a reader could see 6, continue from
-- there, and miss 5, which commits later.
CREATE FUNCTION revocations_in_order() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(7226421);
    RETURN NULL;
END $$;
CREATE TRIGGER revocations_in_order BEFORE INSERT ON revocations
    FOR EACH STATEMENT EXECUTE FUNCTION revocations_in_order();

CREATE TABLE server_secrets (
    id boolean NOT NULL DEFAULT true,
    secret bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT server_secrets_pkey PRIMARY KEY (id),
    CONSTRAINT server_secrets_one_row CHECK (id),
    CONSTRAINT server_secrets_length CHECK (octet_length(secret) = 32)
);
COMMENT ON TABLE server_secrets IS 'The secret that signs tokens if QUOTA_SECRET is not set: generated once, shared by all replicas';

-- Rights ---------------------------------------------------------------------------------------------
-- quota_app acts for one tenant. quota_system acts for the server itself, for example for sign-in, lookups by secret,
-- and deletion of old rows.

GRANT SELECT, UPDATE ON tenants TO quota_app;
GRANT SELECT ON users, memberships TO quota_app;
GRANT SELECT, INSERT, UPDATE, DELETE ON plans, api_keys, service_tokens, idempotency_keys TO quota_app;
GRANT SELECT, INSERT ON audit_events, revocations TO quota_app;
GRANT SELECT, INSERT, UPDATE, DELETE ON
    tenants, users, memberships, sessions, refresh_tokens, plans, api_keys, service_tokens, quota_usage,
    idempotency_keys, revocations TO quota_system;
GRANT SELECT, INSERT ON audit_events, server_secrets TO quota_system;

ALTER TABLE tenants ENABLE ROW LEVEL SECURITY;
ALTER TABLE tenants FORCE ROW LEVEL SECURITY;
CREATE POLICY tenants_own ON tenants TO quota_app USING (id = current_tenant());
CREATE POLICY tenants_system ON tenants TO quota_system USING (true);

ALTER TABLE users ENABLE ROW LEVEL SECURITY;
ALTER TABLE users FORCE ROW LEVEL SECURITY;
CREATE POLICY users_members ON users TO quota_app USING (
    EXISTS (SELECT 1 FROM memberships m WHERE m.user_id = users.id AND m.tenant_id = current_tenant())
);
CREATE POLICY users_system ON users TO quota_system USING (true);

DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY[
        'memberships', 'plans', 'api_keys', 'service_tokens', 'audit_events', 'idempotency_keys', 'revocations'
    ] LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', name);
        EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', name);
        EXECUTE format(
            'CREATE POLICY %I ON %I TO quota_app USING (tenant_id = current_tenant())', name || '_own', name);
        EXECUTE format('CREATE POLICY %I ON %I TO quota_system USING (true)', name || '_system', name);
    END LOOP;
    FOREACH name IN ARRAY ARRAY['sessions', 'refresh_tokens', 'quota_usage', 'server_secrets'] LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', name);
        EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', name);
        EXECUTE format('CREATE POLICY %I ON %I TO quota_system USING (true)', name || '_system', name);
    END LOOP;
END $$;
