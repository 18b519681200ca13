//! Large responses, which occupy memory until their client has read them.
//!
//! A client may take as long as it makes some progress. So each tenant, and all together, have only a few of them at a
//! time. Responses of static files occupy nothing and are not counted.

use poem::Response;

use super::{problem::ApiError, request_context::RequestContext};
use crate::tenant_places::{HeldUntilSent, TenantPlaces};

/// Bytes. Smaller ones are in the socket's buffer at once, or limited by the rate of requests.
const LARGE: usize = 64 * 1024;
const OF_TENANT: usize = 8;
const TOTAL: usize = 64;

/// Marks a response whose body is large.
#[derive(Debug, Clone, Copy)]
struct IsLarge;

/// The places for large responses of one server.
pub fn places() -> TenantPlaces {
    TenantPlaces::new(OF_TENANT, TOTAL)
}

/// Marks a response with a body of this length if that is large.
pub fn mark(response: &mut Response, length: usize) {
    if length > LARGE {
        response.extensions_mut().insert(IsLarge);
    }
}

/// Makes a large response to a tenant hold a place until it was sent. Fails if there is none.
pub fn hold(
    places: &TenantPlaces,
    context: &RequestContext,
    mut response: Response,
) -> Result<Response, ApiError> {
    if response.extensions().get::<IsLarge>().is_some()
        && let Some(tenant) = context.tenant()
    {
        let place = places.take(tenant).ok_or_else(|| {
            context.state.metrics.guard_refusals.inc();
            ApiError::too_many_reads()
        })?;
        let held = HeldUntilSent::from(place);
        response.extensions_mut().insert(held);
    }
    Ok(response)
}
