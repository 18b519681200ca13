//! The HTTP surface: who is let in, what is read, what is answered. One file for each noun.
//!
//! Knows no SQL: handlers call `repo` and what lies between. Every error becomes a
//! [`Problem`](quota_common::Problem) in [`problem`] and nowhere else. The caller is the first argument of
//! every handler and the body the last, in the order in which poem reads them: an anonymous caller never
//! reaches a parser.

pub mod admitted;
pub mod allow;
pub mod allowance;
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

/// How the operations are grouped in the document.
#[derive(poem_openapi::Tags)]
pub enum Tag {
    /// Accounts and sessions.
    Auth,
    /// Plans: what keys are held to.
    Plans,
    /// API keys: what consumers show.
    #[oai(rename = "API keys")]
    ApiKeys,
    /// Service tokens: what a tenant's own gateways show.
    #[oai(rename = "Service tokens")]
    ServiceTokens,
    /// Who changed what.
    Audit,
    /// Decisions on requests.
    Decisions,
    /// Whether the server is up.
    Health,
}
