//! Determines how long tokens accumulate in an empty bucket before a replica takes them.

use super::{counters::CounterMicros, gcra::Gcra, waiter::Unspent};
use crate::clock::Nanos;

/// The longest pause is shorter than the lease TTL by a varying amount: at most `1 / VARIES` of the TTL.
const VARIES: u64 = 8;

/// When this replica's last call was made, if that call took all of the bucket's tokens.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::limiter) struct Gathering(Option<Emptied>);

#[derive(Debug, Clone, Copy)]
struct Emptied {
    at: CounterMicros,
    generation: u64,
}

impl Gathering {
    /// Records a call that got `grant` and left `left` in the bucket. Returns how long to wait before the next call if
    /// there are too few tokens, so that tokens are not fetched one by one.
    ///
    /// If no other replica takes tokens, the wait is half the lease TTL. The more tokens other replicas take, the
    /// longer the wait, up to nearly the whole TTL. So the calls of two replicas together still empty the bucket about
    /// twice per TTL. If there are more replicas, each of them calls about once per TTL. The longest wait varies,
    /// because replicas that always call at the same time would leave no tokens for each other. The wait is never so
    /// long that the bucket could fill up, since a full bucket stops refilling.
    pub(in crate::limiter) fn pause(
        &mut self,
        gcra: Gcra,
        ttl: Nanos,
        grant: Unspent,
        left: Nanos,
    ) -> Nanos {
        let alone = Nanos(ttl.0 / 2);
        let emptied = Emptied {
            at: grant.taken_at,
            generation: grant.generation,
        };
        let before = std::mem::replace(&mut self.0, (left < gcra.emission()).then_some(emptied));
        let shared = match (before, self.0) {
            (Some(before), Some(now)) if before.generation == now.generation => {
                let since = Nanos(now.at.0.saturating_sub(before.at.0).saturating_mul(1000));
                // Part of a token may have been left after the earlier call.
                let refilled = gcra.tokens(since).saturating_sub(1);
                if since <= ttl.saturating_mul(2) {
                    Nanos(alone.saturating_mul(refilled).0 / grant.tokens.max(1))
                } else {
                    Nanos::ZERO
                }
            }
            _ => Nanos::ZERO,
        };
        let longest = Nanos(ttl.0 - (ttl.0 / VARIES).saturating_mul(spread(emptied.at)) / 256);
        shared.clamp(alone, longest).min(Nanos(gcra.tau().0 / 10))
    }
}

/// Returns a number below 256 that usually differs even for times that are close to each other.
fn spread(at: CounterMicros) -> u64 {
    at.0.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;
    use crate::limiter::policy::RatePolicy;

    const TTL: Nanos = Nanos::from_millis(100);
    const EMPTY: Nanos = Nanos::ZERO;

    /// Returns the parameters of a bucket that refills at 1,000 tokens per second.
    fn gcra(burst: u32) -> Gcra {
        Gcra::new(RatePolicy {
            rpm: NonZeroU32::new(60_000).unwrap(),
            burst: NonZeroU32::new(burst).unwrap(),
        })
    }

    fn grant(at_ms: u64, tokens: u64, generation: u64) -> Unspent {
        Unspent {
            tokens,
            taken_at: CounterMicros(at_ms * 1000),
            generation,
        }
    }

    /// Returns how many milliseconds to wait after the second of two calls that are `ms` milliseconds apart.
    fn after(ms: u64, second: Unspent, burst: u32) -> u64 {
        let mut gathering = Gathering::default();
        let first = grant(second.taken_at.0 / 1000 - ms, 7, 1);
        assert_eq!(
            gathering.pause(gcra(burst), TTL, first, EMPTY),
            Nanos::from_millis(50)
        );
        gathering.pause(gcra(burst), TTL, second, EMPTY).0 / 1_000_000
    }

    #[test]
    fn a_replica_waits_longer_if_others_take_most_of_the_tokens() {
        // Of the tokens that have refilled, this replica takes all, nearly all, 70 percent, half, a third, or none.
        assert_eq!(after(50, grant(1000, 50, 1), 1000), 50);
        assert_eq!(after(50, grant(1000, 49, 1), 1000), 50);
        assert_eq!(after(50, grant(1000, 35, 1), 1000), 70);
        assert!((87..=98).contains(&after(50, grant(1000, 25, 1), 1000)));
        for at in 1000..1100 {
            assert!((87..=100).contains(&after(50, grant(at, 17, 1), 1000)));
            assert!((87..=100).contains(&after(50, grant(at, 0, 1), 1000)));
        }
        let pauses: Vec<_> = (1000..1100)
            .map(|at| after(50, grant(at, 9, 1), 1000))
            .collect();
        assert!(pauses.iter().any(|it| *it < 91) && pauses.iter().any(|it| *it > 96));
        assert_eq!(after(0, grant(1000, 0, 1), 1000), 50);
        assert_eq!(after(1, grant(1000, 0, 1), 1000), 50);
    }

    #[test]
    fn it_waits_no_longer_if_the_last_call_says_nothing_about_others() {
        assert_eq!(
            after(201, grant(1000, 5, 1), 1000),
            50,
            "the last call was long ago"
        );
        assert_eq!(
            after(50, grant(1000, 5, 2), 1000),
            50,
            "the generation has changed"
        );
        let mut gathering = Gathering::default();
        gathering.pause(gcra(1000), TTL, grant(1000, 10, 1), EMPTY);
        let some = gcra(1000).emission();
        gathering.pause(gcra(1000), TTL, grant(1010, 10, 1), some);
        let pause = gathering.pause(gcra(1000), TTL, grant(1060, 10, 1), EMPTY);
        assert_eq!(pause, Nanos::from_millis(50), "tokens were left");
    }

    #[test]
    fn a_bucket_never_fills_up_in_the_meantime() {
        assert_eq!(after(50, grant(1000, 10, 1), 800), 80);
        let mut gathering = Gathering::default();
        let pause = gathering.pause(gcra(100), TTL, grant(1000, 10, 1), EMPTY);
        assert_eq!(pause, Nanos::from_millis(10));
    }
}
