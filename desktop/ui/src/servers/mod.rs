//! The desktop app's additions to the console: banners and a list of servers. A browser has no additions.

#[cfg_attr(feature = "desktop", path = "desktop.rs")]
#[cfg_attr(not(feature = "desktop"), path = "browser.rs")]
mod current;

pub use current::*;
