//! State of the host in the desktop app.

use leptos::prelude::*;
use quota_common::{Timestamp, ipc::HostStatus};

/// These signals are reference-counted, because they exist before the first page is mounted and outlive the last one.
struct Host {
    status: ArcRwSignal<Option<HostStatus>>,
    /// While the server is unreachable: when the data on the page was loaded.
    loaded_at: ArcRwSignal<Option<Timestamp>>,
    retries: ArcRwSignal<u32>,
}

thread_local! {
    static HOST: Host = Host {
        status: ArcRwSignal::new(None),
        loaded_at: ArcRwSignal::new(None),
        retries: ArcRwSignal::new(0),
    };
}

/// Whether signing out succeeds even when the server cannot be reached: the app holds the tokens and drops them.
pub const SIGNS_OUT_LOCALLY: bool = true;

pub fn status() -> ArcRwSignal<Option<HostStatus>> {
    HOST.with(|host| host.status.clone())
}

pub fn set_status(status: HostStatus) {
    HOST.with(|host| host.status.set(Some(status)));
}

/// Returns the address of the server in use.
pub fn server_address() -> String {
    status().with_untracked(|it| it.as_ref().map(|it| it.current.clone()).unwrap_or_default())
}

/// Returns when the data on the page was loaded, if the server is unreachable.
pub fn loaded_at() -> ArcRwSignal<Option<Timestamp>> {
    HOST.with(|host| host.loaded_at.clone())
}

/// Whether the server is known to be unreachable.
pub fn is_offline() -> bool {
    loaded_at().with_untracked(Option::is_some)
}

/// Records whether a response came from the server or was loaded earlier.
pub fn set_loaded_at(loaded_at: Option<Timestamp>) {
    HOST.with(|host| {
        if host.loaded_at.get_untracked() != loaded_at {
            host.loaded_at.set(loaded_at);
        }
    });
}

/// Reloads everything that called [`track_retries`].
pub fn retry() {
    HOST.with(|host| host.retries.update(|it| *it = it.wrapping_add(1)));
}

pub fn track_retries() {
    HOST.with(|host| host.retries.track());
}

/// Calls `warn` when the app is about to quit while a new secret is shown, until the caller's component is removed.
pub fn on_quit(warn: impl Fn() + 'static) {
    let listener = window_event_listener_untyped("quota-quit", move |_| warn());
    on_cleanup(move || listener.remove());
}

/// Whether Stripe pages open in another window, so that this page waits for the user to return.
pub const OPENS_PAGES_OUTSIDE: bool = true;
