//! The audit log: a record of changes and sign-ins.

use crate::{
    id::{AuditEventId, UserId},
    time::Timestamp,
    wire::{response, text_enum},
};

text_enum! {
    /// An action in the audit log.
    pub enum AuditAction {
        PlanCreate = "plan.create",
        PlanUpdate = "plan.update",
        PlanDelete = "plan.delete",
        ApiKeyCreate = "api_key.create",
        ApiKeyUpdate = "api_key.update",
        ApiKeyRotate = "api_key.rotate",
        ApiKeyDelete = "api_key.delete",
        ServiceTokenCreate = "service_token.create",
        ServiceTokenDelete = "service_token.delete",
        UserRegister = "user.register",
        UserUpdate = "user.update",
        UserChangePassword = "user.change_password",
        UserResetPassword = "user.reset_password",
        SessionBegin = "session.begin",
        SessionEnd = "session.end",
        SessionReuseDetected = "session.reuse_detected",
        TenantUpdate = "tenant.update",
        SubscriptionUpdate = "subscription.update",
        TenantUpdateAlerts = "tenant.update_alerts",
        WebhookCreate = "webhook.create",
        WebhookUpdate = "webhook.update",
        WebhookRotateSecret = "webhook.rotate_secret",
        WebhookDisable = "webhook.disable",
        WebhookDelete = "webhook.delete",
    }
}

text_enum! {
    /// A type of resource in the audit log.
    pub enum AuditTarget {
        Plan = "plan",
        ApiKey = "api_key",
        ServiceToken = "service_token",
        User = "user",
        Session = "session",
        Tenant = "tenant",
        Subscription = "subscription",
        Webhook = "webhook",
    }
}

response! {
    /// A change or sign-in, as recorded in the audit log.
    #[derive(Debug)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct AuditEvent {
        pub id: AuditEventId,
        pub at: Timestamp,
        /// The user who performed the action. `null` if Quota or its operator performed it.
        pub user_id: Option<UserId>,
        /// The user's current email.
        pub user_email: Option<String>,
        /// The action, in the form `resource.action`, such as `plan.create`, `api_key.rotate` or
        /// `session.reuse_detected`.
        pub action: String,
        /// The type of the resource: `plan`, `api_key`, `service_token`, `user`, `session`, `tenant`, `subscription` or
        /// `webhook`.
        pub target_type: String,
        pub target_id: Option<String>,
        /// The resource's name after the change, or before its deletion. `null` if the resource has no name.
        pub target_name: Option<String>,
        /// The client's IP address.
        pub ip: Option<String>,
        /// The values of the changed fields before the change. `null` on creation, or if the event does not record any
        /// fields.
        pub before: Option<serde_json::Value>,
        /// The values of the changed fields after the change. `null` on deletion, or if the event does not record any
        /// fields.
        pub after: Option<serde_json::Value>,
    }
}

#[cfg(feature = "openapi")]
mod examples {
    use poem_openapi::types::Example;

    use super::AuditEvent;
    use crate::id::example;

    impl Example for AuditEvent {
        fn example() -> Self {
            Self {
                id: example::audit_event(),
                at: example::at(),
                user_id: Some(example::user()),
                user_email: Some("ada@example.com".into()),
                action: "plan.update".into(),
                target_type: "plan".into(),
                target_id: Some(example::plan().to_string()),
                target_name: Some("Starter".into()),
                ip: Some("192.0.2.7".into()),
                before: Some(serde_json::json!({"default_rpm": 600})),
                after: Some(serde_json::json!({"default_rpm": 1200})),
            }
        }
    }
}
