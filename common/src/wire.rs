//! The kinds of JSON on the wire. Each macro adds what its kind needs of serde, garde and poem-openapi, so that a type
//! lists only its fields, their descriptions and which of them have bounds (`#[garde(dive)]`).

/// An optional field of a response that is left out of the JSON when it is `None`. A plain `Option` is `null`.
pub type Omittable<T> = Option<T>;

/// Defines the body of a request. Unknown fields are rejected. Fields of type `Option` can be omitted or `null`.
macro_rules! request {
    ($($item:tt)+) => {
        #[serde_with::apply(
            Option =>
                #[serde(default, skip_serializing_if = "Option::is_none")]
                #[cfg_attr(feature = "openapi", oai(nullable, skip_serializing_if_is_none))],
        )]
        #[derive(Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize, garde::Validate)]
        #[serde(deny_unknown_fields)]
        #[cfg_attr(
            feature = "openapi",
            derive(poem_openapi::Object),
            oai(example, deny_unknown_fields)
        )]
        $($item)+
    };
}
pub(crate) use request;

/// Defines the body of a PATCH request. Unknown fields are rejected, and omitted fields change nothing. Fields of type
/// `Option` cannot be `null`; fields of type [`Patch`](crate::Patch) can.
macro_rules! update {
    ($($item:tt)+) => {
        #[serde_with::apply(
            Option =>
                #[serde(default, deserialize_with = "crate::patch::sent", skip_serializing_if = "crate::patch::unsent")]
                #[cfg_attr(feature = "openapi", oai(skip_serializing_if_is_none))],
            Patch =>
                #[serde(default, deserialize_with = "crate::patch::sent", skip_serializing_if = "crate::patch::unsent")]
                #[cfg_attr(feature = "openapi", oai(nullable, skip_serializing_if_is_none))],
        )]
        #[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize, garde::Validate)]
        #[serde(deny_unknown_fields)]
        #[cfg_attr(
            feature = "openapi",
            derive(poem_openapi::Object),
            oai(example, deny_unknown_fields)
        )]
        $($item)+
    };
}
pub(crate) use update;

/// Defines a response, or a part of one. Fields of type `Option` are `null` when they are `None`; fields of type
/// [`Omittable`] are left out.
macro_rules! response {
    ($($item:tt)+) => {
        #[serde_with::apply(
            Option => #[cfg_attr(feature = "openapi", oai(nullable))],
            Omittable =>
                #[serde(default, skip_serializing_if = "Option::is_none")]
                #[cfg_attr(feature = "openapi", oai(skip_serializing_if_is_none))],
        )]
        #[derive(Clone, PartialEq, serde::Serialize, serde::Deserialize)]
        #[cfg_attr(feature = "openapi", derive(poem_openapi::Object))]
        $($item)+
    };
}
pub(crate) use response;

/// Defines an enum of texts: in JSON, in query strings and in the database.
macro_rules! text_enum {
    ($(#[$attribute:meta])* pub enum $name:ident {
        $($(#[$variant_attribute:meta])* $variant:ident = $text:literal,)+
    }) => {
        $(#[$attribute])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
        #[cfg_attr(feature = "openapi", derive(poem_openapi::Enum))]
        pub enum $name {
            $(
                $(#[$variant_attribute])*
                #[serde(rename = $text)]
                #[cfg_attr(feature = "openapi", oai(rename = $text))]
                $variant,
            )+
        }

        impl $name {
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }

            /// Returns the variant with this text.
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
pub(crate) use text_enum;
