//! API keys: what a consumer of an API shows to be let in.

use garde::Validate;
use serde::{Deserialize, Serialize};

use crate::{
    id::{ApiKeyId, PlanId},
    patch::{Patch, sent},
    plan::RPM_MAX,
    time::Timestamp,
};

/// The longest grace period of a rotation: 30 days, in seconds.
pub const GRACE_MAX: u32 = 30 * 24 * 60 * 60;
/// The grace period of a rotation that does not name one: 24 hours, in seconds.
pub const GRACE_DEFAULT: u32 = 24 * 60 * 60;

/// An API key, without its text: that is shown once, when the key is made or rotated, and stored nowhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object), oai(example))]
pub struct ApiKey {
    pub id: ApiKeyId,
    pub name: String,
    pub plan_id: PlanId,
    /// The first characters of the key's text, to tell keys apart by.
    pub prefix: String,
    /// An inactive key is refused with 401 and never charged.
    pub is_active: bool,
    /// From then on the key is refused with 401.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub expires_at: Option<Timestamp>,
    /// A sustained rate of the key's own, in requests a minute, in place of the plan's. The burst follows
    /// it where the plan's burst is its rate.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub rpm_override: Option<u32>,
    /// When the key was last let in or limited; moves within seconds of the request.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub last_used_at: Option<Timestamp>,
    /// Until then the text from before the last rotation works as well.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub previous_expires_at: Option<Timestamp>,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
}

/// What a new key is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Validate)]
#[serde(deny_unknown_fields)]
#[cfg_attr(
    feature = "openapi",
    derive(poem_openapi::Object),
    oai(example, deny_unknown_fields)
)]
pub struct CreateApiKey {
    /// 1 to 200 characters.
    #[garde(custom(crate::bounds::name))]
    #[cfg_attr(feature = "openapi", oai(validator(min_length = 1, max_length = 200)))]
    pub name: String,
    #[garde(skip)]
    pub plan_id: PlanId,
    /// From then on the key is refused. Default: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[garde(skip)]
    #[cfg_attr(feature = "openapi", oai(nullable, skip_serializing_if_is_none))]
    pub expires_at: Option<Timestamp>,
    /// A sustained rate of the key's own, in requests a minute. Default: the plan's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[garde(range(min = 1, max = RPM_MAX))]
    #[cfg_attr(
        feature = "openapi",
        oai(
            nullable,
            skip_serializing_if_is_none,
            validator(minimum(value = "1"), maximum(value = "60000000"))
        )
    )]
    pub rpm_override: Option<u32>,
}

/// What changes about a key. A field that is not sent stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, Validate)]
#[serde(deny_unknown_fields)]
#[cfg_attr(
    feature = "openapi",
    derive(poem_openapi::Object),
    oai(example, deny_unknown_fields)
)]
pub struct UpdateApiKey {
    #[serde(
        default,
        deserialize_with = "sent",
        skip_serializing_if = "Option::is_none"
    )]
    #[garde(inner(custom(crate::bounds::name)))]
    #[cfg_attr(
        feature = "openapi",
        oai(
            skip_serializing_if_is_none,
            validator(min_length = 1, max_length = 200)
        )
    )]
    pub name: Option<String>,
    #[serde(
        default,
        deserialize_with = "sent",
        skip_serializing_if = "Option::is_none"
    )]
    #[garde(skip)]
    #[cfg_attr(feature = "openapi", oai(skip_serializing_if_is_none))]
    pub plan_id: Option<PlanId>,
    #[serde(
        default,
        deserialize_with = "sent",
        skip_serializing_if = "Option::is_none"
    )]
    #[garde(skip)]
    #[cfg_attr(feature = "openapi", oai(skip_serializing_if_is_none))]
    pub is_active: Option<bool>,
    /// `null`: the key never expires.
    #[serde(
        default,
        deserialize_with = "sent",
        skip_serializing_if = "Option::is_none"
    )]
    #[garde(skip)]
    #[cfg_attr(feature = "openapi", oai(nullable, skip_serializing_if_is_none))]
    pub expires_at: Patch<Timestamp>,
    /// `null`: the plan's rate.
    #[serde(
        default,
        deserialize_with = "sent",
        skip_serializing_if = "Option::is_none"
    )]
    #[garde(inner(inner(range(min = 1, max = RPM_MAX))))]
    #[cfg_attr(
        feature = "openapi",
        oai(
            nullable,
            skip_serializing_if_is_none,
            validator(minimum(value = "1"), maximum(value = "60000000"))
        )
    )]
    pub rpm_override: Patch<u32>,
}

/// How a key gets a new text.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, Validate)]
#[serde(deny_unknown_fields)]
#[cfg_attr(
    feature = "openapi",
    derive(poem_openapi::Object),
    oai(example, deny_unknown_fields)
)]
pub struct RotateApiKey {
    /// For how many seconds the old text still works: 0 (a leaked key) to 2,592,000 (30 days). Default:
    /// 86,400 (24 hours). A text from before an earlier rotation ends at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[garde(range(max = GRACE_MAX))]
    #[cfg_attr(
        feature = "openapi",
        oai(
            nullable,
            skip_serializing_if_is_none,
            validator(minimum(value = "0"), maximum(value = "2592000"))
        )
    )]
    pub grace_seconds: Option<u32>,
}

/// A key that was just made or rotated, with its text for the only time.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object), oai(example))]
pub struct CreatedApiKey {
    /// The key's text: `qk_`, 32 characters and a checksum of 6. Absent when an `Idempotency-Key` is
    /// replayed, because it is stored nowhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", oai(skip_serializing_if_is_none))]
    pub key: Option<String>,
    pub api_key: ApiKey,
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
    use crate::id::example;

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
                grace_seconds: Some(3600),
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
