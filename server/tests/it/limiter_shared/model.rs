//! A model of the Redis script, in 128-bit integers. It is a fast substitute for Redis, and the script is compared with
//! it. The model repeats the script's rules, so the comparison does not show that the rules are correct. `credits`
//! checks the rules for returned tokens, and `simulation` checks the limits.

use std::collections::HashMap;

use quota_server::{
    clock::Nanos,
    limiter::{BucketName, BucketState, CounterMicros, TakeCall, TakeReply},
};

/// The time from a loss of state to the new epoch, with the default deadline, in microseconds.
pub(super) const EPOCH_DELAY: u64 = 600_000;

/// The default deadline of calls, in microseconds.
pub(super) const DEADLINE: u64 = 30_000;

/// The promise of an epoch expires this many microseconds before one epoch delay has passed since the epoch's start.
const PROMISED: u64 = 100_000;

/// During an outage, a call postpones the start of an unconfirmed epoch. It does so only if this many microseconds of
/// the epoch delay have passed, or the deadline of calls if that is longer.
const KNOWN: u64 = 50_000;

/// For this many microseconds plus three deadlines after the start of a confirmed epoch, other callers cannot begin
/// another epoch.
const SETTLED: u64 = 50_000;

/// For this many microseconds after a confirmed response, it is certain that no caller has decided requests without the
/// counters.
const CONNECTED: u64 = 800_000;

/// A confirmation is stored only if it is newer than the stored confirmation by more than this time, in microseconds.
const CONFIRMED: u64 = 50_000;

/// The largest number of nanoseconds that the script computes exactly.
const LARGEST: u128 = 1 << 52;

#[derive(Debug, Clone)]
struct Bucket {
    at: u64,
    debt: u128,
    /// Debt beyond that of an empty bucket.
    beyond: u128,
    /// Refill since the epoch started, minus the tokens taken. Refill counts even while the bucket is full.
    gathered: Option<u128>,
    emission: u128,
    tau: u128,
    version: u64,
    /// When a caller with the version `version` last called.
    version_at: u64,
    epoch: u64,
    generation: u64,
    /// For two times, newer first: the lowest debt since that time, and the time.
    least: [(u128, u64); 2],
    expires_at: u64,
}

#[derive(Debug, Clone, Default)]
struct Epoch {
    run: u64,
    start: Option<u64>,
    ok: u64,
    /// Whether a caller has confirmed the start.
    is_known: bool,
}

/// The time after which an unused version of a plan is forgotten, in microseconds.
const OUTDATED: u64 = 10_000_000;

/// How long a bucket is kept in addition to twice the time until it is full, in microseconds.
const KEPT: u64 = 60_000_000;

/// The state of a Redis server.
#[derive(Debug, Clone, Default)]
pub(super) struct State {
    buckets: HashMap<BucketName, Bucket>,
    epochs: HashMap<u16, Epoch>,
    /// Whether buckets never expire, for comparison.
    keeps_all: bool,
}

impl State {
    /// Returns the state of a new deployment, in which every bucket is full.
    pub(super) fn fresh(run: u64, partitions: u16) -> Self {
        let epoch = Epoch {
            run,
            start: Some(0),
            ok: 0,
            is_known: true,
        };
        Self {
            buckets: HashMap::new(),
            epochs: (0..partitions).map(|n| (n, epoch.clone())).collect(),
            keeps_all: false,
        }
    }

    /// Returns the state with buckets that never expire.
    pub(super) fn without_expiry(self) -> Self {
        Self {
            keeps_all: true,
            ..self
        }
    }

    /// Returns when the current or next epoch of a partition starts, in microseconds.
    pub(super) fn epoch(&self, partition: u16) -> Option<u64> {
        self.epochs.get(&partition)?.start
    }

    pub(super) fn delete(&mut self, buckets: &[BucketName]) {
        for bucket in buckets {
            self.buckets.remove(bucket);
        }
    }

    /// Executes one call at `now`, in the Redis process with the run ID `run`.
    pub(super) fn take(&mut self, run: u64, now: u64, call: TakeCall) -> TakeReply {
        let epoch = self.epochs.entry(call.partition).or_default();
        let told = call.promised.0 > 0
            && epoch.start == Some(call.promised.0)
            && now < call.promised.0 + call.epoch_delay - PROMISED;
        let answered =
            (epoch.ok > call.outage_since.0 && epoch.ok <= now && now - epoch.ok < CONNECTED)
                || (call.outage_since.0 == 1 && epoch.ok == 0);
        let began = epoch.start.filter(|start| *start <= now);
        let is_unexpected = call.outage_since.0 > 0 && !told && !answered;
        let settles = began.map(|start| start + SETTLED + 3 * call.deadline);
        let settles = settles.filter(|until| is_unexpected && epoch.is_known && now < *until);
        let lost = epoch.run != run
            || epoch
                .start
                .is_none_or(|start| start > now + call.epoch_delay)
            || (is_unexpected && began.is_some() && settles.is_none());
        if lost {
            *epoch = Epoch {
                run,
                start: Some(now + call.epoch_delay),
                ok: 0,
                is_known: false,
            };
        } else if let Some(start) = epoch.start.filter(|start| *start > now) {
            if call.promised.0 == start {
                epoch.is_known = true;
            } else if call.outage_since.0 > 0
                && !epoch.is_known
                && start - now < call.epoch_delay - KNOWN.max(call.deadline)
            {
                epoch.start = Some(now + call.epoch_delay);
            }
        }
        let start = epoch.start.unwrap();
        if start > now {
            let wait = start - now;
            return TakeReply {
                at: CounterMicros(now),
                state: BucketState::Initializing { wait },
            };
        }
        if let Some(until) = settles {
            return TakeReply {
                at: CounterMicros(now),
                state: BucketState::Initializing { wait: until - now },
            };
        }
        let heard = call.last_heard.0;
        let confirmed = if epoch.ok <= now { epoch.ok } else { 0 };
        if call.outage_since.0 == 0
            && heard > confirmed + CONFIRMED
            && heard <= now
            && heard >= start
        {
            epoch.ok = heard;
        }
        let has_expired = |bucket: &Bucket| !self.keeps_all && now >= bucket.expires_at;
        // A deleted bucket does not come back if the clock is set back.
        if self.buckets.get(&call.bucket).is_some_and(has_expired) {
            self.buckets.remove(&call.bucket);
        }
        let known = self.buckets.get(&call.bucket).cloned();
        let was_there = known.is_some();
        let (mut emission, mut tau) = (u128::from(call.emission.0), u128::from(call.tau.0));
        let (mut version, mut version_at) = (call.version, now);
        let (mut changed, mut new_generation, mut in_use) = (false, !was_there, false);
        let (mut least, mut generation) = ([(0, 0); 2], 0);
        let mut in_epoch = None;
        let (mut debt, mut beyond, mut gathered) = (0, 0, None);
        if let Some(bucket) = known {
            let since = bucket.at.min(now);
            changed |= now < bucket.at;
            new_generation |= now < bucket.at;
            let mut refill = u128::from(now - since) * 1000;
            (debt, beyond, gathered) = (bucket.debt, bucket.beyond, bucket.gathered);
            let mut edited = false;
            (least, generation) = (bucket.least, bucket.generation);
            in_epoch = Some(bucket.epoch);
            let unused = now.saturating_sub(bucket.version_at);
            if version < bucket.version && unused < OUTDATED {
                (emission, tau, version) = (bucket.emission, bucket.tau, bucket.version);
                version_at = bucket.version_at.min(now);
            } else {
                in_use = unused >= OUTDATED / 2;
                if bucket.emission != emission || bucket.tau != tau {
                    let missing = ((debt + beyond) * emission).div_ceil(bucket.emission);
                    refill = refill.min(refill * emission / bucket.emission);
                    debt = missing.min(tau);
                    beyond = missing - debt;
                    gathered = gathered.map(|it| LARGEST.min(it * emission / bucket.emission));
                    (edited, changed, new_generation) = (true, true, true);
                }
            }
            beyond = beyond.saturating_sub(refill.saturating_sub(debt));
            debt = debt.saturating_sub(refill);
            gathered = gathered.map(|it| it + refill);
            if edited && let Some(gathered) = gathered {
                let missing = debt + beyond;
                debt = debt.max(tau.saturating_sub(gathered));
                beyond = missing.saturating_sub(debt);
            }
        }
        if in_epoch != Some(start) {
            new_generation = true;
            let missing = debt + beyond;
            let refill = u128::from(now - start) * 1000;
            debt = debt.max(tau.saturating_sub(refill));
            changed |= was_there || debt > 0;
            beyond = missing.saturating_sub(debt);
            gathered = Some(refill);
        }
        gathered = gathered.filter(|it| *it < LARGEST);
        if new_generation {
            generation = now.max(generation + 1);
            least = [(debt, now); 2];
        }
        for (least, _) in &mut least {
            *least = (*least).min(debt);
        }
        if call.back > 0 {
            let mut credit = 0;
            if call.back_generation == generation && call.back_taken_at.0 <= now {
                let least = least
                    .iter()
                    .find(|(_, since)| call.back_taken_at.0 >= *since)
                    .map_or(0, |(least, _)| *least);
                let price = u128::from(call.back) * emission;
                let gone = u128::from(now - call.back_taken_at.0) * 1000;
                credit = debt.min(price).min(price.saturating_sub(gone).max(least));
            }
            debt -= credit;
            gathered = gathered.map(|it| it + credit);
            for (least, _) in &mut least {
                *least = least.saturating_sub(credit);
            }
            changed = true;
        }
        let mut granted = 0;
        if call.want > 0 {
            let there = u64::try_from((tau - debt) / emission).unwrap();
            if there >= call.need {
                granted = call.want.min(call.waiting.min(there).max(there / 2));
            }
            if granted > 0 {
                let price = u128::from(granted) * emission;
                debt += price;
                gathered = gathered.map(|it| it - price);
                changed = true;
                let (m, mt) = least[0];
                if now - mt > 2 * call.lease || m < price {
                    least = [(debt, now), (m, mt)];
                }
            }
        }
        if changed {
            let doubled = 2 * (debt + beyond);
            let bucket = Bucket {
                at: now,
                debt,
                beyond,
                gathered,
                emission,
                tau,
                version,
                version_at,
                epoch: start,
                generation,
                least,
                expires_at: now + KEPT + 1000 * u64::try_from(doubled.div_ceil(1_000_000)).unwrap(),
            };
            self.buckets.insert(call.bucket, bucket);
        } else if in_use && let Some(bucket) = self.buckets.get_mut(&call.bucket) {
            bucket.version_at = version_at;
        }
        TakeReply {
            at: CounterMicros(now),
            state: BucketState::Active {
                granted,
                debt: Nanos(u64::try_from(debt).unwrap()),
                generation,
            },
        }
    }
}
