//! In a browser: nothing.

use leptos::prelude::*;

use crate::app::Session;

pub fn begin(show: impl FnOnce()) {
    show();
}

pub const fn watch(_session: Session) {}

pub const fn again() {}

/// Whether signing out is done also when the server cannot be told. A page cannot remove its session's cookies.
pub const SIGNS_OUT_ALONE: bool = false;

#[component]
pub fn Banner() -> impl IntoView {}

#[component]
pub fn OtherServer() -> impl IntoView {}

#[component]
pub fn Servers() -> impl IntoView {}
