//! Limits requests to `/auth`, `/admin` and `/billing` per client address, except webhooks from Stripe.

use poem::{Endpoint, Middleware, Request, Result};

use super::{problem::ApiError, request_context::RequestContext};
use crate::{
    client_guard::{ClientNetwork, ClientRateLimiter},
    state::{AppState, Services},
};

pub struct IpGuard {
    pub state: AppState,
    pub guard: fn(&Services) -> &ClientRateLimiter,
}

impl<E: Endpoint> Middleware<E> for IpGuard {
    type Output = Guarded<E>;

    fn transform(&self, inner: E) -> Guarded<E> {
        Guarded {
            inner,
            state: self.state.clone(),
            guard: self.guard,
        }
    }
}

pub struct Guarded<E> {
    inner: E,
    state: AppState,
    guard: fn(&Services) -> &ClientRateLimiter,
}

impl<E: Endpoint> Endpoint for Guarded<E> {
    type Output = E::Output;

    async fn call(&self, request: Request) -> Result<E::Output> {
        // A peer without an address is on this machine, and is not limited.
        if let Some(ip) = RequestContext::of(&request)?.ip
            && let Err(refused) = (self.guard)(&self.state).admit(ClientNetwork::address(ip))
        {
            self.state.metrics.guard_rejections.inc();
            return Err(ApiError::too_many(refused.retry_after).into());
        }
        self.inner.call(request).await
    }
}
