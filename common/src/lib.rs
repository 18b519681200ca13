//! The words on the wire: every request and answer of Quota's HTTP surface, shared by the server and the
//! console, so that neither can drift from the other.
//!
//! Owns names, shapes and the bounds of fields ([`garde::Validate`], used by the server to refuse and by
//! the console to explain before sending). Knows no framework: with feature `openapi` the same types
//! describe themselves to poem-openapi, without it they build for wasm32.

pub mod api_key;
pub mod audit;
pub mod auth;
pub mod call;
pub mod health;
pub mod id;
pub mod ipc;
pub mod limit;
pub mod page;
pub mod plan;
pub mod problem;
pub mod service_token;
pub mod time;

mod bounds;
mod patch;

pub use self::{
    id::{ApiKeyId, AuditEventId, PlanId, ServiceTokenId, SessionId, TenantId, UserId},
    page::Page,
    patch::Patch,
    problem::{FieldError, Problem, ProblemCode},
    time::Timestamp,
};
