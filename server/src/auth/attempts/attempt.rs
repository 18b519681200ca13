//! One attempt, and which counters continue to count it.

use std::sync::Arc;

use tokio::task::JoinHandle;

use super::{Attempts, Counter, OnSuccess};
use crate::clock::Monotonic;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judgment {
    /// The password was not verified, so the attempt does not count.
    Missing,
    /// The password is wrong, or its verification is in progress and may show that it is wrong. Also used for
    /// registrations, because the response may reveal that an email is in use.
    Wrong,
    Correct,
}

/// A permitted attempt. When it is dropped, its [`Judgment`] determines which counters still count it: all of them
/// after a wrong password, only the `Keep` counters after a correct one, and none if no password was verified.
#[derive(Debug)]
pub struct Attempt {
    pub(super) attempts: Arc<Attempts>,
    pub(super) counters: Vec<Counter>,
    /// When the attempt was counted locally. `None` if it was not counted locally.
    pub(super) counted_here: Option<Monotonic>,
    /// When Redis counted the attempt, in milliseconds on Redis's clock. `None` if Redis did not count it or its
    /// response is unknown.
    pub(super) counted_in_redis: Option<u64>,
    pub(super) judgment: Judgment,
    /// Whether the caller's network has had several recent failures.
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

    /// Records that the attempt succeeded. Updates each counter according to its [`OnSuccess`].
    pub async fn succeeded(mut self) {
        let (cleared, kept) = (self.count(OnSuccess::Clear), self.count(OnSuccess::Keep));
        let task = self.take_back(cleared, kept);
        // Nothing is left to take back on drop.
        self.counters.clear();
        if let Some(task) = task {
            let _ = task.await;
        }
    }

    /// Clears the first `cleared` counters, keeps the last `kept` ones, and takes the attempt back from all others. The
    /// local counters are changed before this function returns, and the counters in Redis by the returned task.
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
                        // The attempt was allowed, so there was no earlier wait to restore.
                        count.until = Monotonic::default();
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
        // If there is no runtime, the process is about to exit.
        let runtime = tokio::runtime::Handle::try_current().ok()?;
        Some(runtime.spawn(async move {
            let keys = keys.iter().map(String::as_str).collect::<Vec<_>>();
            // If this fails, the attempt is forgiven later.
            let _ = redis.eval(&attempts.forget, &keys, &args, None).await;
        }))
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        let kept = match self.judgment {
            Judgment::Missing => 0,
            Judgment::Wrong => return,
            // The `Keep` counters still count the attempt, because verifying the password took CPU time.
            Judgment::Correct => self.count(OnSuccess::Keep),
        };
        drop(self.take_back(0, kept));
    }
}
