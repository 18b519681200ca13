//! The HTTP surface: who is let in, what is read, what is answered. One file for each noun.
//!
//! Knows no SQL: handlers call `repo` and what lies between. Every error becomes a
//! [`Problem`](quota_common::Problem) in [`problem`] and nowhere else. The caller is the first argument of
//! every handler and the body the last, in the order in which poem reads them: an anonymous caller never
//! reaches a parser.

pub mod admitted;
pub mod allow;
pub mod api_key;
pub mod audit;
pub mod auth;
pub mod browser;
pub mod change;
pub mod client_ip;
pub mod console;
pub mod document;
pub mod health;
pub mod idempotency;
pub mod ip_guard;
pub mod json;
pub mod limit;
pub mod limit_headers;
pub mod page;
pub mod plan;
pub mod problem;
pub mod request_log;
pub mod service_token;
pub mod short_way;
pub mod tenant_rights;

/// Groups of operations in the OpenAPI document, in the order in which it lists them.
#[derive(poem_openapi::Tags)]
pub enum Tag {
    /// Check a key and consume its limits.
    #[oai(rename = "Rate limiting")]
    RateLimiting,
    /// Create, rotate, disable and delete API keys.
    #[oai(rename = "API keys")]
    ApiKeys,
    /// Rate limits and quotas shared by a group of keys.
    Plans,
    /// Credentials your gateways use to call the check endpoints.
    #[oai(rename = "Service tokens")]
    ServiceTokens,
    /// Audit log of configuration changes.
    Audit,
    /// Sign in, and manage your account and sessions.
    Auth,
    /// Liveness and readiness probes.
    Health,
}
