//! The HTTP API: authentication, requests, and responses. Each kind of resource has its own file.
//!
//! Contains no SQL: handlers call `repo`, directly or through other modules. Only [`problem`] converts errors to a
//! [`Problem`](quota_common::Problem). If a handler requires a caller, the caller is its first argument, and the body
//! is its last. poem extracts arguments in order, so these handlers never parse the body of an anonymous request. The
//! type of the caller determines which permission the handler requires; see [`tenant_rights`].

pub mod admitted;
pub mod alert;
pub mod allow;
pub mod allowance;
pub mod api_key;
pub mod audit;
pub mod auth;
pub mod billing;
pub mod browser;
pub mod change;
pub mod client_ip;
pub mod console;
mod content_coding;
pub mod creation;
pub mod credentials;
pub mod decision;
pub mod direct;
pub mod document;
pub mod fast_path;
pub mod fields;
mod fill_time;
pub mod grpc;
pub mod health;
pub mod idempotency;
pub mod ip_guard;
pub mod json;
pub mod key_limits;
pub mod large_response;
pub mod limit;
pub mod limit_headers;
pub mod page;
pub mod plan;
pub mod problem;
pub mod request_context;
pub mod request_log;
pub mod service_token;
mod static_file;
pub mod stats;
pub mod tenant_rights;
pub mod trace;
pub mod usage;
pub mod webhook;

/// Groups of operations in the OpenAPI document, in the order in which they are listed.
#[derive(poem_openapi::Tags)]
pub enum Tag {
    /// Check a key and consume its limits.
    #[oai(rename = "Rate limiting")]
    RateLimiting,
    /// Create, rotate, deactivate and delete API keys.
    #[oai(rename = "API keys")]
    ApiKeys,
    /// Sets of rate limits and quotas, which apply separately to each API key on a plan.
    Plans,
    /// Credentials your gateways and middleware use to call the check endpoints.
    #[oai(rename = "Service tokens")]
    ServiceTokens,
    /// The number of allowed and denied requests, and the reasons for denials.
    Usage,
    /// Quota alerts, and who receives them by email.
    Alerts,
    /// Endpoints to which events are sent, and the deliveries of these events.
    Webhooks,
    /// Subscribe, manage the subscription, and see its status and usage.
    Billing,
    /// Audit log of configuration changes and sign-ins.
    Audit,
    /// Sign in, and manage your account and sessions.
    Auth,
    /// Liveness and readiness probes.
    Health,
}
