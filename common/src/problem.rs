//! Errors on the wire: `application/problem+json` (RFC 9457).

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::limit::PolicyName;

/// The media type of every error.
pub const MEDIA_TYPE: &str = "application/problem+json";

/// An error, as a caller reads it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object), oai(example))]
pub struct Problem {
    /// Names the kind of error, and leads to a page about it.
    #[serde(rename = "type")]
    #[cfg_attr(feature = "openapi", oai(rename = "type"))]
    pub kind: String,
    /// The kind of error in a few words, the same for each of its kind.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What went wrong this time and what can be done about it.
    pub detail: String,
    /// The same as in the `X-Request-Id` header; name it when you ask for help.
    pub request_id: String,
    /// The fields that were refused.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "openapi", oai(default, skip_serializing_if_is_empty))]
    pub errors: Vec<FieldError>,
    /// The policies that denied the request.
    #[serde(
        rename = "violated-policies",
        default,
        skip_serializing_if = "Vec::is_empty"
    )]
    #[cfg_attr(
        feature = "openapi",
        oai(rename = "violated-policies", default, skip_serializing_if_is_empty)
    )]
    pub violated_policies: Vec<PolicyName>,
}

/// A field that was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object))]
pub struct FieldError {
    /// The field's path in the body, such as `default_rpm`, or the name of the parameter.
    pub field: String,
    pub message: String,
}

macro_rules! problems {
    ($($(#[doc = $doc:literal])+ $variant:ident = $slug:literal, $status:literal, $title:literal;)+) => {
        /// Every kind of error there is.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum ProblemCode {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl ProblemCode {
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The last part of the address of the page about it.
            pub const fn slug(self) -> &'static str {
                match self { $(Self::$variant => $slug),+ }
            }

            pub const fn status(self) -> u16 {
                match self { $(Self::$variant => $status),+ }
            }

            pub const fn title(self) -> &'static str {
                match self { $(Self::$variant => $title),+ }
            }

            /// What it means and what to do about it.
            pub const fn explanation(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc, "\n"),+)),+ }
            }
        }
    };
}

problems! {
    /// The request could not be understood: its JSON, its query, a header or the path is malformed. Nothing
    /// was done. Mend what `detail` names and send it again.
    Malformed = "malformed", 400, "The request is malformed";
    /// No credential was sent, or it does not open anything: an API key, access token or service token
    /// that is unknown, malformed, expired or switched off. Nothing was charged. Sign in again, or use a
    /// key that is active.
    Unauthorized = "unauthorized", 401, "A valid credential is needed";
    /// The email or the password is wrong. Which of the two is not told.
    WrongCredentials = "wrong-credentials", 401, "The email or the password is wrong";
    /// The key's plan is a paid one and the tenant has no live subscription.
    SubscriptionNeeded = "subscription-needed", 402, "A subscription is needed";
    /// The caller is known and may not do this: the role in the tenant does not allow it.
    Forbidden = "forbidden", 403, "Not allowed";
    /// There is no such thing, or it is not the caller's. The two are not told apart.
    NotFound = "not-found", 404, "Not found";
    /// The path exists, the method on it does not. `Allow` lists those that do.
    MethodNotAllowed = "method-not-allowed", 405, "This method is not offered here";
    /// The request was not sent completely in the time that the server waits for one.
    RequestTimeout = "request-timeout", 408, "The request took too long to arrive";
    /// The plan still has keys. Move them to another plan or delete them first; `detail` tells how many.
    PlanInUse = "plan-in-use", 409, "The plan still has keys";
    /// A plan of this name exists already in the tenant.
    NameTaken = "name-taken", 409, "The name is taken";
    /// An account with this email exists already. Sign in, or use another address.
    EmailTaken = "email-taken", 409, "The email is taken";
    /// A request with the same `Idempotency-Key` is still being worked on. Wait for its answer.
    RequestInProgress = "request-in-progress", 409, "The same request is in progress";
    /// The body is larger than the server takes. Nothing of it was used.
    ContentTooLarge = "content-too-large", 413, "The body is too large";
    /// The body must be `application/json`.
    UnsupportedMediaType = "unsupported-media-type", 415, "The body must be JSON";
    /// The request was understood, and some of its fields have values that are not allowed. `errors` names
    /// each of them. Nothing was done.
    Invalid = "invalid", 422, "Some fields are not valid";
    /// The `Idempotency-Key` was used before with another body. Use a new one for a new request.
    IdempotencyMismatch = "idempotency-mismatch", 422, "The Idempotency-Key belongs to another request";
    /// A rate or a quota of the API key is used up. `violated-policies` names which; `Retry-After` tells after
    /// how many seconds the request would be admitted. Nothing was charged.
    QuotaExceeded = "quota-exceeded", 429, "A limit of the API key is reached";
    /// Too many requests came from this address, or for this account. `Retry-After` tells when to come back.
    TooManyRequests = "too-many-requests", 429, "Too many requests";
    /// The request's header fields are larger than the server takes.
    HeadersTooLarge = "headers-too-large", 431, "The header fields are too large";
    /// Something went wrong in the server. It was logged under `request_id`; nothing was charged.
    Internal = "internal", 500, "Internal error";
    /// Something that the server depends on does not answer, or it is starting or stopping. Nothing was lost;
    /// try again after the time that `Retry-After` tells.
    Unavailable = "unavailable", 503, "Temporarily unavailable";
    /// The server is degraded: it cannot check limits as usual, and admits only part of what it usually does. The
    /// limits of the API key may not be reached. The status is 429 when the server has used up its part, and 503 when it
    /// admits nothing. Try again after the time in `Retry-After`.
    ReducedCapacity = "temporary-reduced-capacity", 503, "Temporarily reduced capacity";
}

impl ProblemCode {
    pub fn from_slug(slug: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|code| code.slug() == slug)
    }

    /// The `type` of the problem: the registered one where IANA has one (draft-ietf-httpapi-ratelimit-headers),
    /// else a page of the server at `base`.
    pub fn type_uri(self, base: &str) -> Cow<'static, str> {
        match self {
            Self::QuotaExceeded => {
                Cow::Borrowed("https://iana.org/assignments/http-problem-types#quota-exceeded")
            }
            Self::ReducedCapacity => Cow::Borrowed(
                "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity",
            ),
            _ => format!("{}/problems/{}", base.trim_end_matches('/'), self.slug()).into(),
        }
    }
}

#[cfg(feature = "openapi")]
mod examples {
    use poem_openapi::types::Example;

    use super::{FieldError, Problem, ProblemCode};

    impl Example for Problem {
        fn example() -> Self {
            Self {
                kind: ProblemCode::Invalid
                    .type_uri("https://quota.example.com")
                    .into(),
                title: ProblemCode::Invalid.title().into(),
                status: 422,
                detail: "default_rpm: lower than 1".into(),
                request_id: "019ab4e1-7c00-7000-8000-000000000001".into(),
                errors: vec![FieldError {
                    field: "default_rpm".into(),
                    message: "lower than 1".into(),
                }],
                violated_policies: vec![],
            }
        }
    }
}
