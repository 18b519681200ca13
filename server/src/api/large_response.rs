//! Large responses, which occupy memory until their client has read them.
//!
//! A client that makes some progress can take as long as it likes, so the number of unread large responses is limited,
//! for each tenant and in total. Static files are not counted, because serving them takes no additional memory.

use poem::Response;

use super::{problem::ApiError, request_context::RequestContext};
use crate::tenant_places::{HeldUntilSent, TenantPlaces};

/// The size in bytes above which a response is large. Smaller responses fit in the socket's buffer, or are limited by
/// the request rate.
const LARGE: usize = 64 * 1024;
const OF_TENANT: usize = 8;
const TOTAL: usize = 64;

/// Marks a response whose body is large.
#[derive(Debug, Clone, Copy)]
struct IsLarge;

/// Returns the places for large responses on one replica.
pub fn places() -> TenantPlaces {
    TenantPlaces::new(OF_TENANT, TOTAL)
}

/// Marks a response with a body of this length, if it is large.
pub fn mark(response: &mut Response, length: usize) {
    if length > LARGE {
        response.extensions_mut().insert(IsLarge);
    }
}

/// Reserves a place for a tenant's large response until it has been sent. Fails if no place is available.
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
