//! The state of the host that runs the console. The host is the desktop app or a browser; a browser has no state.
//!
//! The desktop app stores sessions in a keychain, can connect to several servers, and shows previously loaded data
//! while a server is unreachable. This module holds the last reported state; `servers` displays it.

#[cfg_attr(feature = "desktop", path = "desktop.rs")]
#[cfg_attr(not(feature = "desktop"), path = "browser.rs")]
mod current;

pub use current::*;
