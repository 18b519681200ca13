//! `Idempotency-Key`: a request that is sent twice takes effect only once. If the first request succeeded, the second
//! response is the same as the first, but without secrets.

use poem::http::{HeaderMap, StatusCode};
use quota_common::ProblemCode;
use serde::{Serialize, de::DeserializeOwned};

use super::problem::ApiError;
use crate::{
    db::TenantTx,
    repo::idempotency::{self, PriorRequest},
};

const LENGTH_MAX: usize = 255;

/// A request that may already have been processed.
pub struct IdempotencyGuard {
    operation: &'static str,
    key: Option<String>,
    request_hash: Vec<u8>,
}

/// Rejects a key that is not valid text, because poem would treat it as missing. Also rejects a header that was sent
/// several times.
pub fn check_field(headers: &HeaderMap) -> Result<(), ApiError> {
    let mut fields = headers.get_all("idempotency-key").iter();
    match (fields.next(), fields.next()) {
        (Some(key), None) if key.to_str().is_err() => Err(ApiError::invalid(
            "Idempotency-Key",
            format!("must be 1–{LENGTH_MAX} printable ASCII characters"),
        )),
        (Some(_), Some(_)) => Err(ApiError::invalid(
            "Idempotency-Key",
            "must be sent only once",
        )),
        _ => Ok(()),
    }
}

impl IdempotencyGuard {
    /// Checks the key and hashes the body. `key` is the value of the `Idempotency-Key` header, if it was sent. `body`
    /// must contain everything that the response depends on. For an operation on an existing resource, this includes
    /// the resource's ID.
    pub fn new<T: Serialize>(
        operation: &'static str,
        key: Option<String>,
        body: &T,
    ) -> Result<Self, ApiError> {
        if let Some(key) = &key {
            let printable = key.bytes().all(|byte| (0x20..0x7f).contains(&byte));
            if key.is_empty() || key.len() > LENGTH_MAX || !printable {
                let message = format!("must be 1–{LENGTH_MAX} printable ASCII characters");
                return Err(ApiError::invalid("Idempotency-Key", message));
            }
        }
        // Hash the parsed body, so that the order of fields does not matter.
        let body = serde_json::to_vec(body).map_err(ApiError::internal)?;
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &body);
        Ok(Self {
            operation,
            key,
            request_hash: digest.as_ref().to_vec(),
        })
    }

    /// Returns the original response, if there is one. Otherwise, rejects other requests with the same key until the
    /// transaction ends. Must be the first call in the transaction.
    pub async fn replay<T: DeserializeOwned>(
        &self,
        tx: &mut TenantTx,
    ) -> Result<Option<T>, ApiError> {
        let Some(key) = &self.key else {
            return Ok(None);
        };
        match idempotency::claim(tx, self.operation, key).await? {
            PriorRequest::Nothing => Ok(None),
            PriorRequest::InProgress => Err(ApiError {
                retry_after: Some(std::time::Duration::from_secs(1)),
                ..ApiError::new(
                    ProblemCode::RequestInProgress,
                    "A request with this Idempotency-Key is still in progress.",
                )
            }),
            PriorRequest::Answered { request_hash, .. } if request_hash != self.request_hash => {
                Err(ApiError::new(
                    ProblemCode::IdempotencyMismatch,
                    "This Idempotency-Key was already used with a different request body. Use a new one.",
                ))
            }
            PriorRequest::Answered { response, .. } => serde_json::from_value(response)
                .map(Some)
                .map_err(ApiError::internal),
        }
    }

    /// Stores the response for replays. The response must not contain a secret.
    pub async fn keep<T: Serialize>(
        &self,
        tx: &mut TenantTx,
        status: StatusCode,
        answer: &T,
    ) -> Result<(), ApiError> {
        if let Some(key) = &self.key {
            let answer = serde_json::to_value(answer).map_err(ApiError::internal)?;
            let status = status.as_u16();
            idempotency::store(tx, self.operation, key, &self.request_hash, status, &answer)
                .await?;
        }
        Ok(())
    }
}
