//! State of the host that runs the console: the desktop app, or a browser, which has none.
//!
//! The desktop app keeps sessions in a keychain, knows several servers, and shows data it loaded earlier while a
//! server is unreachable. This module holds the last reported state; `servers` displays it.

#[cfg_attr(feature = "desktop", path = "desktop.rs")]
#[cfg_attr(not(feature = "desktop"), path = "browser.rs")]
mod current;

pub use current::*;
