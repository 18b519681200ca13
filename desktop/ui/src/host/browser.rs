//! In a browser, there is no host state.

/// Whether signing out succeeds even when the server cannot be reached. A page cannot delete its session's
/// HTTP-only cookies.
pub const SIGNS_OUT_LOCALLY: bool = false;

pub const fn track_retries() {}

/// Whether the server is known to be unreachable.
pub const fn is_offline() -> bool {
    false
}

/// Does nothing: a browser asks the user before it closes a page that shows a new secret.
pub fn on_quit(_warn: impl Fn() + 'static) {}

/// Whether Stripe pages open in another window, so that this page waits for the user to return.
pub const OPENS_PAGES_OUTSIDE: bool = false;
