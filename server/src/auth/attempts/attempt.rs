//! One attempt, and what becomes of its count: it stays, is forgotten, or is taken back.

use std::sync::Arc;

use tokio::task::JoinHandle;

use super::{Attempts, Counter, OnSuccess};

/// What is known of an attempt's password.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judgment {
    /// It was not looked at: the attempt does not count.
    Missing,
    /// It is wrong, or is being judged, so that the caller may learn that it is.
    Wrong,
    Correct,
}

/// An attempt that may be made. Dropped, it is taken back unless its password was judged.
#[derive(Debug)]
pub struct Attempt {
    pub(super) attempts: Arc<Attempts>,
    pub(super) counters: Vec<Counter>,
    /// When it was counted on this replica, in monotonic nanoseconds. `None`: it was not.
    pub(super) counted_here: Option<u64>,
    /// When it was counted in Redis, by its clock in milliseconds. `None`: it was not, or that is not known.
    pub(super) counted_in_redis: Option<u64>,
    pub(super) judgment: Judgment,
    /// Whether the caller's network has failed lately.
    pub is_suspect: bool,
}

impl Attempt {
    pub fn set_judgment(&mut self, judgment: Judgment) {
        self.judgment = judgment;
    }

    fn count(&self, what: OnSuccess) -> usize {
        let counters = self.counters.iter();
        counters
            .filter(|counter| counter.on_success == what)
            .count()
    }

    /// The password was correct: forgets what was counted for this account.
    pub async fn succeeded(mut self) {
        let (cleared, kept) = (self.count(OnSuccess::Clear), self.count(OnSuccess::Keep));
        let task = self.take_back(cleared, kept);
        // Nothing is left to take back.
        self.counters.clear();
        if let Some(task) = task {
            let _ = task.await;
        }
    }

    /// Clears the first counters, keeps the last ones, and takes the attempt back from those between: here at once, in
    /// Redis in the task that it returns.
    fn take_back(&self, cleared: usize, kept: usize) -> Option<JoinHandle<()>> {
        let changed = self.counters.len().checked_sub(kept).filter(|n| *n > 0)?;
        {
            let mut local = self.attempts.local.lock();
            for (n, counter) in self.counters[..changed].iter().enumerate() {
                if n < cleared {
                    local.remove(&counter.name);
                } else if let Some(at) = self.counted_here
                    && let Some(count) = local.get_mut(&counter.name)
                {
                    count.tries = (count.tries - 1.0).max(0.0);
                    if count.at == at {
                        // The attempt was allowed because no earlier wait was left.
                        count.until = 0;
                    }
                }
            }
        }
        let redis = self.attempts.redis.clone()?;
        let changed = match self.counted_in_redis {
            Some(_) => changed,
            None => cleared,
        };
        if changed == 0 {
            return None;
        }
        let mut keys = Attempts::keys(&redis, &self.counters);
        keys.truncate(changed);
        let attempts = self.attempts.clone();
        let args = [
            u64::try_from(cleared).unwrap_or(u64::MAX),
            self.counted_in_redis.unwrap_or(0),
        ];
        // Without a runtime the process is about to end.
        let runtime = tokio::runtime::Handle::try_current().ok()?;
        Some(runtime.spawn(async move {
            let keys = keys.iter().map(String::as_str).collect::<Vec<_>>();
            // What is not taken back is forgiven in a while.
            let _ = redis.eval(&attempts.forget, &keys, &args, None).await;
        }))
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        let kept = match self.judgment {
            Judgment::Missing => 0,
            Judgment::Wrong => return,
            // Verifying it took time all the same.
            Judgment::Correct => self.count(OnSuccess::Keep),
        };
        // Detached: nothing waits for it.
        drop(self.take_back(0, kept));
    }
}
