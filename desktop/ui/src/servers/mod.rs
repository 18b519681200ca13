//! The desktop app's additions to the console: banners and a list of servers. Empty in a browser.

#[cfg(not(feature = "desktop"))]
mod browser;
#[cfg(feature = "desktop")]
mod desktop;

#[cfg(not(feature = "desktop"))]
pub use browser::*;
#[cfg(feature = "desktop")]
pub use desktop::*;
