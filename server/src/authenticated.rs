//! Marks connections on which a valid API key or service token was sent. Handlers set the mark, and the listener then
//! stops counting the connection against its address.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// See the module. Clones share the mark.
#[derive(Debug, Clone, Default)]
pub struct Authenticated(Arc<AtomicBool>);

impl Authenticated {
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
