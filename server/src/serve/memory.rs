//! The memory used by the requests on all connections that have not authenticated and are not from a trusted proxy.
//!
//! The memory use is an estimate. It includes the bytes of request heads and bodies that may still be in memory, the
//! bytes of responses that wait for clients that have stopped reading, and a fixed amount per HTTP/2 request. Small
//! amounts are ignored, so most HTTP/1 requests do not count. Responses to clients that read slowly do not count
//! either: they would use up the limit, although no such client needs to be disconnected.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Amounts of up to this many bytes are ignored.
pub(super) const SMALL: usize = 4 * 1024;

fn change(total: &AtomicUsize, before: usize, now: usize) {
    if now >= before {
        total.fetch_add(now - before, Ordering::Relaxed);
    } else {
        total.fetch_sub(before - now, Ordering::Relaxed);
    }
}

#[derive(Debug)]
pub(super) struct Memory {
    limit: usize,
    limit_per_connection: usize,
    held: AtomicUsize,
    /// Like `held`, but includes connections that are closing, whose handlers may still be running.
    occupied: AtomicUsize,
}

impl Memory {
    pub(super) const fn new(limit: usize, limit_per_connection: usize) -> Self {
        Self {
            limit,
            limit_per_connection,
            held: AtomicUsize::new(0),
            occupied: AtomicUsize::new(0),
        }
    }

    /// Records that a connection that stays open used `before` bytes and now uses `now`.
    pub(super) fn change_held(&self, before: usize, now: usize) {
        change(&self.held, before, now);
    }

    /// Records that a connection, which may be closing, used `before` bytes and now uses `now`.
    pub(super) fn change_occupied(&self, before: usize, now: usize) {
        change(&self.occupied, before, now);
    }

    pub(super) const fn per_connection(&self) -> usize {
        self.limit_per_connection
    }

    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Returns whether to stop reading until memory has been freed.
    pub(super) fn is_backlogged(&self) -> bool {
        self.occupied.load(Ordering::Relaxed) > self.limit / 4 * 5
    }

    pub(super) fn is_exceeded(&self) -> bool {
        self.held.load(Ordering::Relaxed) > self.limit
    }

    /// Returns whether more memory has to be freed. Leaves a margin, so that the next request does not exceed the limit
    /// again.
    pub(super) fn is_short(&self) -> bool {
        self.held.load(Ordering::Relaxed) > self.limit / 4 * 3
    }
}
