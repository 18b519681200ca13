//! Reports from handlers to the listener about a request's connection.
//!
//! A handler reports that a valid API key or service token was sent on the connection. The listener then stops counting
//! the connection toward the limits for its address and network, and its memory toward the memory limit. Handlers also
//! announce endless responses, which continue as long as the client wants. An endless response may send only a few
//! bytes at a time, so for the listener's timeouts, any byte counts as progress. If an endless response has to end but
//! its client does not read it, the handler asks the listener to close the connection.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::Waker,
};

use futures_util::task::AtomicWaker;

/// The reports about one connection. Clones share the same reports.
#[derive(Debug, Clone, Default)]
pub struct ConnectionMarks(Arc<Marks>);

#[derive(Debug, Default)]
struct Marks {
    is_authenticated: AtomicBool,
    endless_responses: AtomicUsize,
    is_to_close: AtomicBool,
    waker: AtomicWaker,
}

impl ConnectionMarks {
    pub fn set_authenticated(&self) {
        self.0.is_authenticated.store(true, Ordering::Relaxed);
    }

    pub fn is_authenticated(&self) -> bool {
        self.0.is_authenticated.load(Ordering::Relaxed)
    }

    /// Reports that an endless response has begun. The response ends when the returned value is dropped.
    pub fn begin_endless_response(&self) -> EndlessResponse {
        self.0.endless_responses.fetch_add(1, Ordering::Relaxed);
        EndlessResponse(Arc::clone(&self.0))
    }

    pub fn has_endless_response(&self) -> bool {
        self.0.endless_responses.load(Ordering::Relaxed) > 0
    }

    /// Returns whether the handler of an endless response has asked to close the connection.
    pub fn is_to_close(&self) -> bool {
        self.0.is_to_close.load(Ordering::Acquire)
    }

    /// Sets the connection's task, which [`Self::wake`] wakes.
    pub fn register(&self, waker: &Waker) {
        self.0.waker.register(waker);
    }

    pub fn wake(&self) {
        self.0.waker.wake();
    }
}

/// An endless response that is being sent.
#[derive(Debug)]
pub struct EndlessResponse(Arc<Marks>);

impl EndlessResponse {
    /// Asks the listener to close the connection, which ends all responses on it.
    pub fn close_connection(&self) {
        self.0.is_to_close.store(true, Ordering::Release);
        self.0.waker.wake();
    }
}

impl Drop for EndlessResponse {
    fn drop(&mut self) {
        self.0.endless_responses.fetch_sub(1, Ordering::Relaxed);
    }
}
