//! Tracks polls for invalidations, changes to rows, and whether PostgreSQL responds.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use tokio::sync::watch;

use super::changes::{Changes, Owner};
use crate::clock::{Clock, Monotonic, Nanos};

/// How long a loaded entry is valid without a recent poll.
const TTL: Nanos = Nanos::from_secs(1);
/// How long all entries are valid after the last poll. Polls are 150 ms apart.
const POLL_FRESH: Nanos = Nanos::from_millis(750);

/// Shared by all caches.
#[derive(Debug)]
pub struct Freshness {
    clock: Arc<dyn Clock>,
    /// Monotonic time at which the last successful poll *began*, plus one; 0 if no poll has succeeded.
    polled_at: AtomicU64,
    /// Incremented by every invalidation, so that the results of loads that are in progress at that time are not kept.
    generation: AtomicU64,
    changes: Changes,
    /// The number of calls to [`changed`](Self::changed) that affect API keys and have added all their owners to
    /// `changes`.
    recorded: AtomicU64,
    suspected: watch::Sender<bool>,
}

impl Freshness {
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self {
            clock,
            polled_at: AtomicU64::new(0),
            generation: AtomicU64::new(0),
            changes: Changes::default(),
            recorded: AtomicU64::new(0),
            suspected: watch::Sender::new(false),
        }
    }

    /// Records that PostgreSQL is suspected to be unreachable. Returns `false` if PostgreSQL was already suspected.
    pub fn suspect(&self) -> bool {
        self.suspected
            .send_if_modified(|suspected| !std::mem::replace(suspected, true))
    }

    /// Records that PostgreSQL has responded.
    pub(super) fn reached(&self) {
        self.suspected.send_if_modified(std::mem::take);
    }

    pub fn is_suspect(&self) -> bool {
        *self.suspected.borrow()
    }

    /// Waits until PostgreSQL is suspected to be unreachable.
    pub(super) async fn suspected(&self) {
        let mut suspected = self.suspected.subscribe();
        // Waiting cannot fail, because `self` owns the sender.
        let _ = suspected.wait_for(|suspected| *suspected).await;
    }

    pub fn now(&self) -> Monotonic {
        self.clock.monotonic()
    }

    /// Records that a poll has applied all changes made before `began`.
    pub fn polled(&self, began: Monotonic) {
        self.polled_at.fetch_max(began.0 + 1, Ordering::AcqRel);
        self.reached();
    }

    /// Returns the time at which an entry loaded at `loaded_at` was last confirmed.
    pub(super) fn confirmed_at(&self, loaded_at: Monotonic) -> Monotonic {
        self.polled_at().map_or(loaded_at, |at| loaded_at.max(at))
    }

    /// Returns the time at which the last successful poll began.
    fn polled_at(&self) -> Option<Monotonic> {
        let at = self.polled_at.load(Ordering::Acquire).checked_sub(1)?;
        Some(Monotonic(at))
    }

    /// Returns the time at which the last successful poll began, if that is recent enough for entries to be valid.
    pub fn polled_lately(&self) -> Option<Monotonic> {
        let polled = self.polled_at()?;
        (self.now().saturating_since(polled) <= POLL_FRESH).then_some(polled)
    }

    /// Invalidates the entries of all rows that belong to one of `owners`, and all loads in progress. The loads are
    /// invalidated first. Otherwise, a load that ends while `owners` is being iterated could store an outdated entry.
    pub fn changed(&self, owners: impl IntoIterator<Item = Owner>) {
        let owners = owners.into_iter();
        // Without owners, loads in progress remain valid. `owners` must not be iterated to find this out, see above.
        if owners.size_hint().1 == Some(0) {
            return;
        }
        let generation = self.next_generation();
        let mut affects_keys = false;
        for owner in owners {
            self.changes.add(owner, generation);
            affects_keys |= owner.has_keys();
        }
        if affects_keys {
            self.recorded.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Returns a number that is different after every call to [`changed`](Self::changed) that affects API keys, as soon
    /// as [`changes`](Self::changes) contains everything that the call adds.
    pub(super) fn recorded(&self) -> u64 {
        self.recorded.load(Ordering::Acquire)
    }

    /// Invalidates all loads in progress, and returns the new generation.
    pub(super) fn next_generation(&self) -> u64 {
        self.generation.fetch_add(1, Ordering::AcqRel) + 1
    }

    pub(super) fn changes(&self) -> &Changes {
        &self.changes
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn is_valid(&self, loaded_at: Monotonic, now: Monotonic) -> bool {
        let is_polled = |at| now.saturating_since(at) <= POLL_FRESH;
        self.polled_at().is_some_and(is_polled) || now.saturating_since(loaded_at) <= TTL
    }
}
