//! In a browser, there is no host state.

/// Whether signing out succeeds even when the server cannot be reached. A page cannot delete its session's
/// HTTP-only cookies.
pub const SIGNS_OUT_LOCALLY: bool = false;

pub const fn track_retries() {}
