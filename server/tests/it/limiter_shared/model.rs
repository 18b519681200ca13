//! The shared counters in the plainest way: what the Redis script does, in whole numbers of any size.

use std::collections::HashMap;

use quota_server::limiter::{BucketName, BucketState, TakeCall, TakeReply};

/// Microseconds from a loss to the new beginning.
pub(super) const EPOCH_DELAY: u64 = 600_000;

#[derive(Debug, Clone)]
struct Bucket {
    at: u64,
    debt: u128,
    emission: u128,
    tau: u128,
    version: u64,
    epoch: u64,
    /// The least debt before a call since the time beside it; for two spans, one after the other.
    least: [(u128, u64); 2],
}

#[derive(Debug, Clone, Default)]
struct Epoch {
    run: u64,
    start: Option<u64>,
    ok: u64,
}

/// What a server remembers.
#[derive(Debug, Clone, Default)]
pub(super) struct State {
    buckets: HashMap<BucketName, Bucket>,
    epochs: HashMap<u16, Epoch>,
}

impl State {
    /// A new deployment, whose buckets are full.
    pub(super) fn fresh(run: u64, partitions: u16) -> Self {
        let epoch = Epoch {
            run,
            start: Some(0),
            ok: 0,
        };
        Self {
            buckets: HashMap::new(),
            epochs: (0..partitions).map(|n| (n, epoch.clone())).collect(),
        }
    }

    /// One call at `now`, to the process called `run`.
    pub(super) fn take(&mut self, run: u64, now: u64, call: TakeCall) -> TakeReply {
        let epoch = self.epochs.entry(call.partition).or_default();
        let told = call.promised > 0 && epoch.start == Some(call.promised);
        let answered = epoch.ok > call.away_since && epoch.ok <= now && now - epoch.ok < 1_000_000;
        let lost = epoch.run != run
            || epoch.start.is_none_or(|start| start > now + EPOCH_DELAY)
            || (call.away_since > 0
                && epoch.start.is_some_and(|start| start <= now)
                && !told
                && !answered);
        if lost {
            *epoch = Epoch {
                run,
                start: Some(now + EPOCH_DELAY),
                ok: 0,
            };
        }
        let start = epoch.start.unwrap();
        if start > now {
            let wait = start - now;
            return TakeReply {
                at: now,
                state: BucketState::Beginning { wait },
            };
        }
        let heard = if told { now } else { call.last_heard };
        if heard > epoch.ok + 100_000 && heard <= now && heard >= start {
            epoch.ok = heard;
        }
        let known = self.buckets.get(&call.bucket).cloned();
        let was_there = known.is_some();
        let (mut emission, mut tau) = (u128::from(call.emission), u128::from(call.tau));
        let mut version = call.version;
        let mut changed = false;
        let mut least = None;
        let mut in_epoch = None;
        let mut debt = 0;
        if let Some(bucket) = known {
            let since = bucket.at.min(now);
            changed |= now < bucket.at;
            debt = bucket.debt.saturating_sub(u128::from(now - since) * 1000);
            least = Some(bucket.least);
            in_epoch = Some(bucket.epoch);
            if version < bucket.version {
                (emission, tau, version) = (bucket.emission, bucket.tau, bucket.version);
            } else if bucket.emission != emission || bucket.tau != tau {
                debt = (debt * emission).div_ceil(bucket.emission).min(tau);
                least = None;
                changed = true;
            }
        }
        if in_epoch != Some(start) {
            debt = debt.max(tau.saturating_sub(u128::from(now - start) * 1000));
            least = None;
            changed = was_there;
        }
        debt = debt.min(tau);
        let [(m, mt), (n, nt)] = least.unwrap_or([(debt, now), (debt, now)]);
        let mut least = [(m.min(debt), mt), (n.min(debt), nt)];
        if call.back > 0 {
            let bound = least
                .iter()
                .find(|(_, since)| call.back_taken_at >= *since)
                .map_or(0, |(least, _)| *least);
            debt -= (u128::from(call.back) * emission).min(bound).min(debt);
            for (least, _) in &mut least {
                *least = (*least).min(debt);
            }
            changed = true;
        }
        let mut granted = 0;
        if call.want > 0 {
            let there = u64::try_from((tau - debt) / emission).unwrap();
            if there >= call.need {
                granted = call.want.min(call.need.max(there / 2));
                let price = u128::from(granted) * emission;
                debt += price;
                changed = true;
                let (m, mt) = least[0];
                if now < mt || now - mt > 2 * call.lease || m < price {
                    least = [(debt, now), (m, mt)];
                }
            }
        }
        if changed {
            let bucket = Bucket {
                at: now,
                debt,
                emission,
                tau,
                version,
                epoch: start,
                least,
            };
            self.buckets.insert(call.bucket, bucket);
        }
        TakeReply {
            at: now,
            state: BucketState::Known {
                granted,
                debt: u64::try_from(debt).unwrap(),
            },
        }
    }
}
