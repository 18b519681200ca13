//! The types of Quota's HTTP API, which the server and the console share.
//!
//! Defines the names, types, and bounds of fields. Bounds are [`garde::Validate`] rules: the server rejects requests
//! that violate a rule, and the console shows the same errors before it sends a request. With the `openapi` feature,
//! the types implement poem-openapi's traits. Without the feature, this crate has no framework dependencies and builds
//! for wasm32.

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
