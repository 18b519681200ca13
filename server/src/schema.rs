// @generated automatically by Diesel CLI.

diesel::table! {
    api_keys (tenant_id, id) {
        tenant_id -> Uuid,
        id -> Uuid,
        plan_id -> Uuid,
        name -> Text,
        prefix -> Text,
        key_hash -> Bytea,
        previous_key_hash -> Nullable<Bytea>,
        previous_expires_at -> Nullable<Timestamptz>,
        is_active -> Bool,
        expires_at -> Nullable<Timestamptz>,
        rpm_override -> Nullable<Int4>,
        last_used_at -> Nullable<Timestamptz>,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
    }
}

diesel::table! {
    audit_events (tenant_id, id) {
        tenant_id -> Uuid,
        id -> Uuid,
        at -> Timestamptz,
        user_id -> Nullable<Uuid>,
        action -> Text,
        target_type -> Text,
        target_id -> Nullable<Text>,
        ip -> Nullable<Inet>,
        before -> Nullable<Jsonb>,
        after -> Nullable<Jsonb>,
    }
}

diesel::table! {
    idempotency_keys (tenant_id, operation, key) {
        tenant_id -> Uuid,
        operation -> Text,
        key -> Text,
        request_hash -> Bytea,
        status -> Nullable<Int2>,
        response -> Nullable<Jsonb>,
        created_at -> Timestamptz,
    }
}

diesel::table! {
    memberships (tenant_id, user_id) {
        tenant_id -> Uuid,
        user_id -> Uuid,
        role -> Text,
        created_at -> Timestamptz,
    }
}

diesel::table! {
    plans (tenant_id, id) {
        tenant_id -> Uuid,
        id -> Uuid,
        name -> Text,
        default_rpm -> Int4,
        burst -> Int4,
        daily_quota -> Nullable<Int8>,
        monthly_quota -> Nullable<Int8>,
        strict -> Bool,
        billing -> Text,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
    }
}

diesel::table! {
    quota_usage (tenant_id, key_id, policy, window_start) {
        tenant_id -> Uuid,
        key_id -> Uuid,
        policy -> Text,
        window_start -> Timestamptz,
        used -> Int8,
        updated_at -> Timestamptz,
    }
}

diesel::table! {
    refresh_tokens (token_hash) {
        token_hash -> Bytea,
        session_id -> Uuid,
        used_at -> Nullable<Timestamptz>,
        created_at -> Timestamptz,
    }
}

diesel::table! {
    revocations (seq) {
        seq -> Int8,
        tenant_id -> Uuid,
        target_type -> Text,
        target_id -> Uuid,
        at -> Timestamptz,
    }
}

diesel::table! {
    server_secrets (id) {
        id -> Bool,
        secret -> Bytea,
        created_at -> Timestamptz,
    }
}

diesel::table! {
    service_tokens (tenant_id, id) {
        tenant_id -> Uuid,
        id -> Uuid,
        name -> Text,
        prefix -> Text,
        token_hash -> Bytea,
        last_used_at -> Nullable<Timestamptz>,
        created_at -> Timestamptz,
    }
}

diesel::table! {
    sessions (id) {
        id -> Uuid,
        user_id -> Uuid,
        tenant_id -> Uuid,
        user_agent -> Nullable<Text>,
        ip -> Nullable<Inet>,
        created_at -> Timestamptz,
        last_used_at -> Timestamptz,
        expires_at -> Timestamptz,
        revoked_at -> Nullable<Timestamptz>,
    }
}

diesel::table! {
    tenants (id) {
        id -> Uuid,
        name -> Text,
        time_zone -> Text,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
    }
}

diesel::table! {
    users (id) {
        id -> Uuid,
        email -> Text,
        name -> Text,
        password_hash -> Text,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
    }
}

diesel::joinable!(api_keys -> tenants (tenant_id));
diesel::joinable!(audit_events -> tenants (tenant_id));
diesel::joinable!(audit_events -> users (user_id));
diesel::joinable!(idempotency_keys -> tenants (tenant_id));
diesel::joinable!(memberships -> tenants (tenant_id));
diesel::joinable!(memberships -> users (user_id));
diesel::joinable!(plans -> tenants (tenant_id));
diesel::joinable!(refresh_tokens -> sessions (session_id));
diesel::joinable!(service_tokens -> tenants (tenant_id));

diesel::allow_tables_to_appear_in_same_query!(
    api_keys,
    audit_events,
    idempotency_keys,
    memberships,
    plans,
    quota_usage,
    refresh_tokens,
    revocations,
    server_secrets,
    service_tokens,
    sessions,
    tenants,
    users,
);
