//! Quota alerts: notices that a key or tenant has used a certain percentage of a quota.

use crate::{
    auth::Role,
    id::{ApiKeyId, QuotaAlertId},
    limit::PolicyName,
    time::Timestamp,
    wire::{response, update},
};

/// The percentages of a quota that trigger an alert.
pub const THRESHOLDS: [u32; 3] = [50, 80, 100];

response! {
    /// A notification that 50, 80 or 100% of a quota has been used. Created at most once per threshold per day or
    /// month.
    #[derive(Debug, Eq)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct QuotaAlert {
        pub id: QuotaAlertId,
        /// The threshold that was reached: 50, 80 or 100% of the quota.
        pub threshold: u32,
        /// The quota: `daily`, `monthly` or `tenant_monthly`.
        pub policy: PolicyName,
        /// The API key that the quota applies to. `null` if the quota is the tenant's.
        pub key_id: Option<ApiKeyId>,
        /// The key's name when the alert was created.
        pub key_name: Option<String>,
        /// The quota for that day or month.
        pub limit: u64,
        /// How much of the quota was used when the alert was created.
        pub used: u64,
        /// When the day or month started.
        pub starts_at: Timestamp,
        /// When the quota resets.
        pub resets_at: Timestamp,
        pub created_at: Timestamp,
    }
}

response! {
    /// Who receives quota alerts by email.
    #[derive(Debug, Eq)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct AlertSettings {
        /// Whether alerts are sent by email.
        pub email: bool,
        /// Members of the tenant who have one of these roles receive the emails.
        pub email_roles: Vec<Role>,
        /// Whether the operator has configured a mail server (`SMTP_URL`). Without a mail server, emails are written to
        /// files instead of being sent.
        pub can_email: bool,
    }
}

update! {
    /// Request body for updating the alert settings. Omitted fields are unchanged.
    pub struct UpdateAlertSettings {
        /// Whether alerts are sent by email.
        #[garde(skip)]
        pub email: Option<bool>,
        /// Members of the tenant who have one of these roles receive the emails.
        #[garde(skip)]
        pub email_roles: Option<Vec<Role>>,
    }
}

#[cfg(feature = "openapi")]
mod examples {
    use poem_openapi::types::Example;

    use super::{AlertSettings, QuotaAlert, UpdateAlertSettings};
    use crate::{auth::Role, id::example, limit::PolicyName};

    impl Example for QuotaAlert {
        fn example() -> Self {
            Self {
                id: example::quota_alert(),
                threshold: 80,
                policy: PolicyName::Monthly,
                key_id: Some(example::api_key()),
                key_name: Some("Mobile app".into()),
                limit: 50_000,
                used: 40_012,
                starts_at: example::at(),
                resets_at: example::at(),
                created_at: example::at(),
            }
        }
    }

    impl Example for AlertSettings {
        fn example() -> Self {
            Self {
                email: true,
                email_roles: vec![Role::Owner, Role::Admin],
                can_email: true,
            }
        }
    }

    impl Example for UpdateAlertSettings {
        fn example() -> Self {
            Self {
                email: Some(true),
                email_roles: Some(vec![Role::Owner, Role::Admin]),
            }
        }
    }
}
