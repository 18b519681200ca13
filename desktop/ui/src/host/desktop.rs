//! The state of the desktop app.

use leptos::prelude::*;
use quota_common::ipc::{HostStatus, Stored};

/// The signals are reference-counted, because they exist before the first page is mounted and outlive the last page.
struct Host {
    status: ArcRwSignal<Option<HostStatus>>,
    /// Describes the data on the page. `None` if the server has just sent it.
    stored: ArcRwSignal<Option<Stored>>,
    retries: ArcRwSignal<u32>,
}

thread_local! {
    static HOST: Host = Host {
        status: ArcRwSignal::new(None),
        stored: ArcRwSignal::new(None),
        retries: ArcRwSignal::new(0),
    };
}

/// Whether users can sign out while the server is unreachable. They can, because the app can drop its tokens.
pub const SIGNS_OUT_LOCALLY: bool = true;

pub fn status() -> ArcRwSignal<Option<HostStatus>> {
    HOST.with(|host| host.status.clone())
}

pub fn set_status(status: HostStatus) {
    HOST.with(|host| host.status.set(Some(status)));
}

pub fn server_address() -> String {
    status().with_untracked(|it| it.as_ref().map(|it| it.current.clone()).unwrap_or_default())
}

/// Describes the data on the page. `None` if the server has just sent it.
pub fn stored() -> ArcRwSignal<Option<Stored>> {
    HOST.with(|host| host.stored.clone())
}

pub fn is_offline() -> bool {
    stored().with_untracked(Option::is_some)
}

/// Records where the last response came from. `stored` is `None` if the server sent the response.
pub fn set_stored(stored: Option<Stored>) {
    HOST.with(|host| {
        if host.stored.get_untracked() != stored {
            host.stored.set(stored);
        }
    });
}

/// Reruns everything that called [`track_retries`].
pub fn retry() {
    HOST.with(|host| host.retries.update(|it| *it = it.wrapping_add(1)));
}

pub fn track_retries() {
    HOST.with(|host| host.retries.track());
}

/// Calls `warn` if the user quits the app while a new secret is shown. Stops when the calling component is removed.
pub fn on_quit(warn: impl Fn() + 'static) {
    let listener = window_event_listener_untyped("quota-quit", move |_| warn());
    on_cleanup(move || listener.remove());
}

/// Whether new alerts are also shown as notifications of the operating system.
pub const NOTIFIES: bool = true;

/// Whether Stripe pages open in another window. If so, the billing page waits for the user to return.
pub const OPENS_PAGES_OUTSIDE: bool = true;
