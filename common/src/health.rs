use crate::wire::response;

response! {
    /// The server's health.
    #[derive(Debug, Eq)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct Health {
        /// Always `ok`.
        pub status: String,
        /// The server's version, such as `0.1.0`.
        pub version: String,
    }
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
