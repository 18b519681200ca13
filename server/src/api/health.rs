//! `/health`.

use poem::Result;
use poem_openapi::OpenApi;
use quota_common::health::Health;

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

#[OpenApi(prefix_path = "/health", tag = "Tag::Health")]
impl HealthApi {
    /// Liveness
    ///
    /// Returns 200 while the process runs. Does not check dependencies: restarting the server would not fix them.
    #[oai(path = "/live", method = "get", operation_id = "live")]
    async fn live(&self) -> Json<Health> {
        ok()
    }

    /// Readiness
    ///
    /// Returns 503 while PostgreSQL is unreachable, migrations are pending, or the server is stopping.
    #[oai(path = "/ready", method = "get", operation_id = "ready")]
    async fn ready(&self) -> Result<Json<Health>, ApiError> {
        if self.state.is_draining() {
            return Err(ApiError::unavailable("the server is stopping"));
        }
        match self.state.readiness.check().await {
            Readiness::Ready => Ok(ok()),
            Readiness::MigrationsPending => Err(ApiError::unavailable("migrations are pending")),
            Readiness::Unreachable(reason) => Err(ApiError::unavailable(&*reason)),
        }
    }
}
