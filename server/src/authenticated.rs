//! Information from handlers to the listener about the connection of a request.
//!
//! Handlers mark connections on which a valid API key or service token was sent. The listener then stops counting them
//! toward the limit of their address. Handlers also mark responses that continue as long as the client wants: such a
//! response may be idle, and the client is not late in reading it.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

/// See the module. Clones share the marks.
#[derive(Debug, Clone, Default)]
pub struct Authenticated(Arc<Marks>);

#[derive(Debug, Default)]
struct Marks {
    is_set: AtomicBool,
    endless_responses: AtomicUsize,
}

impl Authenticated {
    pub fn set(&self) {
        self.0.is_set.store(true, Ordering::Relaxed);
    }

    pub fn is_set(&self) -> bool {
        self.0.is_set.load(Ordering::Relaxed)
    }

    /// Marks a response as a stream without an end. The mark lasts until the returned value is dropped.
    pub fn begin_endless_response(&self) -> EndlessResponse {
        self.0.endless_responses.fetch_add(1, Ordering::Relaxed);
        EndlessResponse(Arc::clone(&self.0))
    }

    pub fn has_endless_response(&self) -> bool {
        self.0.endless_responses.load(Ordering::Relaxed) > 0
    }
}

/// A response without an end, while it is being sent.
#[derive(Debug)]
pub struct EndlessResponse(Arc<Marks>);

impl Drop for EndlessResponse {
    fn drop(&mut self) {
        self.0.endless_responses.fetch_sub(1, Ordering::Relaxed);
    }
}
