//! What the desktop app adds to the console: its banners and its list of servers. In a browser, nothing.

#[cfg(not(feature = "desktop"))]
mod browser;
#[cfg(feature = "desktop")]
mod desktop;

#[cfg(not(feature = "desktop"))]
pub use browser::*;
#[cfg(feature = "desktop")]
pub use desktop::*;
