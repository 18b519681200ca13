//! In a browser, there is no host state.

/// Whether signing out succeeds even when the server cannot be reached. A page cannot delete its session's
/// HTTP-only cookies.
pub const SIGNS_OUT_LOCALLY: bool = false;

pub const fn track_retries() {}

/// Runs when the app is about to quit while a new secret is shown. A browser asks by itself.
pub fn on_quit(_warn: impl Fn() + 'static) {}

/// Whether Stripe pages open in another window, so that this page waits for the user to return.
pub const OPENS_PAGES_OUTSIDE: bool = false;
