//! API keys: the credentials that consumers of an API send.

use crate::{
    field::{ExternalId, GraceSeconds, Metadata, Name, Rpm},
    id::{ApiKeyId, PlanId},
    patch::Patch,
    time::Timestamp,
    wire::{Omittable, request, response, text_enum, update},
};

text_enum! {
    /// Status of an API key. `active`: the key is neither deactivated nor expired. `expired`: the key has expired.
    /// `inactive`: the key is deactivated, whether or not it has also expired.
    pub enum ApiKeyStatus {
        Active = "active",
        Expired = "expired",
        Inactive = "inactive",
    }
}

response! {
    /// An API key. Its secret is returned only once, on creation or rotation, and is never stored.
    #[derive(Debug, Eq)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct ApiKey {
        pub id: ApiKeyId,
        pub name: String,
        pub plan_id: PlanId,
        /// The first characters of the key, which identify it without revealing it.
        pub prefix: String,
        /// Whether the key is active. `false` if the key was deactivated: requests with it are then rejected, and do
        /// not count against any limit. This field does not reflect expiration: it can be `true` for an expired key.
        pub is_active: bool,
        /// When the key expires. After that time, requests with the key are rejected. `null` if the key never expires.
        pub expires_at: Option<Timestamp>,
        /// Requests per minute for this key, overriding the plan's rate. `null` if the key uses the plan's rate. If the
        /// plan's burst equals the plan's rate, the key's burst equals this override.
        pub rpm_override: Option<u32>,
        /// An identifier from your own system, such as a customer ID. Multiple keys can share the same external
        /// ID.
        #[serde(default)]
        pub external_id: Option<String>,
        /// Custom name–value pairs. Quota stores these pairs but does not interpret them.
        #[serde(default)]
        pub metadata: Metadata,
        /// When a request with the key was last allowed or denied. Updated within seconds of the request.
        pub last_used_at: Option<Timestamp>,
        /// When the previous secret stops working after a rotation. `null` if there is no previous secret.
        pub previous_expires_at: Option<Timestamp>,
        pub created_at: Timestamp,
        pub updated_at: Timestamp,
    }
}

impl ApiKey {
    /// Returns the key's status at a time in milliseconds since 1970.
    pub fn status(&self, now: i64) -> ApiKeyStatus {
        let is_expired = self
            .expires_at
            .is_some_and(|at| at.inner().timestamp_millis() <= now);
        match (self.is_active, is_expired) {
            (false, _) => ApiKeyStatus::Inactive,
            (true, true) => ApiKeyStatus::Expired,
            (true, false) => ApiKeyStatus::Active,
        }
    }
}

request! {
    /// Request body for creating an API key.
    #[derive(Debug)]
    pub struct CreateApiKey {
        /// 1 to 200 characters.
        #[garde(dive)]
        pub name: Name,
        #[garde(skip)]
        pub plan_id: PlanId,
        /// When the key expires. Must be in the future. Default: never.
        #[garde(skip)]
        pub expires_at: Option<Timestamp>,
        /// Requests per minute for this key, 1 to 60,000,000. Default: the plan's rate.
        #[garde(dive)]
        pub rpm_override: Option<Rpm>,
        /// An identifier from your own system, such as a customer ID. 1 to 200 characters. Multiple keys can share
        /// the same external ID.
        #[garde(dive)]
        pub external_id: Option<ExternalId>,
        /// Up to 20 custom name–value pairs. Names are 1 to 40 letters, digits, hyphens, underscores or periods; values
        /// are at most 100 characters.
        #[garde(dive)]
        pub metadata: Option<Metadata>,
    }
}

update! {
    /// Request body for updating an API key. Omitted fields are unchanged.
    pub struct UpdateApiKey {
        /// 1 to 200 characters.
        #[garde(dive)]
        pub name: Option<Name>,
        #[garde(skip)]
        pub plan_id: Option<PlanId>,
        #[garde(skip)]
        pub is_active: Option<bool>,
        /// When the key expires. Must be in the future. `null` removes the expiration time.
        #[garde(skip)]
        pub expires_at: Patch<Timestamp>,
        /// Requests per minute for this key, 1 to 60,000,000. `null` restores the plan's rate.
        #[garde(dive)]
        pub rpm_override: Patch<Rpm>,
        /// An identifier from your own system. 1 to 200 characters. `null` removes the identifier.
        #[garde(dive)]
        pub external_id: Patch<ExternalId>,
        /// Replaces all pairs. Send `{}` to remove all pairs.
        #[garde(dive)]
        pub metadata: Option<Metadata>,
    }
}

request! {
    /// Request body for rotating an API key.
    #[derive(Debug, Default)]
    pub struct RotateApiKey {
        /// Seconds until the current secret stops working, 0 to 2,592,000 (30 days). Use 0 if the secret was leaked.
        /// Default: 86,400 (24 hours).
        #[garde(dive)]
        pub grace_seconds: Option<GraceSeconds>,
        /// What to do if the grace period of an earlier rotation has not ended. If `true`, the previous secret is
        /// revoked immediately. If `false`, the request fails with 409. Default: false.
        #[garde(skip)]
        pub replace_previous: Option<bool>,
    }
}

response! {
    /// An API key that has just been created or rotated, with its secret.
    #[derive(Eq)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct CreatedApiKey {
        /// The full key: `qk_`, 32 random characters and a 6-character checksum. The key is returned only once and is
        /// never stored: a replay with the same `Idempotency-Key` omits the key.
        pub key: Omittable<String>,
        pub api_key: ApiKey,
    }
}

impl std::fmt::Debug for CreatedApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CreatedApiKey")
            .field("api_key", &self.api_key)
            .finish_non_exhaustive()
    }
}

#[cfg(feature = "openapi")]
mod examples {
    use poem_openapi::types::Example;

    use super::{ApiKey, CreateApiKey, CreatedApiKey, RotateApiKey, UpdateApiKey};
    use crate::{field::Metadata, id::example};

    const EXTERNAL_ID: &str = "customer-42";

    fn metadata() -> Metadata {
        [("region".into(), "eu".into())].into_iter().collect()
    }

    impl Example for ApiKey {
        fn example() -> Self {
            Self {
                id: example::api_key(),
                name: "Mobile app".into(),
                plan_id: example::plan(),
                prefix: "qk_00000000".into(),
                is_active: true,
                expires_at: None,
                rpm_override: None,
                external_id: Some(EXTERNAL_ID.into()),
                metadata: metadata(),
                last_used_at: Some(example::at()),
                previous_expires_at: None,
                created_at: example::at(),
                updated_at: example::at(),
            }
        }
    }

    impl Example for CreateApiKey {
        fn example() -> Self {
            Self {
                name: "Mobile app".into(),
                plan_id: example::plan(),
                expires_at: None,
                rpm_override: None,
                external_id: Some(EXTERNAL_ID.into()),
                metadata: Some(metadata()),
            }
        }
    }

    impl Example for UpdateApiKey {
        fn example() -> Self {
            Self {
                is_active: Some(false),
                ..Self::default()
            }
        }
    }

    impl Example for RotateApiKey {
        fn example() -> Self {
            Self {
                grace_seconds: Some(3600.into()),
                replace_previous: None,
            }
        }
    }

    impl Example for CreatedApiKey {
        fn example() -> Self {
            Self {
                key: Some(example::KEY_TEXT.into()),
                api_key: ApiKey::example(),
            }
        }
    }
}
