//! `/health`.

use std::time::Duration;

use poem::Result;
use poem_openapi::OpenApi;
use quota_common::{ProblemCode, health::Health};

use super::{Tag, json::Json, problem::ApiError};
use crate::{readiness::Readiness, state::AppState};

pub struct HealthApi {
    pub state: AppState,
}

fn ok() -> Json<Health> {
    Json(Health {
        status: "ok".into(),
        version: env!("CARGO_PKG_VERSION").into(),
    })
}

/// Returns the error response to probes while the server is stopping. It has no source and is therefore not logged,
/// because stopping is not a failure.
fn stopping() -> ApiError {
    ApiError {
        retry_after: Some(Duration::from_secs(1)),
        ..ApiError::new(ProblemCode::Unavailable, "The server is stopping.")
    }
}

#[OpenApi(prefix_path = "/health", tag = "Tag::Health")]
impl HealthApi {
    /// Liveness
    ///
    /// Returns 200 while the process runs. Does not check dependencies, because restarting the server would not fix
    /// them.
    #[oai(path = "/live", method = "get", operation_id = "live")]
    async fn live(&self) -> Json<Health> {
        ok()
    }

    /// Serving
    ///
    /// Returns 503 only while the server is stopping. Use this endpoint, not `/health/ready`, for load balancers and
    /// Kubernetes readiness probes: while PostgreSQL is unreachable, requests with keys that the server has cached
    /// still work.
    #[oai(path = "/serving", method = "get", operation_id = "serving")]
    async fn serving(&self) -> Result<Json<Health>, ApiError> {
        if self.state.is_draining() {
            return Err(stopping());
        }
        Ok(ok())
    }

    /// Readiness
    ///
    /// Returns 503 while PostgreSQL is unreachable, migrations are pending, or the server is stopping.
    #[oai(path = "/ready", method = "get", operation_id = "ready")]
    async fn ready(&self) -> Result<Json<Health>, ApiError> {
        if self.state.is_draining() {
            return Err(stopping());
        }
        match self.state.readiness.check().await {
            Readiness::Ready => Ok(ok()),
            Readiness::MigrationsPending => Err(ApiError::unavailable("migrations are pending")),
            Readiness::Unreachable(reason) => Err(ApiError::unavailable(&*reason)),
        }
    }
}
