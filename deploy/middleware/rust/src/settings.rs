//! Settings of the layer.

use std::{fmt, sync::Arc};

use http::request::Parts;

use crate::denial_cache::DenialCache;

/// What happens to a request if Quota cannot be reached in time.
///
/// With either setting, the check may have consumed tokens: for example, if it timed out after Quota had received it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnUnavailable {
    /// The response is 503.
    Deny,
    /// The request is passed on with [`Code::Unchecked`](crate::Code::Unchecked), and its response has the header
    /// `X-Quota-Degraded: unchecked`.
    ///
    /// Neither the limits nor the API key have been checked: until Quota can be reached again, any key is accepted,
    /// including keys that were never issued. Requests without a key are still rejected. So are requests that Quota
    /// itself refuses to decide, for example because their plan rejects requests while Redis is unreachable.
    Allow,
}

type OfRequest<T> = Arc<dyn Fn(&Parts) -> T + Send + Sync>;

pub(crate) struct Settings {
    pub(crate) on_unavailable: OnUnavailable,
    pub(crate) key: OfRequest<Option<String>>,
    pub(crate) cost: OfRequest<u32>,
    pub(crate) endpoint: OfRequest<Option<String>>,
    pub(crate) denials: Option<DenialCache>,
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("on_unavailable", &self.on_unavailable)
            .field("denials", &self.denials)
            .finish_non_exhaustive()
    }
}
