//! Lists, a page at a time.

use serde::{Deserialize, Serialize};

/// How many items a page holds when the caller does not say.
pub const DEFAULT_LIMIT: u32 = 20;
/// The most items a page holds.
pub const MAX_LIMIT: u32 = 100;

/// One page of a list, newest first where no other order was asked for.
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

/// An enum whose values stand in an address.
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

            /// As it stands in an address.
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
    /// In which order API keys are listed; `-` turns one around.
    #[derive(Default)]
    ApiKeyOrder {
        #[default]
        Newest = "-created_at",
        Oldest = "created_at",
        Name = "name",
        NameReversed = "-name",
        /// Those that were never used come last.
        LastUsed = "-last_used_at",
        /// Those that were never used come first.
        LeastRecentlyUsed = "last_used_at",
    }
);

in_address!(
    /// In which order plans are listed; `-` turns one around.
    #[derive(Default)]
    PlanOrder {
        #[default]
        Newest = "-created_at",
        Oldest = "created_at",
        Name = "name",
        NameReversed = "-name",
    }
);
