//! Quota's console.
//!
//! The same UI runs in a browser and in the desktop app. The UI makes the calls in [`quota_common::call`] through
//! [`api`], which hides how requests are sent and where the session's tokens are stored. Every module except [`model`]
//! requires a browser and is compiled only for WebAssembly.
//!
//! A module imports only from modules on the lines above its own; `tests/source.rs` checks this.
//!
//! ```text
//! model                       values and texts, without a browser
//! clock host preferences      state that belongs to no page
//! reactive                    effects and memos
//! api route                   calls to the server; the page's URL
//! component                   building blocks of pages
//! session                     the signed-in account
//! servers                     the desktop app's list of servers and its banners
//! page                        one file per page or dialog
//! app                         the frame around all pages
//! ```

// On other targets, only tests use the models.
#![cfg_attr(
    not(target_arch = "wasm32"),
    expect(dead_code, reason = "used only when compiled for WebAssembly")
)]

#[cfg(target_arch = "wasm32")]
mod api;
#[cfg(target_arch = "wasm32")]
mod app;
#[cfg(target_arch = "wasm32")]
mod clock;
#[cfg(target_arch = "wasm32")]
mod component;
#[cfg(target_arch = "wasm32")]
mod host;
mod model;
#[cfg(target_arch = "wasm32")]
mod page;
#[cfg(target_arch = "wasm32")]
mod preferences;
#[cfg(target_arch = "wasm32")]
mod reactive;
#[cfg(target_arch = "wasm32")]
mod route;
#[cfg(target_arch = "wasm32")]
mod servers;
#[cfg(target_arch = "wasm32")]
mod session;

#[cfg(target_arch = "wasm32")]
fn main() {
    console_error_panic_hook::set_once();
    servers::start(|| leptos::mount::mount_to_body(app::App));
}

#[cfg(not(target_arch = "wasm32"))]
fn main() {
    eprintln!("The console runs in a browser. Start it with `cargo xtask run` and open /console.");
}
