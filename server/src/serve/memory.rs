//! How much memory the requests of connections occupy that have not authenticated, in all.
//!
//! An estimate: the bytes of request heads and bodies that have arrived and may still be held, and of responses that
//! wait for the socket, plus a fixed amount for each request on HTTP/2. Small amounts, such as those of most HTTP/1
//! requests, are left out.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Amounts up to this do not count.
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
    limit_of_one: usize,
    held: AtomicUsize,
    /// Like `held`, with connections that were told to close: their handlers end a moment later.
    occupied: AtomicUsize,
}

impl Memory {
    pub(super) const fn new(limit: usize, limit_of_one: usize) -> Self {
        Self {
            limit,
            limit_of_one,
            held: AtomicUsize::new(0),
            occupied: AtomicUsize::new(0),
        }
    }

    /// What a connection that stays open held, and holds now.
    pub(super) fn change_held(&self, before: usize, now: usize) {
        change(&self.held, before, now);
    }

    /// What a connection occupied, and occupies now.
    pub(super) fn change_occupied(&self, before: usize, now: usize) {
        change(&self.occupied, before, now);
    }

    /// The most that one connection may hold.
    pub(super) const fn of_one(&self) -> usize {
        self.limit_of_one
    }

    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Whether so much is still to be freed that nothing more should be read.
    pub(super) fn is_backlogged(&self) -> bool {
        self.occupied.load(Ordering::Relaxed) > self.limit / 4 * 5
    }

    pub(super) fn is_exceeded(&self) -> bool {
        self.held.load(Ordering::Relaxed) > self.limit
    }

    /// Whether there is less left than there should be after some was freed, so that it is not freed again at once.
    pub(super) fn is_short(&self) -> bool {
        self.held.load(Ordering::Relaxed) > self.limit / 4 * 3
    }
}
