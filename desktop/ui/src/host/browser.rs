//! The host if the console runs in a browser. It has no state.

/// Whether users can sign out while the server is unreachable. They cannot, because scripts cannot delete the session's
/// HTTP-only cookies.
pub const SIGNS_OUT_LOCALLY: bool = false;

pub const fn track_retries() {}

pub const fn is_offline() -> bool {
    false
}

/// Does nothing: a browser asks the user before it closes a page that shows a new secret.
pub fn on_quit(_warn: impl Fn() + 'static) {}

/// Whether new alerts are also shown as notifications of the operating system.
pub const NOTIFIES: bool = false;

/// Whether Stripe pages open in another window. If so, the billing page waits for the user to return.
pub const OPENS_PAGES_OUTSIDE: bool = false;
