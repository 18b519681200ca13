//! Resource IDs. All IDs are UUIDv7, so they sort by creation time. Knowing an ID does not give access to the resource.

use uuid::Uuid;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
        )]
        #[serde(transparent)]
        #[cfg_attr(feature = "openapi", derive(poem_openapi::NewType))]
        pub struct $name(pub Uuid);

        impl $name {
            /// The nil ID, which no resource has.
            pub const NIL: Self = Self(Uuid::nil());
        }

        impl From<Uuid> for $name {
            fn from(id: Uuid) -> Self {
                Self(id)
            }
        }

        impl From<$name> for Uuid {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }

        impl std::str::FromStr for $name {
            type Err = uuid::Error;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.parse().map(Self)
            }
        }
    };
}

id!(
    /// The ID of a tenant, which owns plans, keys, service tokens and usage.
    TenantId
);
id!(
    /// The ID of a user.
    UserId
);
id!(PlanId);
id!(ApiKeyId);
id!(ServiceTokenId);
id!(
    /// The ID of a session: a sign-in and all tokens issued for this sign-in.
    SessionId
);
id!(AuditEventId);
id!(WebhookId);
id!(
    /// The ID of the delivery of an event to a webhook.
    WebhookDeliveryId
);
id!(QuotaAlertId);

/// The IDs in the OpenAPI document's examples.
#[cfg(feature = "openapi")]
pub(crate) mod example {
    use uuid::{Uuid, uuid};

    use super::{
        ApiKeyId, AuditEventId, PlanId, QuotaAlertId, ServiceTokenId, SessionId, TenantId, UserId,
        WebhookDeliveryId, WebhookId,
    };
    use crate::time::Timestamp;

    pub(crate) fn plan() -> PlanId {
        PlanId(uuid!("019ab4e1-7c00-7000-8000-0000000000a1"))
    }
    pub(crate) fn api_key() -> ApiKeyId {
        ApiKeyId(uuid!("019ab4e1-7c00-7000-8000-0000000000b1"))
    }
    pub(crate) fn tenant() -> TenantId {
        TenantId(uuid!("019ab4e1-7c00-7000-8000-0000000000c1"))
    }
    pub(crate) fn user() -> UserId {
        UserId(uuid!("019ab4e1-7c00-7000-8000-0000000000d1"))
    }
    pub(crate) fn service_token() -> ServiceTokenId {
        ServiceTokenId(uuid!("019ab4e1-7c00-7000-8000-0000000000e1"))
    }
    pub(crate) fn session() -> SessionId {
        SessionId(uuid!("019ab4e1-7c00-7000-8000-0000000000f1"))
    }
    pub(crate) fn audit_event() -> AuditEventId {
        AuditEventId(uuid!("019ab4e1-7c00-7000-8000-000000000101"))
    }
    pub(crate) fn webhook() -> WebhookId {
        WebhookId(uuid!("019ab4e1-7c00-7000-8000-000000000111"))
    }
    pub(crate) fn webhook_delivery() -> WebhookDeliveryId {
        WebhookDeliveryId(uuid!("019ab4e1-7c00-7000-8000-000000000121"))
    }
    pub(crate) fn quota_alert() -> QuotaAlertId {
        QuotaAlertId(uuid!("019ab4e1-7c00-7000-8000-000000000131"))
    }
    pub(crate) fn decision() -> Uuid {
        uuid!("019ab4e1-7c00-7000-8000-000000000201")
    }
    pub(crate) fn at() -> Timestamp {
        Timestamp::from_unix_secs(1_785_738_360).expect("a time in 2026")
    }
    /// The checksum is wrong on purpose, so that no server accepts this key.
    pub(crate) const KEY_TEXT: &str = "qk_00000000000000000000000000000000EXAMPL";
    pub(crate) const SERVICE_TOKEN_TEXT: &str = "qs_00000000000000000000000000000000EXAMPL";
}
