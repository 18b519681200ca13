//! Paginated lists.

use serde::{Deserialize, Serialize};

/// The default page size.
pub const DEFAULT_LIMIT: u32 = 20;
/// The largest page size.
pub const MAX_LIMIT: u32 = 100;

/// One page of a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object))]
pub struct Page<
    #[cfg(not(feature = "openapi"))] T,
    #[cfg(feature = "openapi")] T: poem_openapi::types::ParseFromJSON + poem_openapi::types::ToJSON,
> {
    /// The items of this page.
    pub items: Vec<T>,
    /// Pass as `cursor` to fetch the next page. `null` on the last page. Opaque.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub next_cursor: Option<String>,
    /// Number of items on all pages that match the filters.
    pub total: u64,
}

/// An enum whose values appear in a query string.
macro_rules! in_address {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
        #[cfg_attr(feature = "openapi", derive(poem_openapi::Enum))]
        pub enum $name {
            $($(#[$variant_doc])* #[serde(rename = $text)] #[cfg_attr(feature = "openapi", oai(rename = $text))] $variant,)+
        }

        impl $name {
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// Returns the value as it appears in a query string.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }

            pub fn of(text: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|it| it.as_str() == text)
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}
pub(crate) use in_address;

in_address!(
    /// Sort field; prefix with `-` for descending.
    #[derive(Default)]
    ApiKeyOrder {
        #[default]
        Newest = "-created_at",
        Oldest = "created_at",
        Name = "name",
        NameReversed = "-name",
        /// Keys that were never used come last.
        LastUsed = "-last_used_at",
        /// Keys that were never used come first.
        LeastRecentlyUsed = "last_used_at",
    }
);

in_address!(
    /// Sort field; prefix with `-` for descending.
    #[derive(Default)]
    PlanOrder {
        #[default]
        Newest = "-created_at",
        Oldest = "created_at",
        Name = "name",
        NameReversed = "-name",
    }
);
