//! The types of Quota's HTTP API, shared by the server and the console so that they cannot drift apart.
//!
//! Owns the names, shapes and bounds of fields. The bounds are [`garde::Validate`] rules: the server uses them to
//! reject requests, and the console to explain errors before sending. Does not depend on any framework: with the
//! `openapi` feature, the types describe themselves to poem-openapi; without it, they build for wasm32.

pub mod alert;
pub mod api_key;
pub mod audit;
pub mod auth;
pub mod billing;
pub mod bounds;
pub mod call;
pub mod decision;
pub mod field;
pub mod health;
pub mod id;
pub mod ipc;
pub mod json;
pub mod limit;
pub mod number;
pub mod page;
pub mod plan;
pub mod problem;
pub mod service_token;
pub mod time;
pub mod usage;
pub mod webhook;

mod patch;
mod wire;

pub use self::{
    id::{
        ApiKeyId, AuditEventId, PlanId, QuotaAlertId, ServiceTokenId, SessionId, TenantId, UserId,
        WebhookDeliveryId, WebhookId,
    },
    page::Page,
    patch::Patch,
    problem::{FieldError, Problem, ProblemCode},
    time::Timestamp,
    wire::Omittable,
};
