//! In a browser: nothing.

use leptos::prelude::*;

use crate::app::Session;

pub fn begin(show: impl FnOnce()) {
    show();
}

pub const fn watch(_session: Session) {}

pub const fn again() {}

#[component]
pub fn Banner() -> impl IntoView {}

#[component]
pub fn OtherServer() -> impl IntoView {}

#[component]
pub fn Servers() -> impl IntoView {}
