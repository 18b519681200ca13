//! State of the host that runs the console: the desktop app, or a browser, which has none.
//!
//! The desktop app keeps sessions in a keychain, knows several servers, and shows data it loaded earlier while a
//! server is unreachable. This module holds the last reported state; `servers` displays it.

#[cfg(not(feature = "desktop"))]
mod browser;
#[cfg(feature = "desktop")]
mod desktop;

#[cfg(not(feature = "desktop"))]
pub use browser::*;
#[cfg(feature = "desktop")]
pub use desktop::*;
