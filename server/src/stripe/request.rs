//! Sends requests to Stripe.

use std::time::Duration;

use stripe::{IdempotencyKey, RequestStrategy, StripeError as ClientError};

use crate::spans::{self, SpanKind};

/// The maximum duration of a request. A request that timed out may have taken effect.
pub(super) const TIMEOUT: Duration = Duration::from_secs(10);

/// The API version of requests, and of webhook endpoints that Quota creates.
pub const API_VERSION: stripe_shared::ApiVersion = stripe_shared::version::VERSION;

/// Sends a request and parses the response. With an idempotency key, Stripe performs the request only once, even if it
/// is sent again.
macro_rules! send {
    ($stripe:expr, $request:expr) => {
        $crate::stripe::request::traced($request.build().customize().send(&$stripe.client)).await?
    };
    ($stripe:expr, $request:expr, $key:expr) => {
        $crate::stripe::request::traced(
            $request
                .build()
                .customize()
                .request_strategy($crate::stripe::request::idempotent($key))
                .send(&$stripe.client),
        )
        .await?
    };
}
pub(super) use send;

/// Sends a request to Stripe. If a traced request is being served, creates a span.
pub(super) async fn traced<T>(
    request: impl Future<Output = std::result::Result<T, ClientError>>,
) -> std::result::Result<T, ClientError> {
    let span = spans::child("Stripe request", SpanKind::Client);
    let sent = request.await;
    if let (Some(mut span), Err(_)) = (span, &sent) {
        // The reason is left out, because the error may contain the customer's data.
        span.fail("");
    }
    sent
}

pub(super) fn idempotent(key: &str) -> RequestStrategy {
    IdempotencyKey::new(key).map_or(RequestStrategy::Once, RequestStrategy::Idempotent)
}
