//! Lists, a page at a time.

use serde::{Deserialize, Serialize};

/// How many items a page holds when the caller does not say.
pub const DEFAULT_LIMIT: u32 = 20;
/// The most items a page holds.
pub const MAX_LIMIT: u32 = 100;

/// One page of a list, newest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object))]
pub struct Page<
    #[cfg(not(feature = "openapi"))] T,
    #[cfg(feature = "openapi")] T: poem_openapi::types::ParseFromJSON + poem_openapi::types::ToJSON,
> {
    /// The items of this page.
    pub items: Vec<T>,
    /// Sent back as `?cursor=` it answers the next page; `null` on the last one. Opaque.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub next_cursor: Option<String>,
    /// How many items all pages hold together, with the filters that were sent.
    pub total: u64,
}
