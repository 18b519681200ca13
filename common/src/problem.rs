//! Error responses in the format of RFC 9457, `application/problem+json`.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::{
    json::{FromJson, Invalid, Json},
    limit::PolicyName,
    wire::response,
};

pub const MEDIA_TYPE: &str = "application/problem+json";

/// An error response.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object), oai(example))]
pub struct Problem {
    /// A URL that identifies the error type and leads to a page that explains the error.
    #[serde(rename = "type")]
    #[cfg_attr(feature = "openapi", oai(rename = "type"))]
    pub kind: String,
    /// Short summary of the error type.
    pub title: String,
    /// The HTTP status code.
    pub status: u16,
    /// What went wrong with this request, and how to fix it.
    pub detail: String,
    /// The request's ID, which is also in the `X-Request-Id` header. Include this ID when you ask for help.
    pub request_id: String,
    /// The invalid fields.
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

impl FromJson for Problem {
    fn from_json(json: Json) -> Result<Self, Invalid> {
        let mut fields = json.fields()?;
        Ok(Self {
            kind: fields.read("type")?,
            title: fields.read("title")?,
            status: fields.read("status")?,
            detail: fields.read("detail")?,
            request_id: fields.read("request_id")?,
            errors: fields.read::<Option<_>>("errors")?.unwrap_or_default(),
            violated_policies: fields
                .read::<Option<_>>("violated-policies")?
                .unwrap_or_default(),
        })
    }
}

response! {
    /// An invalid field.
    #[derive(Debug, Eq)]
    pub struct FieldError {
        /// The field's path in the body, such as `default_rpm`, or the parameter's name.
        pub field: String,
        /// What is wrong with the field, such as `must be at least 1`.
        pub message: String,
    }
}

macro_rules! problems {
    ($($(#[doc = $doc:literal])+ $variant:ident = $slug:literal, $status:literal, $title:literal;)+) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum ProblemCode {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl ProblemCode {
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// Returns the last path segment of the error page's URL.
            pub const fn slug(self) -> &'static str {
                match self { $(Self::$variant => $slug),+ }
            }

            pub const fn status(self) -> u16 {
                match self { $(Self::$variant => $status),+ }
            }

            pub const fn title(self) -> &'static str {
                match self { $(Self::$variant => $title),+ }
            }

            /// Returns what the error means and how to fix it.
            pub const fn explanation(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc, "\n"),+)),+ }
            }
        }
    };
}

problems! {
    /// The request's JSON, query, headers or path could not be parsed. No changes were made. Fix what `detail`
    /// describes and retry.
    Malformed = "malformed", 400, "Malformed request";
    /// No API key, access token or service token was sent, or the credential is unknown, malformed, expired or
    /// inactive. The request does not count against any limit. Sign in again, or use an active key.
    Unauthorized = "unauthorized", 401, "Missing or invalid credentials";
    /// The email or password is incorrect. For security reasons, the response does not say which.
    WrongCredentials = "wrong-credentials", 401, "Incorrect email or password";
    /// The key is on a paid plan, and its tenant has no valid subscription. The request does not count against any
    /// limit. A user who may manage the tenant's billing has to subscribe or pay the outstanding invoice. After that,
    /// keys on paid plans work again within seconds.
    SubscriptionNeeded = "subscription-needed", 402, "Subscription required";
    /// Your role in the tenant does not allow this action, or a request with session cookies did not come from
    /// this server's own pages. `detail` contains the reason.
    Forbidden = "forbidden", 403, "Not allowed";
    /// Only the operator of this server can create accounts. Ask the operator for an account.
    RegistrationClosed = "registration-closed", 403, "Registration is closed";
    /// The tenant has reached a limit that the operator of this server has set; `detail` says which limit. Delete
    /// resources that you no longer need, or ask the operator for a higher limit.
    LimitReached = "limit-reached", 403, "Limit reached";
    /// The resource does not exist, or it belongs to another tenant. For security reasons, the response does not say
    /// which.
    NotFound = "not-found", 404, "Not found";
    /// The path exists but does not support this method. The `Allow` header lists the supported methods.
    MethodNotAllowed = "method-not-allowed", 405, "Method not allowed";
    /// The request body was not received in time. Send the request again.
    RequestTimeout = "request-timeout", 408, "Request timeout";
    /// API keys still use this plan; `detail` says how many. First move these keys to another plan, or delete them.
    PlanInUse = "plan-in-use", 409, "Plan still has keys";
    /// The tenant already has a plan with this name. Choose another name.
    NameTaken = "name-taken", 409, "Name already in use";
    /// An account with this email already exists. Sign in, or use another address.
    EmailTaken = "email-taken", 409, "Email already in use";
    /// The grace period of an earlier rotation has not ended; `detail` says when the previous secret expires. Another
    /// rotation would revoke the previous secret, because there can be only one. Wait until the previous secret has
    /// expired, or send `replace_previous: true`.
    PreviousKeyActive = "previous-key-active", 409, "Previous secret still active";
    /// Billing is off on this server: the operator has not connected the server to Stripe. Plans marked `paid` work
    /// like other plans.
    BillingOff = "billing-off", 409, "Billing is off";
    /// The tenant already has a subscription. Change or cancel the subscription in the customer portal.
    AlreadySubscribed = "already-subscribed", 409, "Already subscribed";
    /// The tenant has never started a subscription, so it has no access to the customer portal. Subscribe first.
    NotSubscribed = "not-subscribed", 409, "Not subscribed";
    /// A request with the same `Idempotency-Key` is still being processed. Retry after the number of seconds in
    /// `Retry-After` to get the response to that request.
    RequestInProgress = "request-in-progress", 409, "Request already in progress";
    /// The request body exceeds the server's limit. No changes were made. Send a smaller body.
    ContentTooLarge = "content-too-large", 413, "Request body too large";
    /// The request body must be sent as `application/json`.
    UnsupportedMediaType = "unsupported-media-type", 415, "Unsupported media type";
    /// One or more fields have invalid values; `errors` lists them. No changes were made.
    Invalid = "invalid", 422, "Validation failed";
    /// This `Idempotency-Key` was already used with a different request body. Use a new key for a new request.
    IdempotencyMismatch = "idempotency-mismatch", 422, "Idempotency-Key already used";
    /// The API key or its tenant has reached a rate limit or quota; `violated-policies` says which one. The request
    /// does not count against any limit. Retry after the number of seconds in `Retry-After`. If the `Retry-After`
    /// header is absent, the request costs more than the limit and can never be allowed.
    QuotaExceeded = "quota-exceeded", 429, "Rate limit or quota exceeded";
    /// Too many requests came from this address, for this account or from this tenant; `detail` contains the reason.
    /// Retry after the number of seconds in `Retry-After`.
    TooManyRequests = "too-many-requests", 429, "Too many requests";
    /// The request's headers exceed the server's limit. Send fewer or shorter headers.
    HeadersTooLarge = "headers-too-large", 431, "Request headers too large";
    /// Something went wrong on the server. The error was logged with `request_id`; quote this ID when you report the
    /// error.
    Internal = "internal", 500, "Internal server error";
    /// A dependency of the server is unavailable, or the server is starting or stopping. Retry after the number of
    /// seconds in `Retry-After`.
    Unavailable = "unavailable", 503, "Temporarily unavailable";
    /// Rate limits can't be checked right now, because the shared counters or the database can't be reached. The
    /// request does not count against any limit. Retry after the number of seconds in `Retry-After`. The status is 429
    /// if the server still enforces the plan's limits without the shared counters, but cannot allow this request. It is
    /// 503 if no limits can be checked.
    ReducedCapacity = "temporary-reduced-capacity", 503, "Temporarily reduced capacity";
    /// Usage can't be recorded right now, because the server's disk is full or read-only, or too much usage is waiting
    /// to be written to the database. Requests that can't be recorded are not allowed, and do not count against any
    /// limit. Retry after the number of seconds in `Retry-After`. Operators: free disk space in `QUOTA_DATA_DIR`, or
    /// find out why usage is not written to PostgreSQL.
    InsufficientStorage = "insufficient-storage", 503, "Usage can't be recorded";
}

impl ProblemCode {
    pub fn from_slug(slug: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|code| code.slug() == slug)
    }

    /// Returns the `type` URI. For error types registered with IANA (draft-ietf-httpapi-ratelimit-headers), this is the
    /// registered URI. For all others, it is the URL of a page on the server at `base`.
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
                detail: "default_rpm: must be at least 1".into(),
                request_id: "019ab4e1-7c00-7000-8000-000000000001".into(),
                errors: vec![FieldError {
                    field: "default_rpm".into(),
                    message: "must be at least 1".into(),
                }],
                violated_policies: vec![],
            }
        }
    }
}
