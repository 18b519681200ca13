//! Accounts, roles and sessions.

use crate::{
    field::{Credential, DeviceToken, Email, LoginEmail, Name, NewPassword, TimeZoneName},
    id::{SessionId, TenantId, UserId},
    time::Timestamp,
    wire::{Omittable, request, response, text_enum, update},
};

text_enum! {
    /// A user's role in a tenant.
    pub enum Role {
        Owner = "owner",
        Admin = "admin",
        Developer = "developer",
        Billing = "billing",
        Viewer = "viewer",
    }
}

impl Role {
    /// Returns whether the role may read plans, API keys, service tokens, webhooks, alert settings, and the audit log.
    pub const fn may_read(self) -> bool {
        !matches!(self, Self::Billing)
    }

    /// Returns whether the role may read usage, decisions, and quota alerts.
    pub const fn may_read_usage(self) -> bool {
        matches!(
            self,
            Self::Owner | Self::Admin | Self::Developer | Self::Billing | Self::Viewer
        )
    }

    /// Returns whether the role may create, update and delete plans, API keys, service tokens and webhooks, and rotate
    /// API keys and webhook secrets.
    pub const fn may_manage(self) -> bool {
        matches!(self, Self::Owner | Self::Admin | Self::Developer)
    }

    /// Returns whether the role may read the subscription, subscribe, pay, and cancel the subscription.
    pub const fn may_bill(self) -> bool {
        matches!(self, Self::Owner | Self::Admin | Self::Billing)
    }

    /// Returns whether the role may update the tenant itself (name, time zone and alert settings).
    pub const fn may_administer(self) -> bool {
        matches!(self, Self::Owner | Self::Admin)
    }
}

response! {
    /// A user.
    #[derive(Debug, Eq)]
    pub struct User {
        pub id: UserId,
        pub email: String,
        /// Display name. Empty until the user sets it.
        pub name: String,
        pub created_at: Timestamp,
    }
}

response! {
    /// An account that owns plans, API keys and other resources. A session gives access to one tenant.
    #[derive(Debug, Eq)]
    pub struct Tenant {
        pub id: TenantId,
        pub name: String,
        /// The user's role in the tenant.
        pub role: Role,
        /// IANA time zone in which daily and monthly quotas reset, such as `Europe/Berlin`.
        pub time_zone: String,
    }
}

request! {
    /// Request body for creating an account.
    pub struct Register {
        #[garde(dive)]
        pub email: Email,
        /// 12 to 256 bytes. All characters are allowed. A password that is too easy to guess is rejected.
        #[garde(dive)]
        pub password: NewPassword,
        /// 1 to 200 characters. Default: the part of the email before the `@`.
        #[garde(dive)]
        pub tenant_name: Option<Name>,
    }
}

request! {
    /// Request body for signing in.
    pub struct Login {
        #[garde(dive)]
        pub email: LoginEmail,
        #[garde(dive)]
        pub password: Credential,
        /// The `device_token` of an earlier sign-in, which identifies a known device. Omit it if the tokens are in
        /// cookies.
        #[garde(dive)]
        pub device_token: Option<DeviceToken>,
    }
}

request! {
    /// Request body for refreshing an access token or signing out.
    pub struct Refresh {
        /// The refresh token. Omit it if the tokens are in cookies.
        #[garde(dive)]
        pub refresh_token: Option<Credential>,
    }
}

response! {
    /// A session's tokens.
    #[derive(Eq)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct Tokens {
        /// A JWT (EdDSA). Send it as `Authorization: Bearer <token>`. Absent if cookies were requested.
        pub access_token: Omittable<String>,
        /// An opaque token. Exchange it once at `POST /auth/refresh` for a new pair of tokens. Absent if cookies were
        /// requested.
        pub refresh_token: Omittable<String>,
        /// Seconds until the access token expires.
        pub expires_in: u32,
    }
}

response! {
    /// A new session, with its tokens.
    #[derive(Eq)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct SignedIn {
        /// A JWT (EdDSA). Send it as `Authorization: Bearer <token>`. Absent if cookies were requested.
        pub access_token: Omittable<String>,
        /// An opaque token. Exchange it once at `POST /auth/refresh` for a new pair of tokens. Absent if cookies were
        /// requested.
        pub refresh_token: Omittable<String>,
        /// Identifies this device. Send this token with the next sign-in, so that failed sign-ins from other devices do
        /// not delay your sign-in. The token is not a credential. Absent if cookies were requested.
        pub device_token: Omittable<String>,
        /// Seconds until the access token expires.
        pub expires_in: u32,
        pub user: User,
        pub tenant: Tenant,
    }
}

response! {
    /// The current user.
    #[derive(Debug, Eq)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct Me {
        pub user: User,
        pub tenant: Tenant,
        /// The session that made this request.
        pub session_id: SessionId,
    }
}

update! {
    /// Request body for updating the current user. Omitted fields are unchanged.
    pub struct UpdateMe {
        /// Display name, 1 to 200 characters.
        #[garde(dive)]
        pub name: Option<Name>,
        /// The tenant's name, 1 to 200 characters. Only owners and admins can change it.
        #[garde(dive)]
        pub tenant_name: Option<Name>,
        /// IANA time zone in which daily and monthly quotas reset, such as `Europe/Berlin`. Only owners and admins can
        /// change it.
        #[garde(dive)]
        pub time_zone: Option<TimeZoneName>,
    }
}

request! {
    /// Request body for changing the password.
    pub struct ChangePassword {
        #[garde(dive)]
        pub current_password: Credential,
        /// 12 to 256 bytes. All characters are allowed. A password that is too easy to guess is rejected.
        #[garde(dive)]
        pub new_password: NewPassword,
    }
}

response! {
    /// A session of the current user.
    #[derive(Debug, Eq)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct Session {
        pub id: SessionId,
        /// True for the session making this request.
        pub current: bool,
        /// The client's `User-Agent`.
        pub user_agent: Option<String>,
        /// The client's IP address at the last refresh, or at sign-in if the session has not been refreshed.
        pub ip: Option<String>,
        pub created_at: Timestamp,
        pub last_used_at: Timestamp,
        pub expires_at: Timestamp,
    }
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
