//! Macros that define the types in requests and responses. Each macro adds the attributes that serde, garde, and
//! poem-openapi need. The definition of a type lists only its fields, their descriptions, and which fields have bounds
//! (`#[garde(dive)]`).

/// A response field that is omitted from JSON if it is `None`. A plain `Option` becomes `null`.
pub type Omittable<T> = Option<T>;

/// Defines a request body, with attributes for each type of field. Unknown fields are rejected.
macro_rules! body {
    ([$($rule:tt)+] $($item:tt)+) => {
        #[serde_with::apply($($rule)+)]
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
pub(crate) use body;

/// Defines the body of a POST request. Fields of type `Option` may be omitted or `null`.
macro_rules! request {
    ($($item:tt)+) => {
        $crate::wire::body! {
            [
                Option =>
                    #[serde(default, skip_serializing_if = "Option::is_none")]
                    #[cfg_attr(feature = "openapi", oai(nullable, skip_serializing_if_is_none))],
            ]
            $($item)+
        }
    };
}
pub(crate) use request;

/// Defines the body of a PATCH request. Omitted fields remain unchanged. Fields of type [`Patch`](crate::Patch) may be
/// `null`; fields of type `Option` may not.
macro_rules! update {
    ($($item:tt)+) => {
        $crate::wire::body! {
            [
                _ =>
                    #[serde(
                        default,
                        deserialize_with = "crate::patch::sent",
                        skip_serializing_if = "crate::patch::unsent"
                    )],
                Option => #[cfg_attr(feature = "openapi", oai(skip_serializing_if_is_none))],
                Patch => #[cfg_attr(feature = "openapi", oai(nullable, skip_serializing_if_is_none))],
            ]
            #[derive(Debug, Default)]
            $($item)+
        }
    };
}
pub(crate) use update;

/// Defines a response or a part of a response. A field of type `Option` is `null` if it is `None`; a field of type
/// [`Omittable`] is omitted.
macro_rules! response {
    ($(#[$attribute:meta])* pub struct $name:ident {
        $($(#[$field_attribute:meta])* pub $field:ident: $type:ty,)+
    }) => {
        #[serde_with::apply(
            Option => #[cfg_attr(feature = "openapi", oai(nullable))],
            Omittable =>
                #[serde(default, skip_serializing_if = "Option::is_none")]
                #[cfg_attr(feature = "openapi", oai(skip_serializing_if_is_none))],
        )]
        #[derive(Clone, PartialEq, serde::Serialize, serde::Deserialize)]
        #[cfg_attr(feature = "openapi", derive(poem_openapi::Object))]
        $(#[$attribute])*
        pub struct $name {
            $($(#[$field_attribute])* pub $field: $type,)+
        }

        impl crate::json::FromJson for $name {
            fn from_json(json: crate::json::Json) -> Result<Self, crate::json::Invalid> {
                let mut fields = json.fields()?;
                Ok(Self {
                    $($field: fields.read(stringify!($field))?,)+
                })
            }
        }
    };
}
pub(crate) use response;

/// Defines an enum that is represented as a string in JSON, query strings, and the database.
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

            pub fn of(text: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|it| it.as_str() == text)
            }
        }

        impl crate::json::FromJson for $name {
            fn from_json(json: crate::json::Json) -> Result<Self, crate::json::Invalid> {
                Self::of(&json.string()?).ok_or(crate::json::Invalid)
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
