//! The audit log: who did what, when, from where.

use serde::{Deserialize, Serialize};

use crate::{
    id::{AuditEventId, UserId},
    page::in_address,
    time::Timestamp,
};

in_address!(
    /// What was done.
    AuditAction {
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
    }
);

in_address!(
    /// What it was done to.
    AuditTarget {
        Plan = "plan",
        ApiKey = "api_key",
        ServiceToken = "service_token",
        User = "user",
        Session = "session",
        Tenant = "tenant",
    }
);

/// One change to something of the tenant's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object), oai(example))]
pub struct AuditEvent {
    pub id: AuditEventId,
    pub at: Timestamp,
    /// Who did it; `null` when it was the server itself or its operator.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub user_id: Option<UserId>,
    /// The address that the user has now.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub user_email: Option<String>,
    /// What was done, as `noun.verb`: `plan.create`, `api_key.rotate`, `session.reuse_detected`.
    pub action: String,
    /// What it was done to: `plan`, `api_key`, `service_token`, `user`, `session`, `tenant`.
    pub target_type: String,
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub target_id: Option<String>,
    /// What that was called once it was done, or last; `null` where it has no name.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub target_name: Option<String>,
    /// The client's address.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub ip: Option<String>,
    /// The fields that changed, as they were.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub before: Option<serde_json::Value>,
    /// The fields that changed, as they are since.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub after: Option<serde_json::Value>,
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
