//! Limits the number of large responses that have not been sent completely, because such responses occupy memory.
//!
//! A client that keeps making progress can take as long as it wants, so the number of these responses is limited per
//! tenant and in total. Static files do not count, because serving them takes no additional memory.

use poem::Response;

use super::{problem::ApiError, request_context::RequestContext};
use crate::tenant_places::{HeldUntilSent, TenantPlaces};

/// Responses of more than this many bytes are large. Smaller responses fit in the socket's buffer, or their number is
/// limited by the request rate.
const LARGE: usize = 64 * 1024;
/// The maximum number of concurrent large responses per tenant.
const OF_TENANT: usize = 8;
/// The maximum number of concurrent large responses.
const TOTAL: usize = 64;

#[derive(Debug, Clone, Copy)]
struct IsLarge;

/// Returns the slots for large responses on one replica.
pub fn places() -> TenantPlaces {
    TenantPlaces::new(OF_TENANT, TOTAL)
}

/// Marks a response as large if `length`, the length of its body, exceeds [`LARGE`].
pub fn mark(response: &mut Response, length: usize) {
    if length > LARGE {
        response.extensions_mut().insert(IsLarge);
    }
}

/// Reserves a slot for a large response until the response has been sent. Fails if no slot is free.
pub fn hold(
    places: &TenantPlaces,
    context: &RequestContext,
    mut response: Response,
) -> Result<Response, ApiError> {
    if response.extensions().get::<IsLarge>().is_some()
        && let Some(tenant) = context.tenant()
    {
        let place = places.take(tenant).ok_or_else(|| {
            context.state.metrics.guard_rejections.inc();
            ApiError::too_many_reads()
        })?;
        let held = HeldUntilSent::from(place);
        response.extensions_mut().insert(held);
    }
    Ok(response)
}
