//! Whether the server lives and may be sent work.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object))]
pub struct Health {
    /// `ok`.
    pub status: String,
    /// The version of the server, such as `0.1.0`.
    pub version: String,
}
