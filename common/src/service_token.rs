//! Service tokens: the credentials with which a tenant's gateways and middleware check requests.

use crate::{
    field::Name,
    id::ServiceTokenId,
    time::Timestamp,
    wire::{Omittable, request, response},
};

response! {
    /// A service token. Its secret is returned only once, on creation, and is never stored.
    #[derive(Debug, Eq)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct ServiceToken {
        pub id: ServiceTokenId,
        pub name: String,
        /// The first characters of the token, which identify it without revealing it.
        pub prefix: String,
        /// When the token was last used. Updated within seconds of each use.
        pub last_used_at: Option<Timestamp>,
        pub created_at: Timestamp,
    }
}

request! {
    /// Request body for creating a service token.
    #[derive(Debug)]
    pub struct CreateServiceToken {
        /// 1 to 200 characters.
        #[garde(dive)]
        pub name: Name,
    }
}

response! {
    /// A service token that has just been created, with its secret.
    #[derive(Eq)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct CreatedServiceToken {
        /// The full token: `qs_`, 32 random characters and a 6-character checksum. The token is returned only once and
        /// is never stored: a replay with the same `Idempotency-Key` omits the token.
        pub token: Omittable<String>,
        pub service_token: ServiceToken,
    }
}

impl std::fmt::Debug for CreatedServiceToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CreatedServiceToken")
            .field("service_token", &self.service_token)
            .finish_non_exhaustive()
    }
}

#[cfg(feature = "openapi")]
mod examples {
    use poem_openapi::types::Example;

    use super::{CreateServiceToken, CreatedServiceToken, ServiceToken};
    use crate::id::example;

    impl Example for ServiceToken {
        fn example() -> Self {
            Self {
                id: example::service_token(),
                name: "Edge gateway".into(),
                prefix: "qs_00000000".into(),
                last_used_at: None,
                created_at: example::at(),
            }
        }
    }

    impl Example for CreateServiceToken {
        fn example() -> Self {
            Self {
                name: "Edge gateway".into(),
            }
        }
    }

    impl Example for CreatedServiceToken {
        fn example() -> Self {
            Self {
                token: Some(example::SERVICE_TOKEN_TEXT.into()),
                service_token: ServiceToken::example(),
            }
        }
    }
}
