//! The table of replicas in PostgreSQL, and how each replica reads it.

use std::{num::NonZeroU64, time::Duration};

use parking_lot::Mutex;
use quota_server::{
    clock::Monotonic,
    limiter::{FORGOTTEN, Membership, REMEMBERED, ReplicaSlot},
};

#[derive(Debug)]
struct Row {
    replica: usize,
    joined_at: u64,
    seen_at: u64,
}

/// The rows of the table. Times are in nanoseconds.
#[derive(Debug, Default)]
pub(super) struct Registry(Mutex<Vec<Row>>);

impl Registry {
    /// Refreshes the row of a replica and counts the rows that were refreshed recently, like the server's background
    /// job.
    pub(super) fn count(&self, replica: usize, membership: &Membership, now: u64) {
        let mut rows = self.0.lock();
        match rows.iter_mut().find(|row| row.replica == replica) {
            Some(row) => row.seen_at = now,
            None => rows.push(Row {
                replica,
                joined_at: now,
                seen_at: now,
            }),
        }
        let seen_within = |time: Duration| {
            let rows = rows.iter();
            rows.filter(move |row| u128::from(now - row.seen_at) < time.as_nanos())
        };
        let counted = seen_within(FORGOTTEN).count();
        let rank = seen_within(FORGOTTEN).filter(|row| row.replica < replica);
        let slot = ReplicaSlot {
            rank: rank.count() as u64,
            of: NonZeroU64::new(counted as u64).unwrap(),
        };
        let others = seen_within(REMEMBERED).filter(|row| row.replica != replica);
        let oldest = others.map(|row| Duration::from_nanos(now - row.joined_at));
        membership.note_oldest_other(oldest.max(), Monotonic(now));
        membership.confirm(slot, Monotonic(now));
    }

    /// Removes the row of a replica that stops.
    pub(super) fn leave(&self, replica: usize) {
        self.0.lock().retain(|row| row.replica != replica);
    }
}
