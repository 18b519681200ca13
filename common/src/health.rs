//! Liveness and readiness.

use serde::{Deserialize, Serialize};

/// The server's health.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object), oai(example))]
pub struct Health {
    /// Always `ok`.
    pub status: String,
    /// The server's version, such as `0.1.0`.
    pub version: String,
}

#[cfg(feature = "openapi")]
mod examples {
    use poem_openapi::types::Example;

    use super::Health;

    impl Example for Health {
        fn example() -> Self {
            Self {
                status: "ok".into(),
                version: "0.1.0".into(),
            }
        }
    }
}
