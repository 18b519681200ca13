//! Requests that wait for tokens, and the tokens that these requests get.

use tokio::sync::oneshot;

use super::counters::CounterMicros;

/// Unspent tokens of one bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::limiter) struct Unspent {
    pub(in crate::limiter) tokens: u64,
    /// When the oldest token was taken.
    pub(in crate::limiter) taken_at: CounterMicros,
    /// The bucket's generation when the tokens were taken; 0 (never a valid generation) if the tokens come from more
    /// than one generation.
    pub(in crate::limiter) generation: u64,
}

impl Unspent {
    /// Combines two sets of tokens. If their generations differ, the counters will not credit the tokens, which is
    /// always safe.
    pub(super) fn and(self, more: Self) -> Self {
        match (self.tokens, more.tokens) {
            (0, _) => more,
            (_, 0) => self,
            _ => Self {
                tokens: self.tokens + more.tokens,
                taken_at: self.taken_at.min(more.taken_at),
                generation: if self.generation == more.generation {
                    self.generation
                } else {
                    0
                },
            },
        }
    }
}

/// The result for a request that waited for the counters.
#[derive(Debug)]
pub(in crate::limiter) enum FetchOutcome {
    /// The request got the tokens it needs.
    Granted(Grant),
    /// The counters had too few tokens.
    TooFew,
    /// The call failed, or there was no response in time.
    Unanswered,
}

/// A request that waits for the counters.
#[derive(Debug)]
pub(in crate::limiter) struct Waiter {
    pub(in crate::limiter) tokens: u64,
    pub(in crate::limiter) outcome: oneshot::Sender<FetchOutcome>,
}

impl Waiter {
    pub(in crate::limiter) fn new(tokens: u64) -> (Self, oneshot::Receiver<FetchOutcome>) {
        let (outcome, receiver) = oneshot::channel();
        (Self { tokens, outcome }, receiver)
    }

    /// Returns whether the request has stopped waiting.
    pub(in crate::limiter) fn is_gone(&self) -> bool {
        self.outcome.is_closed()
    }
}

/// Tokens granted to one request. If the tokens are dropped without being [spent](Self::spend), a callback returns
/// them.
pub(in crate::limiter) struct Grant {
    unspent: Unspent,
    give_back: Option<Box<dyn FnOnce(Unspent) + Send + Sync>>,
}

impl Grant {
    pub(in crate::limiter) fn new(
        unspent: Unspent,
        give_back: impl FnOnce(Unspent) + Send + Sync + 'static,
    ) -> Self {
        Self {
            unspent,
            give_back: Some(Box::new(give_back)),
        }
    }

    pub(in crate::limiter) fn spend(mut self) {
        self.give_back = None;
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        if let Some(give_back) = self.give_back.take() {
            give_back(self.unspent);
        }
    }
}

impl std::fmt::Debug for Grant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Grant").field(&self.unspent).finish()
    }
}
