//! State of the host that runs the console: a browser, which has none, or the desktop app.
//!
//! The desktop app keeps sessions in a keychain, knows several servers, and shows data it loaded earlier while a
//! server is unreachable. This module holds what it reported last; `servers` displays it.

#[cfg(not(feature = "desktop"))]
mod browser;
#[cfg(feature = "desktop")]
mod desktop;

#[cfg(not(feature = "desktop"))]
pub use browser::*;
#[cfg(feature = "desktop")]
pub use desktop::*;
