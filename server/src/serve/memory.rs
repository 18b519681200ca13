//! How much memory the requests of connections occupy that have not authenticated, in all.
//!
//! An estimate: the bytes of request heads and bodies that have arrived and may still be held, and of responses that
//! wait for the socket, plus a fixed amount for each request on HTTP/2. Small amounts, such as those of most HTTP/1
//! requests, are left out.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Amounts up to this do not count.
pub(super) const SMALL: usize = 4 * 1024;

#[derive(Debug)]
pub(super) struct Memory {
    limit: usize,
    limit_of_one: usize,
    held: AtomicUsize,
}

impl Memory {
    pub(super) const fn new(limit: usize, limit_of_one: usize) -> Self {
        Self {
            limit,
            limit_of_one,
            held: AtomicUsize::new(0),
        }
    }

    /// What a connection held, and holds now.
    pub(super) fn change(&self, before: usize, now: usize) {
        if now >= before {
            self.held.fetch_add(now - before, Ordering::Relaxed);
        } else {
            self.held.fetch_sub(before - now, Ordering::Relaxed);
        }
    }

    /// The most that one connection may hold.
    pub(super) const fn of_one(&self) -> usize {
        self.limit_of_one
    }

    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    pub(super) fn is_exceeded(&self) -> bool {
        self.held.load(Ordering::Relaxed) > self.limit
    }

    /// Whether there is less left than there should be after some was freed, so that it is not freed again at once.
    pub(super) fn is_short(&self) -> bool {
        self.held.load(Ordering::Relaxed) > self.limit / 4 * 3
    }
}
