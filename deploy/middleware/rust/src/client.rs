//! Calls the check API.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use http::{HeaderValue, StatusCode, header};
use reqwest::{Response, Url};
use serde::Serialize;

use crate::decision::{CheckResponse, Decision};

pub(crate) const REQUEST_ID: &str = "x-request-id";
pub(crate) const DEGRADED: &str = "x-quota-degraded";

/// The maximum size of a response. Decisions are much smaller, but another server could send anything.
const MAX_BODY: usize = 64 * 1024;
/// The minimum time between two warnings.
const WARNING_INTERVAL: Duration = Duration::from_secs(10);

/// The body of a check request.
#[derive(Serialize)]
pub(crate) struct Check<'a> {
    pub(crate) key: &'a str,
    pub(crate) cost: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) endpoint: Option<String>,
}

/// The reason why there is no decision.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CheckError {
    #[error("no response from Quota")]
    Http(#[from] reqwest::Error),
    #[error("unexpected status {0} from Quota")]
    Status(StatusCode),
    /// Quota rejected the check as invalid. The consumer may have caused this error, so the request must not be passed
    /// on.
    #[error("Quota rejected the check with status {0}")]
    Invalid(StatusCode),
    /// The key's plan rejects all requests while Redis is unreachable.
    #[error("Quota cannot check this key's limits")]
    Closed,
    #[error("the response is not a decision by Quota")]
    NotADecision,
}

impl CheckError {
    /// Returns whether the request must not be passed on, even with
    /// [`OnUnavailable::Allow`](crate::OnUnavailable::Allow).
    pub(crate) fn is_final(&self) -> bool {
        matches!(self, Self::Invalid(_) | Self::Closed)
    }
}

/// Sends checks over persistent connections.
#[derive(Debug)]
pub(crate) struct Client {
    http: reqwest::Client,
    url: Url,
    authorization: HeaderValue,
    warnings: Warnings,
}

impl Client {
    pub(crate) fn new(http: reqwest::Client, url: Url, authorization: HeaderValue) -> Self {
        Self {
            http,
            url,
            authorization,
            warnings: Warnings::default(),
        }
    }

    /// Returns Quota's decision. `request_id` identifies the decision in Quota's log. If the ID is invalid, Quota
    /// chooses another.
    pub(crate) async fn check(
        &self,
        check: &Check<'_>,
        request_id: Option<&HeaderValue>,
    ) -> Result<Decision, CheckError> {
        let decision = self.send(check, request_id).await;
        if let Err(error) = &decision {
            self.warnings.warn(error);
        }
        decision
    }

    async fn send(
        &self,
        check: &Check<'_>,
        request_id: Option<&HeaderValue>,
    ) -> Result<Decision, CheckError> {
        let body = serde_json::to_vec(check).map_err(|_| CheckError::NotADecision)?;
        let mut request = self
            .http
            .post(self.url.clone())
            .header(header::AUTHORIZATION, self.authorization.clone())
            .header(header::CONTENT_TYPE, "application/json")
            .body(body);
        if let Some(id) = request_id {
            request = request.header(REQUEST_ID, id.clone());
        }
        let mut response = request.send().await?;
        let status = response.status();
        match status.as_u16() {
            200 => {}
            400 | 413 | 415 | 422 | 431 => return Err(CheckError::Invalid(status)),
            503 if response.headers().contains_key(DEGRADED) => return Err(CheckError::Closed),
            _ => return Err(CheckError::Status(status)),
        }
        let request_id = response.headers().get(REQUEST_ID).cloned();
        let answer: CheckResponse = serde_json::from_slice(&body_of(&mut response).await?)
            .map_err(|_| CheckError::NotADecision)?;
        answer
            .into_decision(request_id)
            .ok_or(CheckError::NotADecision)
    }
}

async fn body_of(response: &mut Response) -> Result<Vec<u8>, CheckError> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if body.len() + chunk.len() > MAX_BODY {
            return Err(CheckError::NotADecision);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// Limits how often failed checks are logged.
#[derive(Debug, Default)]
struct Warnings {
    /// The time of the last warning, and the number of failures since then.
    last: Mutex<Option<(Instant, u64)>>,
}

impl Warnings {
    fn warn(&self, error: &CheckError) {
        let now = Instant::now();
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let suppressed = match last.as_mut() {
            Some((at, suppressed)) if now.duration_since(*at) < WARNING_INTERVAL => {
                *suppressed += 1;
                return;
            }
            Some((_, suppressed)) => *suppressed,
            None => 0,
        };
        *last = Some((now, 0));
        drop(last);
        tracing::warn!(
            error = error as &dyn std::error::Error,
            suppressed,
            "cannot check rate limits"
        );
    }
}
