//! Quota's console.
//!
//! One UI for two shells: it speaks the calls of [`quota_common::call`] through [`api`] and knows neither tokens
//! nor addresses. Everything but [`model`] needs a browser and is built for one alone.

// Without a browser the models are used by their tests alone.
#![cfg_attr(
    not(target_arch = "wasm32"),
    expect(dead_code, reason = "what uses it is built for browsers alone")
)]

#[cfg(target_arch = "wasm32")]
mod api;
#[cfg(target_arch = "wasm32")]
mod app;
#[cfg(target_arch = "wasm32")]
mod component;
mod model;
#[cfg(target_arch = "wasm32")]
mod page;
#[cfg(target_arch = "wasm32")]
mod preferences;
#[cfg(target_arch = "wasm32")]
mod route;
#[cfg(target_arch = "wasm32")]
mod shell;

#[cfg(target_arch = "wasm32")]
fn main() {
    console_error_panic_hook::set_once();
    shell::begin(|| leptos::mount::mount_to_body(app::App));
}

#[cfg(not(target_arch = "wasm32"))]
fn main() {
    eprintln!("The console runs in a browser: `cargo xtask run` serves it at /console.");
}
