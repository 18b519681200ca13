//! `Idempotency-Key`: the same request sent twice is done once, and answered twice.

use quota_common::ProblemCode;
use serde::{Serialize, de::DeserializeOwned};

use super::problem::ApiError;
use crate::{
    db::TenantTx,
    repo::idempotency::{self, Known},
};

const LENGTH_MAX: usize = 255;

/// A request that may have been seen before.
pub struct Once {
    operation: &'static str,
    key: Option<String>,
    request_hash: Vec<u8>,
}

impl Once {
    /// `key`: the field, where it was sent.
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
        // Of what the body means: the same request is the same whatever the order of its fields.
        let body = serde_json::to_vec(body).map_err(ApiError::internal)?;
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &body);
        Ok(Self {
            operation,
            key,
            request_hash: digest.as_ref().to_vec(),
        })
    }

    /// The first answer, when there was one. To be asked first in the transaction that does the work.
    pub async fn replay<T: DeserializeOwned>(
        &self,
        tx: &mut TenantTx,
    ) -> Result<Option<T>, ApiError> {
        let Some(key) = &self.key else {
            return Ok(None);
        };
        match idempotency::claim(tx, self.operation, key).await? {
            Known::Nothing => Ok(None),
            Known::InProgress => Err(ApiError {
                retry_after: Some(std::time::Duration::from_secs(1)),
                ..ApiError::new(
                    ProblemCode::RequestInProgress,
                    "A request with this Idempotency-Key is still in progress.",
                )
            }),
            Known::Answered { request_hash, .. } if request_hash != self.request_hash => {
                Err(ApiError::new(
                    ProblemCode::IdempotencyMismatch,
                    "This Idempotency-Key was already used with a different request body. Use a new one.",
                ))
            }
            Known::Answered { response, .. } => serde_json::from_value(response)
                .map(Some)
                .map_err(ApiError::internal),
        }
    }

    /// Keeps the answer, in the same transaction. It must hold no secret.
    pub async fn keep<T: Serialize>(&self, tx: &mut TenantTx, answer: &T) -> Result<(), ApiError> {
        if let Some(key) = &self.key {
            let answer = serde_json::to_value(answer).map_err(ApiError::internal)?;
            idempotency::store(tx, self.operation, key, &self.request_hash, 201, &answer).await?;
        }
        Ok(())
    }
}
