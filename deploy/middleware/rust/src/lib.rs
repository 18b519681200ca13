//! A [`tower`](https://docs.rs/tower) layer that checks the rate limits of API keys with Quota, before requests reach
//! your service.
//!
//! ```no_run
//! use axum::{Router, routing::get};
//! use quota_tower::QuotaLayer;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let token = std::env::var("QUOTA_SERVICE_TOKEN")?;
//! let quota = QuotaLayer::builder("https://quota.example.com", &token).build()?;
//! let app: Router = Router::new()
//!     .route("/orders/{id}", get(|| async { "an order" }))
//!     .layer(quota);
//! # Ok(())
//! # }
//! ```
//!
//! A request that Quota allows reaches the service with a [`Decision`] in its extensions, and its response gets the
//! rate-limit headers. Any other request gets a response with problem details (RFC 9457): 401 if it has no valid API
//! key, 402 if the key's tenant has to subscribe, and 429 if a limit is reached. If Quota cannot be reached in time,
//! the response is 503, or the request is passed on unchecked: see [`OnUnavailable`].
//!
//! Once Quota may have received a check, the check is not repeated, because it may already have consumed tokens.

mod builder;
mod client;
mod decision;
mod denial_cache;
mod request;
mod response;
mod service;
mod settings;

pub use self::{
    builder::{BuildError, QuotaLayerBuilder},
    decision::{Code, Decision, LimitState},
    response::ResponseBody,
    service::{QuotaLayer, QuotaService},
    settings::OnUnavailable,
};
