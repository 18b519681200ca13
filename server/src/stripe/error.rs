//! Why a request to Stripe failed, and whether it may have taken effect.

use stripe::StripeError as ClientError;

#[derive(Debug, thiserror::Error)]
pub enum StripeError {
    /// The request may have taken effect. It can be sent again with the same idempotency key.
    #[error("Stripe could not be reached, or its response was lost: {0}")]
    Unknown(String),
    /// Stripe failed, and the request may have taken effect. A request with the same idempotency key gets the same
    /// failure.
    #[error("Stripe returned status {status}: {message}")]
    Failed { status: u16, message: String },
    /// Stripe rejected the request. The request had no effect.
    #[error("Stripe rejected the request with status {status}: {message}")]
    Rejected { status: u16, message: String },
    /// The object does not exist, or exists only in Stripe's other mode (live or test). The request had no effect.
    #[error("{message}")]
    Missing {
        /// The parameter that contains the object's ID. `None` if the ID is in the path.
        param: Option<String>,
        message: String,
    },
}

impl StripeError {
    /// Returns whether the object in the request's path or parameters does not exist.
    pub const fn is_not_found(&self) -> bool {
        matches!(
            self,
            Self::Rejected { status: 404, .. } | Self::Missing { .. }
        )
    }

    /// Returns whether the customer in a parameter cannot be used, because it was [deleted](super::Stripe::is_deleted)
    /// or belongs to a different mode or account.
    pub fn is_missing_customer(&self) -> bool {
        matches!(self, Self::Missing { param: Some(param), .. } if param == "customer")
    }
}

impl From<ClientError> for StripeError {
    fn from(error: ClientError) -> Self {
        let (error, status) = match error {
            ClientError::Stripe(error, status) => (error, status),
            // `other` includes responses that are not JSON, such as a proxy's error page. After such a response, it is
            // unknown whether the request had an effect.
            other => return Self::Unknown(other.to_string()),
        };
        // Only the message is kept, because the rest of the error may contain customer input.
        let message = error.message.unwrap_or_default();
        let is_missing = error.code == Some(stripe_shared::ApiErrorsCode::ResourceMissing);
        match status {
            400 | 404 if is_missing => Self::Missing {
                param: error.param,
                message,
            },
            409 | 429 => Self::Unknown(message),
            500.. => Self::Failed { status, message },
            _ => Self::Rejected { status, message },
        }
    }
}

pub(super) type Result<T> = std::result::Result<T, StripeError>;
