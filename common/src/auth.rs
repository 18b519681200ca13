//! Accounts and sessions: registering, signing in, staying signed in.

use garde::Validate;
use serde::{Deserialize, Serialize};

use crate::{
    id::{SessionId, TenantId, UserId},
    patch::sent,
    time::Timestamp,
};

/// The shortest and longest password, in bytes of its NFC form.
pub const PASSWORD_BYTES: std::ops::RangeInclusive<usize> = 12..=256;
/// The longest email address (RFC 5321 4.5.3.1.3, less the angle brackets).
pub const EMAIL_MAX: usize = 254;

/// What a user may do in a tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(
    feature = "openapi",
    derive(poem_openapi::Enum),
    oai(rename_all = "snake_case")
)]
pub enum Role {
    Owner,
    Admin,
    Developer,
    Billing,
    Viewer,
}

impl Role {
    /// Plans, API keys and service tokens may be made, changed and deleted.
    pub const fn may_manage(self) -> bool {
        matches!(self, Self::Owner | Self::Admin | Self::Developer)
    }

    /// The tenant itself (its name, its time zone) may be changed.
    pub const fn may_administer(self) -> bool {
        matches!(self, Self::Owner | Self::Admin)
    }

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Owner => "owner",
            Self::Admin => "admin",
            Self::Developer => "developer",
            Self::Billing => "billing",
            Self::Viewer => "viewer",
        }
    }
}

/// A person who signs in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object))]
pub struct User {
    pub id: UserId,
    pub email: String,
    /// What the person is called; empty until set.
    pub name: String,
    pub created_at: Timestamp,
}

/// The account that a session acts for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object))]
pub struct Tenant {
    pub id: TenantId,
    pub name: String,
    /// The user's role in it.
    pub role: Role,
    /// The IANA time zone in which its daily and monthly quotas begin, such as `Europe/Berlin`.
    pub time_zone: String,
}

/// A new account: a user and a tenant of their own.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Validate)]
#[serde(deny_unknown_fields)]
#[cfg_attr(
    feature = "openapi",
    derive(poem_openapi::Object),
    oai(example, deny_unknown_fields)
)]
pub struct Register {
    #[garde(custom(crate::bounds::email))]
    #[cfg_attr(feature = "openapi", oai(validator(min_length = 3, max_length = 254)))]
    pub email: String,
    /// 12 to 256 bytes, any characters. Refused when it is easy to guess.
    #[garde(custom(crate::bounds::password))]
    #[cfg_attr(feature = "openapi", oai(validator(min_length = 1, max_length = 256)))]
    pub password: String,
    /// Default: the email's part before the `@`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[garde(inner(custom(crate::bounds::name)))]
    #[cfg_attr(
        feature = "openapi",
        oai(
            nullable,
            skip_serializing_if_is_none,
            validator(min_length = 1, max_length = 200)
        )
    )]
    pub tenant_name: Option<String>,
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Validate)]
#[serde(deny_unknown_fields)]
#[cfg_attr(
    feature = "openapi",
    derive(poem_openapi::Object),
    oai(example, deny_unknown_fields)
)]
pub struct Login {
    // Only what cannot be stored is refused here: whether the address is well formed is nobody's business
    // before the password was right.
    #[garde(length(chars, min = 1, max = EMAIL_MAX), custom(crate::bounds::no_nul))]
    #[cfg_attr(feature = "openapi", oai(validator(min_length = 1, max_length = 254)))]
    pub email: String,
    #[garde(length(chars, min = 1, max = 256))]
    #[cfg_attr(feature = "openapi", oai(validator(min_length = 1, max_length = 256)))]
    pub password: String,
    /// The `device_token` of an earlier sign-in, by which this device is recognized. Callers with cookies leave it
    /// out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[garde(inner(length(bytes, min = 1, max = 512)))]
    #[cfg_attr(
        feature = "openapi",
        oai(
            nullable,
            skip_serializing_if_is_none,
            validator(min_length = 1, max_length = 512)
        )
    )]
    pub device_token: Option<String>,
}

/// A refresh token, to be exchanged or ended.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Validate)]
#[serde(deny_unknown_fields)]
#[cfg_attr(
    feature = "openapi",
    derive(poem_openapi::Object),
    oai(example, deny_unknown_fields)
)]
pub struct Refresh {
    /// Left out by a caller whose tokens are in cookies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[garde(inner(length(chars, min = 1, max = 256)))]
    #[cfg_attr(
        feature = "openapi",
        oai(
            nullable,
            skip_serializing_if_is_none,
            validator(min_length = 1, max_length = 256)
        )
    )]
    pub refresh_token: Option<String>,
}

/// The tokens of a session.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object), oai(example))]
pub struct Tokens {
    /// Sent as `Authorization: Bearer`. A JWT (EdDSA). Absent when the caller asked for cookies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", oai(skip_serializing_if_is_none))]
    pub access_token: Option<String>,
    /// Exchanged at `POST /auth/refresh` for the next pair. Opaque; each works once. Absent when the caller asked
    /// for cookies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", oai(skip_serializing_if_is_none))]
    pub refresh_token: Option<String>,
    /// Seconds until the access token ends.
    pub expires_in: u32,
}

/// A session that was just begun.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object), oai(example))]
pub struct SignedIn {
    /// Sent as `Authorization: Bearer`. A JWT (EdDSA). Absent when the caller asked for cookies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", oai(skip_serializing_if_is_none))]
    pub access_token: Option<String>,
    /// Exchanged at `POST /auth/refresh` for the next pair. Opaque; each works once. Absent when the caller asked
    /// for cookies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", oai(skip_serializing_if_is_none))]
    pub refresh_token: Option<String>,
    /// Keep it, and send it with the next sign-in on this device: failed sign-ins of others do not slow down a known
    /// device. It is no credential. Absent when the caller asked for cookies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", oai(skip_serializing_if_is_none))]
    pub device_token: Option<String>,
    /// Seconds until the access token ends.
    pub expires_in: u32,
    pub user: User,
    pub tenant: Tenant,
}

/// The caller's own account.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object), oai(example))]
pub struct Me {
    pub user: User,
    pub tenant: Tenant,
    /// The session that asks.
    pub session_id: SessionId,
}

/// What changes about the caller's account. A field that is not sent stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, Validate)]
#[serde(deny_unknown_fields)]
#[cfg_attr(
    feature = "openapi",
    derive(poem_openapi::Object),
    oai(example, deny_unknown_fields)
)]
pub struct UpdateMe {
    /// What the person is called.
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
    /// The tenant's name. Owners and admins only.
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
    pub tenant_name: Option<String>,
    /// The IANA time zone of the tenant's quotas. Owners and admins only.
    #[serde(
        default,
        deserialize_with = "sent",
        skip_serializing_if = "Option::is_none"
    )]
    #[garde(inner(length(bytes, min = 1, max = 64)))]
    #[cfg_attr(
        feature = "openapi",
        oai(
            skip_serializing_if_is_none,
            validator(min_length = 1, max_length = 64)
        )
    )]
    pub time_zone: Option<String>,
}

/// A new password. Every other session of the user ends.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Validate)]
#[serde(deny_unknown_fields)]
#[cfg_attr(
    feature = "openapi",
    derive(poem_openapi::Object),
    oai(example, deny_unknown_fields)
)]
pub struct ChangePassword {
    #[garde(length(chars, min = 1, max = 256))]
    #[cfg_attr(feature = "openapi", oai(validator(min_length = 1, max_length = 256)))]
    pub current_password: String,
    /// 12 to 256 bytes, any characters. Refused when it is easy to guess.
    #[garde(custom(crate::bounds::password))]
    #[cfg_attr(feature = "openapi", oai(validator(min_length = 1, max_length = 256)))]
    pub new_password: String,
}

/// A session of the caller's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object), oai(example))]
pub struct Session {
    pub id: SessionId,
    /// Whether it is the one that asks.
    pub current: bool,
    /// What the client calls itself.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub user_agent: Option<String>,
    /// The address it was last refreshed from.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub ip: Option<String>,
    pub created_at: Timestamp,
    pub last_used_at: Timestamp,
    pub expires_at: Timestamp,
}

macro_rules! redacted_debug {
    ($($name:ident),+) => {$(
        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($name)).finish_non_exhaustive()
            }
        }
    )+};
}
redacted_debug!(Register, Login, Refresh, Tokens, SignedIn, ChangePassword);

#[cfg(feature = "openapi")]
mod examples {
    use poem_openapi::types::Example;

    use super::{
        ChangePassword, Login, Me, Refresh, Register, Role, Session, SignedIn, Tenant, Tokens,
        UpdateMe, User,
    };
    use crate::id::example;

    const ACCESS: &str = "eyJ0eXAiOiJhdCtqd3QiLCJhbGciOiJFZERTQSIsImtpZCI6IjAifQ.e30.c2lnbmF0dXJl";
    const DEVICE: &str =
        "AAAAAAAAAAAAAAAAAAAAAAAAAABqcCo4AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
    const REFRESH: &str = "qr_00000000000000000000000000000000EXAMPL";

    fn user() -> User {
        User {
            id: example::user(),
            email: "ada@example.com".into(),
            name: "Ada".into(),
            created_at: example::at(),
        }
    }

    fn tenant() -> Tenant {
        Tenant {
            id: example::tenant(),
            name: "Analytical Engines".into(),
            role: Role::Owner,
            time_zone: "UTC".into(),
        }
    }

    impl Example for Register {
        fn example() -> Self {
            Self {
                email: "ada@example.com".into(),
                password: "violet-harbour-quilt-93".into(),
                tenant_name: Some("Analytical Engines".into()),
            }
        }
    }

    impl Example for Login {
        fn example() -> Self {
            Self {
                email: "ada@example.com".into(),
                password: "violet-harbour-quilt-93".into(),
                device_token: Some(DEVICE.into()),
            }
        }
    }

    impl Example for Refresh {
        fn example() -> Self {
            Self {
                refresh_token: Some(REFRESH.into()),
            }
        }
    }

    impl Example for Tokens {
        fn example() -> Self {
            Self {
                access_token: Some(ACCESS.into()),
                refresh_token: Some(REFRESH.into()),
                expires_in: 900,
            }
        }
    }

    impl Example for SignedIn {
        fn example() -> Self {
            Self {
                access_token: Some(ACCESS.into()),
                refresh_token: Some(REFRESH.into()),
                device_token: Some(DEVICE.into()),
                expires_in: 900,
                user: user(),
                tenant: tenant(),
            }
        }
    }

    impl Example for Me {
        fn example() -> Self {
            Self {
                user: user(),
                tenant: tenant(),
                session_id: example::session(),
            }
        }
    }

    impl Example for UpdateMe {
        fn example() -> Self {
            Self {
                name: None,
                tenant_name: None,
                time_zone: Some("Europe/Berlin".into()),
            }
        }
    }

    impl Example for ChangePassword {
        fn example() -> Self {
            Self {
                current_password: "violet-harbour-quilt-93".into(),
                new_password: "seven orchards under frost".into(),
            }
        }
    }

    impl Example for Session {
        fn example() -> Self {
            Self {
                id: example::session(),
                current: true,
                user_agent: Some("Mozilla/5.0".into()),
                ip: Some("192.0.2.7".into()),
                created_at: example::at(),
                last_used_at: example::at(),
                expires_at: example::at(),
            }
        }
    }
}
