//! What is around the console: a browser, which needs nothing of us, or the desktop app, which has servers to choose
//! from, keeps sessions, and shows what it had loaded while a server is away.

#[cfg(not(feature = "desktop"))]
#[path = "browser.rs"]
mod around;
#[cfg(feature = "desktop")]
#[path = "desktop.rs"]
mod around;

pub use around::*;
