use serde::{Deserialize, Serialize};

use crate::{
    json::{FromJson, Invalid, Json},
    wire::text_enum,
};

pub const DEFAULT_LIMIT: u32 = 20;
pub const MAX_LIMIT: u32 = 100;

/// The server stops counting the items of a list at this number.
pub const TOTAL_MAX: u64 = 10_000;

/// One page of a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object))]
pub struct Page<
    #[cfg(not(feature = "openapi"))] T,
    #[cfg(feature = "openapi")] T: poem_openapi::types::ParseFromJSON + poem_openapi::types::ToJSON,
> {
    /// The items on this page.
    pub items: Vec<T>,
    /// Pass as `cursor` to fetch the next page. `null` on the last page. Opaque.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub next_cursor: Option<String>,
    /// Number of items that match the filters, across all pages. A total of 10,000 means 10,000 or more.
    pub total: u64,
}

impl<
    #[cfg(not(feature = "openapi"))] T: FromJson,
    #[cfg(feature = "openapi")] T: FromJson + poem_openapi::types::ParseFromJSON + poem_openapi::types::ToJSON,
> FromJson for Page<T>
{
    fn from_json(json: Json) -> Result<Self, Invalid> {
        let mut fields = json.fields()?;
        Ok(Self {
            items: fields.read("items")?,
            next_cursor: fields.read("next_cursor")?,
            total: fields.read("total")?,
        })
    }
}

text_enum! {
    /// Sort field; prefix with `-` for descending.
    #[derive(Default)]
    pub enum ApiKeyOrder {
        #[default]
        Newest = "-created_at",
        Oldest = "created_at",
        Name = "name",
        NameReversed = "-name",
        /// Keys that have never been used come last.
        LastUsed = "-last_used_at",
        /// Keys that have never been used come first.
        LeastRecentlyUsed = "last_used_at",
    }
}

text_enum! {
    /// Sort field; prefix with `-` for descending.
    #[derive(Default)]
    pub enum PlanOrder {
        #[default]
        Newest = "-created_at",
        Oldest = "created_at",
        Name = "name",
        NameReversed = "-name",
    }
}
