//! The console in a browser, which has none of the desktop app's additions.

use leptos::prelude::*;

use crate::session::Session;

pub fn start(mount: impl FnOnce()) {
    mount();
}

pub const fn report_first_paint(_session: Session) {}

#[component]
pub fn Banners() -> impl IntoView {}

#[component]
pub fn ServerPicker() -> impl IntoView {}

#[component]
pub fn ServerSettings() -> impl IntoView {}
