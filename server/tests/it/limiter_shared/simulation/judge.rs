//! Checks the limiter's guarantees by recounting the requests in the log.
//!
//! The checks are derived from the documented guarantees, not from how the limiter implements them. The numbers of
//! tokens that replicas and Redis report are used for only two checks: a denial is wrong if Redis had never granted
//! enough tokens to empty the bucket, and the totals must match.
//!
//! **Upper bound.** In any window of `T`, all replicas together admit at most `burst + rate·(T + ttl)` tokens, or
//! `burst + rate·T` for a strict plan. In the second after a plan is edited, replicas may follow either version of the
//! plan. Therefore, the bound for a window that overlaps this second uses the larger burst and, at each moment, the
//! larger rate of the plans that requests follow. Between the last request under one plan and the first request under
//! the next, the lower of the two rates counts, because a bucket learns of an edit only from a request. If Redis has
//! lost its state, and has decided no request under the earlier plan since then, Redis no longer knows the earlier
//! plan. The later plan then counts from the start of the new epoch, even if the edit came later. With `closed`, there
//! is no exception to this bound. With `share`, there is one exception. While only some replicas have lost Redis or get
//! all responses late, these replicas use their share `p` of the bucket, in addition to the tokens that the others take
//! from Redis. All replicas together then admit at most `(1 + p)` times the bound, where `p` is at most 1. If some
//! calls fail just after an outage, the replicas that made these calls still count as having lost Redis while the other
//! replicas use Redis again. With `open`, the requests that a replica admits without Redis satisfy the bound of a
//! strict plan, separately for each replica. Requests admitted by Redis satisfy the bound without exceptions, with
//! every fallback setting.
//!
//! **Lower bound.** In any period of 2 s that contains no fault and starts at least [`RECOVERED`] after the last fault,
//! the replicas admit at least 99% of the tokens that an exact bucket would admit for the same requests, minus the
//! highest cost of a request and one token. At the start of the period, the exact bucket contains what earlier
//! admissions have left in it. If a replica crashes, the tokens that may have been granted for requests to which it had
//! not responded are lost. For a leased key, two kinds of tokens are not counted as available. The first are tokens
//! that another replica may hold for at most [`HELD`]: at most a tenth of the burst, and at most twice the cost of the
//! requests that the replica got just before. The second are the last tokens of a bucket, because replicas let them
//! accumulate and then take them together. Once the bucket contains fewer tokens than refill in [`GATHER`] plus a round
//! trip to Redis, that many tokens are not counted until the bucket contains twice as many. Requests that arrive during
//! a call to Redis are decided together by the next call, for every plan. So at the end of a window, the tokens that
//! refilled during the last round trip may be unspent. Also, a request that is sent after the window may be admitted
//! while a request of the window is still waiting. If the waiting request is then denied, the later request counts as
//! part of the window. In addition, Redis learns of an edit with the first request that it decides after the edit.
//! Tokens that refill before this request count at the lower of the two rates, unless a restarted Redis has lost the
//! earlier plan. After a fault, a bucket is empty only if Redis lost its state, or if no replica that uses the bucket
//! received a response during the fault. Otherwise, the bucket has lost only the tokens that Redis granted in responses
//! that arrived late or never, and those that were returned by calls that never arrived.
//!
//! **Outages.** A replica that gets no timely response from Redis for a while still admits at least 99% of the tokens
//! that a separate bucket would admit for the requests that the replica gets. With `open`, this applies from half a
//! second after the start of the outage, and the separate bucket has the full limit. This bucket is full at first, and
//! requests that Redis decides take nothing from it. With `share`, this applies from 1.4 s after the start, and the
//! separate bucket has the replica's share of the limit and is empty at first. This check requires a constant number of
//! replicas. If a replica has never had a response for the key under the current plan, the replica's share starts with
//! the replica's first request for the key.
//!
//! **Connections.** A replica decides without Redis only during a fault that affects the replica, and for [`RECOVERED`]
//! after the fault. If Redis may lose its state because of a fault, the fault counts as affecting every replica.
//!
//! **Waits.** A denial by the rate limit states a time to wait. This is at most the time in which an empty bucket
//! refills the request's cost, plus the lifetimes of two leases. If nothing is taken in the meantime, a request with
//! the same cost is admitted after that time, rounded up to whole seconds as in a header. With a leased key, the
//! request may also have to wait until tokens have accumulated.
#![expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "times of a run and counts of requests are far below 2^52"
)]

use quota_common::plan::OnRedisFailure;
use quota_testkit::envelope::{Envelope, Span};

use self::outage::{disconnected, is_outage, is_silent, may_lose_state, under_in_outage, used};
use super::{
    run::{Answer, DEADLINE, EDIT_KNOWN, Entry, Log, TTL},
    scene::{Change, Fault, FaultKind, Key, Plan, Replicas, Scene},
};
use crate::limiter_shared::model::EPOCH_DELAY;

mod outage;
#[cfg(test)]
mod tests;

const MS: u64 = 1_000_000;
const SECOND: u64 = 1000 * MS;
const FOREVER: u64 = u64::MAX / 4;

/// The maximum time from the end of a fault until probes reach Redis again and, if Redis lost its state, buckets have
/// started empty.
const RECOVERED: u64 = 2000 * MS;
/// The length of the windows in which the lower bound is checked.
const WINDOW: u64 = 2000 * MS;
/// The interval between the starts of windows.
const STEP: u64 = 250 * MS;
/// The lifetime of a lease and the time that returning it takes, plus two more lifetimes for denials that other
/// replicas remember.
const HELD: u64 = 350 * MS;
/// How long tokens of an empty bucket may accumulate before they are taken, not including the round trip to Redis: half
/// the lifetime of a lease, plus a margin.
const GATHER: u64 = 60 * MS;
/// The maximum duration of a decision, which waits for Redis at most twice.
const PATIENCE: u64 = 2 * DEADLINE.as_nanos() as u64 + 5 * MS;

/// A guarantee that can be broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Guarantee {
    Upper,
    Lower,
    /// A 429 although the bucket certainly had enough tokens.
    Honest,
    /// A denial stated a wait that is too short for the same request to be admitted, or longer than necessary.
    Wait,
    /// A response took longer than two deadlines.
    Prompt,
    /// The plan's fallback setting was not followed, totals do not match, or a replica did not return to Redis.
    Mode,
    /// A decision without Redis, although Redis responded.
    Connected,
    /// While Redis was unavailable, less was admitted than the fallback setting allows.
    Outage,
}

#[derive(Debug)]
pub(super) struct Violation {
    pub(super) guarantee: Guarantee,
    pub(super) text: String,
}

pub(super) fn judge(scene: &Scene, log: &Log) -> Vec<Violation> {
    let mut found = Vec::new();
    for (number, key) in scene.keys.iter().enumerate() {
        let mut entries: Vec<Entry> = log
            .entries
            .iter()
            .filter(|it| it.key == number)
            .copied()
            .collect();
        // Among requests sent at the same time, those without a response may have been decided first.
        entries.sort_by_key(|it| (it.asked, it.answer != Answer::None));
        let mut broken = |guarantee, text: String| {
            let text = format!("key {number} ({}): {text}", key.load);
            found.push(Violation { guarantee, text });
        };
        if let Some(text) = over(scene, key, &entries, &log.epochs[number]) {
            broken(Guarantee::Upper, text);
        }
        let facts = Facts {
            epochs: &log.epochs[number],
            missed: &log.missed[number],
            heard: &log.heard[number],
            used: used(scene, number, &log.entries),
        };
        if let Some(text) = under(scene, key, &entries, &facts) {
            broken(Guarantee::Lower, text);
        }
        if let Some(text) = disconnected(scene, &entries, &facts.used) {
            broken(Guarantee::Connected, text);
        }
        if let Some(text) = under_in_outage(scene, key, &entries) {
            broken(Guarantee::Outage, text);
        }
        if let Some(text) = dishonest(key, &entries) {
            broken(Guarantee::Honest, text);
        }
        if let Some(text) = wrong_wait(scene, key, &entries) {
            broken(Guarantee::Wait, text);
        }
        if let Some(late) = entries.iter().find(|it| it.answered - it.asked > PATIENCE) {
            broken(Guarantee::Prompt, format!("{late:?}"));
        }
        for it in &entries {
            let wrong = match key.on_failure {
                OnRedisFailure::Closed => it.answer == Answer::Admitted && it.degraded,
                _ => it.answer == Answer::Unavailable,
            };
            if wrong {
                broken(Guarantee::Mode, format!("{it:?}"));
                break;
            }
        }
        let (granted, returned) = log.granted[number];
        let by_redis = |it: &&Entry| it.answer == Answer::Admitted && !it.degraded;
        let spent: u64 = entries
            .iter()
            .filter(by_redis)
            .map(|it| u64::from(it.cost))
            .sum();
        if spent + returned > granted {
            let text = format!("{granted} granted, {returned} returned, {spent} spent");
            broken(Guarantee::Mode, text);
        }
    }
    for (taken, spent, gone) in &log.books {
        if *taken != spent + gone {
            found.push(Violation {
                guarantee: Guarantee::Mode,
                text: format!("{taken} tokens taken, {spent} spent, {gone} returned or lost"),
            });
        }
    }
    if !log.degraded.is_empty() {
        found.push(Violation {
            guarantee: Guarantee::Mode,
            text: format!("replicas {:?} do not return to Redis", log.degraded),
        });
    }
    found
}

/// A plan with the period in which it may apply, in nanoseconds since the load began.
struct InForce {
    plan: Plan,
    from: u64,
    until: u64,
}

/// How long the previous plan may be applied, and its tokens spent, after a plan is edited.
const KNOWN: u64 = EDIT_KNOWN.as_nanos() as u64 + TTL.as_nanos() as u64;

fn in_force(key: &Key) -> Vec<InForce> {
    let plans = key.plans.iter().enumerate();
    plans
        .map(|(n, plan)| InForce {
            plan: *plan,
            from: plan.from * MS,
            until: key
                .plans
                .get(n + 1)
                .map_or(FOREVER, |next| next.from * MS + KNOWN),
        })
        .collect()
}

/// Returns the plans that buckets have followed, each from the first request under the plan to the last. A bucket
/// learns of an edit from a request, and has refilled at the lower of the two rates since the previous request. So a
/// plan under which no request was sent never took effect, and the slower plan applies between the requests of two
/// plans.
///
/// During the time that an edit takes to arrive, a replica that has not learned of it yet may also return tokens under
/// the earlier plan. If no request under a plan satisfies `is_heard`, it is unknown whether the bucket learned of the
/// plan, so the result covers both cases.
fn followed(
    key: &Key,
    entries: &[Entry],
    restarts: &[u64],
    is_heard: fn(&Entry) -> bool,
) -> Vec<InForce> {
    let number = |it: &InForce| it.plan.from;
    let mut followed = followed_one_by_one(key, entries, restarts, |_| true);
    for heard in followed_one_by_one(key, entries, restarts, is_heard) {
        if let Some(it) = followed.iter_mut().find(|it| number(it) == number(&heard)) {
            it.from = it.from.min(heard.from);
            it.until = it.until.max(heard.until);
        }
    }
    followed
}

/// Returns whether Redis certainly decided a denied request. A replica that remembers a denial denies further requests
/// immediately, without a call.
fn is_denied_by_redis(it: &Entry) -> bool {
    it.answer == Answer::Denied && !it.degraded && it.asked < it.answered
}

fn followed_one_by_one(
    key: &Key,
    entries: &[Entry],
    restarts: &[u64],
    is_heard: impl Fn(&Entry) -> bool,
) -> Vec<InForce> {
    let mut followed: Vec<InForce> = Vec::new();
    for (number, plan) in key.plans.iter().enumerate() {
        let under = || entries.iter().filter(|it| it.plan == number);
        let (Some(first), Some(last), true) = (
            under().map(|it| it.asked).min(),
            under().map(|it| it.answered).max(),
            under().any(&is_heard),
        ) else {
            continue;
        };
        let mut next = InForce {
            plan: *plan,
            from: first,
            until: last + 1,
        };
        match followed.last_mut() {
            None => next.from = 0,
            Some(before) if before.plan.rate() <= plan.rate() => {
                let earlier = entries.iter().filter(|it| it.plan < number);
                let told = earlier.filter(|it| is_heard(it) || is_denied_by_redis(it));
                let told = told.map(|it| it.answered).max().unwrap_or(0);
                let mut restarts = restarts.iter();
                if let Some(at) = restarts.find(|at| told < **at && **at < first) {
                    next.from = *at;
                }
                before.until = before.until.max(next.from);
            }
            Some(before) if before.until < first => {
                next.from = before.until;
                before.until = first.min(plan.from * MS + KNOWN).max(before.until);
            }
            Some(_) => {}
        }
        followed.push(next);
    }
    if let Some(last) = followed.last_mut() {
        last.until = FOREVER;
    }
    followed
}

/// A period in which some replicas admit their share in addition to what Redis admits, and the fraction of a bucket
/// that they admit.
struct Beside {
    from: u64,
    until: u64,
    part: f64,
}

/// Returns the tokens that refill from the start until `until`, at the highest rate of the plans that may apply, and
/// faster while shares are admitted in addition to what Redis admits.
fn refilled(plans: &[InForce], beside: &[Beside], until: u64) -> f64 {
    let mut edges: Vec<u64> = plans.iter().flat_map(|it| [it.from, it.until]).collect();
    edges.extend(beside.iter().flat_map(|it| [it.from, it.until]));
    edges.push(0);
    edges.push(until);
    edges.retain(|edge| *edge <= until);
    edges.sort_unstable();
    let pieces = edges.windows(2).map(|edge| {
        let rates = plans
            .iter()
            .filter(|it| it.from <= edge[0] && edge[1] <= it.until);
        let part = beside
            .iter()
            .filter(|it| it.from <= edge[0] && edge[1] <= it.until)
            .map(|it| it.part)
            .fold(0.0, f64::max);
        let rate = rates.map(|it| it.plan.rate()).fold(0.0, f64::max);
        rate * (1.0 + part) * (edge[1] - edge[0]) as f64
    });
    pieces.sum()
}

/// Returns the periods in which only some replicas have lost Redis, and admit requests in addition to those that Redis
/// admits. Each period consists of a fault, and the time until these replicas have recovered.
fn beside(scene: &Scene, key: &Key) -> Vec<Beside> {
    if key.on_failure != OnRedisFailure::Share {
        return Vec::new();
    }
    let (least, all) = scene.replica_bounds();
    let part = |plan: &Plan| f64::from(plan.burst.div_ceil(least as u32)) / f64::from(plan.burst);
    let part = key.plans.iter().map(part).fold(0.0, f64::max);
    let everyone = Replicas(u32::MAX);
    let alone = scene.faults.iter().filter_map(|fault| {
        let replicas = match fault.kind {
            FaultKind::CutSome { replicas, .. }
            | FaultKind::Late {
                replicas,
                percent: 100,
                ..
            }
            | FaultKind::Lost {
                replicas,
                percent: 100,
            } => replicas,
            FaultKind::Late { replicas, .. } | FaultKind::Lost { replicas, .. }
                if follows_outage(scene, fault) =>
            {
                replicas
            }
            FaultKind::Slow(_) if follows_outage(scene, fault) => everyone,
            _ => return None,
        };
        let mut alone = (0..all).filter(|it| replicas.contains(*it)).count();
        // A fault that affects only a fraction of the calls delays the return of some replicas to Redis, but not of all
        // replicas.
        if !is_outage(fault) {
            alone = alone.min(all - 1);
        }
        (alone < all).then(|| Beside {
            from: fault.at * MS,
            until: fault.end() * MS + RECOVERED,
            part: (part * alone as f64).min(1.0),
        })
    });
    alone.collect()
}

/// Returns whether `fault` begins while replicas that have lost Redis in an earlier fault may still be returning to
/// Redis.
fn follows_outage(scene: &Scene, fault: &Fault) -> bool {
    scene.faults.iter().any(|before| {
        is_outage(before) && before.at < fault.at && fault.at * MS < before.end() * MS + RECOVERED
    })
}

/// Returns the times at which new epochs started, with empty buckets, after Redis had lost its state.
fn restarts(scene: &Scene, epochs: &[u64]) -> Vec<u64> {
    let losses = scene.faults.iter().filter(|fault| {
        let kind = fault.kind;
        kind == FaultKind::Restart || kind == FaultKind::FailOver
    });
    let starts = losses.filter_map(|fault| {
        let reports = epochs.iter().filter(|at| **at >= fault.end() * MS);
        Some(reports.min()? + EPOCH_DELAY * 1000)
    });
    starts.collect()
}

fn over(scene: &Scene, key: &Key, entries: &[Entry], epochs: &[u64]) -> Option<String> {
    let restarts = restarts(scene, epochs);
    let admitted = || entries.iter().filter(|it| it.answer == Answer::Admitted);
    let by_redis: Vec<&Entry> = admitted().filter(|it| !it.degraded).collect();
    let all: Vec<&Entry> = admitted().collect();
    let is_granted = |it: &Entry| it.answer == Answer::Admitted && !it.degraded;
    let found = worst(
        &followed(key, entries, &restarts, is_granted),
        &by_redis,
        &[],
    )
    .map(|text| format!("by the counters alone, {text}"));
    if found.is_some() {
        return found;
    }
    if key.on_failure == OnRedisFailure::Open {
        return over_by_open(scene, key, entries, &restarts);
    }
    let plans = followed(key, entries, &restarts, |it| it.answer == Answer::Admitted);
    let beside = beside(scene, key);
    // Check windows that do not overlap any period in which shares are admitted in addition to what Redis admits.
    let mut from = 0;
    let ends = beside.iter().map(|it| (it.from, it.until));
    for (to, next) in ends.chain([(FOREVER, FOREVER)]) {
        let between: Vec<&Entry> = all
            .iter()
            .filter(|it| from <= it.asked && it.answered < to)
            .copied()
            .collect();
        if let Some(text) = worst(&plans, &between, &[]) {
            return Some(text);
        }
        from = from.max(next);
    }
    if beside.is_empty() {
        return None;
    }
    worst(&plans, &all, &beside)
}

/// Checks keys with the fallback setting `open`. With this setting, each replica enforces the limit separately while it
/// cannot reach the counters, and no tokens are leased. Returns a description of a window that exceeds the envelope, if
/// there is one.
fn over_by_open(scene: &Scene, key: &Key, entries: &[Entry], restarts: &[u64]) -> Option<String> {
    (0..scene.replica_bounds().1).find_map(|replica| {
        let of = entries.iter().filter(|it| it.replica == replica);
        let of: Vec<Entry> = of.copied().collect();
        let admitted = of
            .iter()
            .filter(|it| it.answer == Answer::Admitted && it.degraded);
        let mut plans = followed(key, &of, restarts, |_| true);
        for it in &mut plans {
            it.plan.strict = true;
        }
        let text = worst(&plans, &admitted.collect::<Vec<_>>(), &[])?;
        Some(format!("by replica {replica} without the counters, {text}"))
    })
}

/// Returns a description of a window that exceeds the envelope, if there is one. The envelope is larger while shares
/// are admitted in addition to what Redis admits.
fn worst(plans: &[InForce], admitted: &[&Entry], beside: &[Beside]) -> Option<String> {
    /// One token, in units of a clock that advances with the refill and not with time.
    const TOKEN: f64 = 1e9;
    let part = beside.iter().map(|it| it.part).fold(0.0, f64::max);
    for first in 0..plans.len() {
        for last in first..plans.len() {
            // Check windows that do not overlap any other plan.
            let from = plans[..first].iter().map(|it| it.until).max().unwrap_or(0);
            let to = plans.get(last + 1).map_or(FOREVER, |next| next.from);
            if from >= to {
                continue;
            }
            let these = &plans[first..=last];
            let most =
                |of: fn(&Plan) -> f64| these.iter().map(|it| of(&it.plan)).fold(0.0, f64::max);
            let burst = most(|plan| f64::from(plan.burst));
            let rate = most(Plan::rate);
            let leased = these.iter().any(|it| !it.plan.strict);
            let slack = if leased {
                TTL.as_nanos() as f64 * rate
            } else {
                0.0
            };
            // Redis's clock has a resolution of one microsecond.
            let grain = 0.002 + rate * 2000.0;
            let allowed = (burst + slack) * (1.0 + part) + grain;
            let clock = |at: u64| (refilled(plans, beside, at) * TOKEN) as u64;
            let inside = admitted
                .iter()
                .filter(|it| from <= it.asked && it.answered < to);
            let spans: Vec<Span> = inside
                .map(|it| Span {
                    sent: clock(it.asked),
                    answered: clock(it.answered),
                    cost: it.cost,
                })
                .collect();
            let envelope = Envelope::from_nanos(TOKEN as u64, (allowed * TOKEN) as u64);
            if let Some(worst) = envelope.worst(&spans)
                && worst.excess > 0.0
            {
                let near = |at: u64| {
                    let it = admitted.iter().min_by_key(|it| {
                        clock(it.asked)
                            .abs_diff(at)
                            .min(clock(it.answered).abs_diff(at))
                    });
                    it.map_or(0, |it| it.asked / MS)
                };
                return Some(format!(
                    "{:.2} tokens above the envelope: {} admitted from about {} to {} ms",
                    worst.excess,
                    worst.admitted,
                    near(worst.from),
                    near(worst.to)
                ));
            }
        }
    }
    None
}

/// The lowest limits of a key's plans from a given time on.
#[derive(Debug, Clone, Copy)]
struct Least {
    from: u64,
    rate: f64,
    burst: f64,
    /// The largest burst of these plans: the maximum number of tokens that have to refill before the bucket is full.
    most: f64,
    /// The largest burst so far: the maximum number of tokens that can be missing from the bucket.
    ever: f64,
    leased: bool,
    /// Tokens that may be lost at `from`: leases of a plan that was edited.
    lost: f64,
}

fn least(key: &Key, replicas: usize) -> Vec<Least> {
    let plans = in_force(key);
    let mut pieces = Vec::new();
    let mut edges: Vec<u64> = plans.iter().flat_map(|it| [it.from, it.until]).collect();
    edges.sort_unstable();
    for edge in edges.into_iter().filter(|edge| *edge < FOREVER) {
        let so_far = plans.iter().filter(|it| it.from <= edge);
        let now = || {
            plans
                .iter()
                .filter(move |it| it.from <= edge && edge < it.until)
        };
        let before = plans.iter().rev().find(|it| it.from < edge);
        let edited = plans.iter().any(|it| it.from == edge);
        pieces.push(Least {
            from: edge,
            rate: now().map(|it| it.plan.rate()).fold(f64::MAX, f64::min),
            burst: now()
                .map(|it| f64::from(it.plan.burst))
                .fold(f64::MAX, f64::min),
            most: now().map(|it| f64::from(it.plan.burst)).fold(0.0, f64::max),
            ever: so_far
                .map(|it| f64::from(it.plan.burst))
                .fold(0.0, f64::max),
            leased: now().any(|it| !it.plan.strict),
            lost: match before {
                Some(before) if edited && !before.plan.strict => {
                    f64::from(before.plan.burst / 10) * replicas as f64
                }
                _ => 0.0,
            },
        });
    }
    pieces
}

/// A loss of tokens, or of the plan.
#[derive(Debug, Clone, Copy)]
struct Loss {
    at: u64,
    tokens: Lost,
}

#[derive(Debug, Clone, Copy)]
enum Lost {
    All,
    /// The plan of the last request, but no tokens.
    Plan,
    /// The tokens of a replica that crashes.
    Crash,
    Some(f64),
}

/// What happened to a key's bucket in Redis.
struct Facts<'a> {
    /// When new epochs began.
    epochs: &'a [u64],
    /// When tokens were lost, and how many.
    missed: &'a [(u64, u64)],
    /// When any replica received a response in time.
    heard: &'a [u64],
    /// When each replica used the key's partition.
    used: Vec<Vec<u64>>,
}

/// An exact bucket, in tokens.
#[derive(Debug, Clone)]
struct Bucket<'a> {
    pieces: &'a [Least],
    piece: usize,
    /// The index of the piece at the time of the last request that Redis decided, because Redis does not know of later
    /// edits. If Redis has decided no request since it lost the plan, this is the index at the time of the first
    /// request since then. That request may have reached Redis even if it was decided without Redis.
    heard: Option<usize>,
    at: u64,
    missing: f64,
    /// Debt beyond that of an empty bucket, from before the burst was lowered. When the burst is raised, these tokens
    /// are missing again, except for those that would have refilled while the bucket was full.
    beyond: f64,
    /// The unspent tokens that have refilled since the bucket was emptied. A later, larger burst does not make more
    /// tokens available.
    refilled: f64,
    /// Whether tokens accumulate in the bucket until they are taken together. A change of this value applies from the
    /// next instant on: requests at the same instant can take all the tokens in the bucket.
    is_low: bool,
    /// The time of the latest request.
    instant: Option<u64>,
}

impl Bucket<'_> {
    fn now(&self) -> Least {
        self.pieces[self.piece]
    }

    fn advance(&mut self, to: u64) {
        let last = self.piece
            + self.pieces[self.piece + 1..]
                .iter()
                .take_while(|it| it.from <= to)
                .count();
        let crossed = &self.pieces[self.heard.unwrap_or(self.piece)..=last];
        let rate = crossed.iter().map(|it| it.rate).fold(f64::MAX, f64::min);
        while self.piece < last {
            self.refill(self.pieces[self.piece + 1].from, rate);
            self.piece += 1;
            self.take(self.now().lost);
        }
        self.refill(to, rate);
    }

    /// Returns how many tokens are available for a request, while other replicas hold `held` tokens and tokens may
    /// accumulate for `gather`. If Redis decides the request, it learns from the request which plan applies.
    fn ask(&mut self, it: &Entry, held: f64, gather: u64) -> f64 {
        let by_redis = it.answer != Answer::None && !it.degraded;
        if by_redis || self.heard.is_none() {
            self.heard = Some(self.piece);
        }
        let least = self.now();
        let there = self.level() - held;
        let gathers = if least.leased {
            (least.rate * gather as f64).min(least.burst / 10.0)
        } else {
            0.0
        };
        if self.instant.replace(self.at) != Some(self.at) {
            self.is_low = there < gathers || (self.is_low && there < 2.0 * gathers);
        }
        if self.is_low { there - gathers } else { there }
    }

    fn refill(&mut self, to: u64, rate: f64) {
        let time = to.saturating_sub(self.at) as f64;
        let tokens = time * rate;
        self.beyond = (self.beyond - (tokens - self.missing).max(0.0)).max(0.0);
        self.missing = (self.missing - tokens).max(0.0);
        self.refilled += tokens;
        self.at = self.at.max(to);
    }

    fn take(&mut self, cost: f64) {
        let missing = (self.missing + self.beyond + cost).min(self.now().ever);
        self.missing = missing.min(self.now().most);
        self.beyond = missing - self.missing;
        self.refilled = (self.refilled - cost).max(0.0);
    }

    fn lose(&mut self, loss: Loss) {
        self.advance(loss.at);
        match loss.tokens {
            Lost::All => {
                self.empty();
                self.heard.get_or_insert(self.piece);
            }
            Lost::Plan => self.heard = None,
            // A crashing replica loses the tokens that it holds, those that it was about to return, and those that it
            // was about to receive.
            Lost::Crash if self.now().leased => {
                self.take(3.0 * (self.now().most / 10.0).floor());
            }
            Lost::Crash => {}
            Lost::Some(tokens) => self.take(tokens),
        }
    }

    fn empty(&mut self) {
        self.missing = self.now().most;
        self.beyond = self.now().ever - self.missing;
        self.refilled = 0.0;
    }

    fn level(&self) -> f64 {
        (self.now().burst - self.missing).min(self.refilled)
    }
}

/// Returns whether Redis certainly no longer knows the plans of its buckets after `fault`. A server that takes over
/// knows the plans as they were at most one second earlier.
fn loses_plans(scene: &Scene, fault: &Fault) -> bool {
    let takes_over = |it: &Fault| {
        it.kind == FaultKind::FailOver && fault.at <= it.at && it.at < fault.end() + 1000
    };
    fault.kind == FaultKind::Restart && !scene.faults.iter().any(takes_over)
}

/// Returns the number of tokens that other replicas may hold when the request at `place` arrives.
fn held(entries: &[Entry], place: usize, least: Least) -> f64 {
    let most = (least.burst / 10.0).floor();
    if !least.leased || most < 2.0 {
        return 0.0;
    }
    let it = entries[place];
    let mut asked = [0.0; 16];
    for other in entries[..place].iter().rev() {
        if it.asked - other.asked > HELD {
            break;
        }
        if other.replica != it.replica {
            asked[other.replica % 16] += 2.0 * f64::from(other.cost);
        }
    }
    asked.iter().map(|asked| asked.min(most)).sum()
}

fn under(scene: &Scene, key: &Key, entries: &[Entry], facts: &Facts<'_>) -> Option<String> {
    let pieces = least(key, scene.replica_bounds().1);
    // Periods that do not count: faults and their aftermath.
    let faults: Vec<(u64, u64)> = scene
        .faults
        .iter()
        .map(|fault| {
            (
                (fault.at * MS).saturating_sub(PATIENCE),
                fault.end() * MS + RECOVERED,
            )
        })
        .collect();
    let mut losses: Vec<Loss> = facts
        .missed
        .iter()
        .map(|(at, tokens)| Loss {
            at: *at,
            tokens: Lost::Some(*tokens as f64),
        })
        .collect();
    for fault in &scene.faults {
        let (from, until) = (
            (fault.at * MS).saturating_sub(PATIENCE),
            fault.end() * MS + RECOVERED,
        );
        let has_begun = |at: &u64| (from..until).contains(at);
        let loses_state =
            may_lose_state(scene, fault, &facts.used) || is_silent(fault, facts.heard);
        if loses_state && facts.epochs.iter().any(has_begun) {
            losses.push(Loss {
                at: until,
                tokens: Lost::All,
            });
        }
        if loses_plans(scene, fault) {
            losses.push(Loss {
                at: fault.end() * MS,
                tokens: Lost::Plan,
            });
        }
    }
    let crashes = scene.changes.iter();
    let crashes = crashes.filter(|(_, change)| matches!(change, Change::Crash(_)));
    losses.extend(crashes.map(|(at, _)| Loss {
        at: at * MS,
        tokens: Lost::Crash,
    }));
    losses.sort_unstable_by_key(|it| it.at);

    let dearest = entries.iter().map(|it| it.cost).max()?;
    let fastest = key.plans.iter().map(Plan::rate).fold(0.0, f64::max);
    let grain = f64::from(dearest) + 1.0 + fastest * (scene.round_trip * MS) as f64;
    let gather = GATHER + scene.round_trip * MS;
    let mut bucket = Bucket {
        pieces: &pieces,
        piece: 0,
        heard: None,
        at: 0,
        missing: 0.0,
        beyond: 0.0,
        refilled: f64::INFINITY,
        is_low: false,
        instant: None,
    };
    let mut next = 0;
    let mut next_losses = losses.iter().copied().peekable();
    let mut start = 0;
    while start + WINDOW <= scene.length * MS {
        // Replay the requests before this window with their actual results.
        while next < entries.len() && entries[next].asked < start {
            let it = entries[next];
            while let Some(loss) = next_losses.next_if(|loss| loss.at <= it.asked) {
                bucket.lose(loss);
            }
            bucket.advance(it.asked);
            bucket.ask(&it, held(entries, next, bucket.now()), gather);
            // A replica that crashed may have taken tokens for requests to which it never responded.
            if matches!(it.answer, Answer::Admitted | Answer::None) {
                bucket.take(f64::from(it.cost));
            }
            next += 1;
        }
        while let Some(loss) = next_losses.next_if(|loss| loss.at <= start) {
            bucket.lose(loss);
        }
        let end = start + WINDOW;
        if !faults
            .iter()
            .any(|(from, until)| *from < end && start < *until)
        {
            let (mut exact, mut due, mut served) = (bucket.clone(), 0.0, 0.0);
            let mut next_losses = next_losses.clone();
            // The end of the window or, if it is later, the last time at which a request of the window was denied
            // although the exact bucket admits it.
            let mut waited_until = end;
            for (place, it) in entries.iter().enumerate().skip(next) {
                if it.asked >= waited_until {
                    break;
                }
                let is_admitted_by_then =
                    it.answer == Answer::Admitted && it.answered <= waited_until;
                if it.asked >= end && !is_admitted_by_then {
                    continue;
                }
                while let Some(loss) = next_losses.next_if(|loss| loss.at <= it.asked) {
                    exact.lose(loss);
                }
                exact.advance(it.asked);
                let there = exact.ask(it, held(entries, place, exact.now()), gather);
                let cost = f64::from(it.cost);
                if it.answer == Answer::Admitted {
                    served += cost;
                }
                if cost <= there {
                    exact.take(cost);
                    // If a request got no response because its replica crashed, its tokens may be lost, so do not add
                    // its cost.
                    if it.answer != Answer::None {
                        due += cost;
                        if it.answer != Answer::Admitted {
                            waited_until = waited_until.max(it.answered);
                        }
                    }
                }
            }
            if served + grain < 0.99 * due {
                return Some(format!(
                    "{served} of {due} tokens served from {} to {} ms",
                    start / MS,
                    end / MS
                ));
            }
        }
        start += STEP;
    }
    None
}

/// Returns a description of a wrong denial by the rate limit, if there is one. A denial is wrong if, under every plan
/// that may apply, the bucket would contain enough tokens even if none of the tokens that Redis ever granted had
/// refilled.
fn dishonest(key: &Key, entries: &[Entry]) -> Option<String> {
    let plans = in_force(key);
    entries.iter().find_map(|it| {
        let in_force = plans
            .iter()
            .filter(|plan| plan.from <= it.answered && it.asked <= plan.until);
        let least = in_force.map(|it| u64::from(it.plan.burst)).min()?;
        let enough = it
            .granted
            .is_some_and(|granted| granted + u64::from(it.cost) <= least);
        (it.answer == Answer::Denied && !it.degraded && enough).then(|| {
            format!(
                "denied with at most {:?} of {least} tokens taken: {it:?}",
                it.granted
            )
        })
    })
}

/// Returns whether anything other than requests changes what the key may use between `from` and `until`.
fn is_eventful(scene: &Scene, key: &Key, from: u64, until: u64) -> bool {
    let overlaps = |begins: u64, ends: u64| begins < until && from < ends;
    scene.faults.iter().any(|fault| {
        overlaps(
            (fault.at * MS).saturating_sub(PATIENCE),
            fault.end() * MS + RECOVERED,
        )
    }) || key
        .plans
        .iter()
        .skip(1)
        .any(|plan| overlaps(plan.from * MS, plan.from * MS + KNOWN))
        || scene
            .changes
            .iter()
            .any(|(at, _)| overlaps(at * MS, at * MS + HELD))
}

/// Returns a description of a denial whose wait is wrong, if there is one. A wait is wrong if a request that costs no
/// more is denied after the wait, although nothing was taken in the meantime. A wait is also wrong if it is longer than
/// an empty bucket takes to refill enough tokens, plus the lifetimes of two leases. A missing wait is wrong if the
/// bucket can hold enough tokens.
fn wrong_wait(scene: &Scene, key: &Key, entries: &[Entry]) -> Option<String> {
    let plans = in_force(key);
    for (place, it) in entries.iter().enumerate() {
        if it.answer != Answer::Denied || it.degraded {
            continue;
        }
        let in_force = || {
            plans
                .iter()
                .filter(|plan| plan.from <= it.answered && it.asked <= plan.until)
                .map(|it| it.plan)
        };
        let Some(wait) = it.retry_after else {
            if in_force().all(|plan| it.cost <= plan.burst) {
                return Some(format!(
                    "denied forever, although the burst is large enough: {it:?}"
                ));
            }
            continue;
        };
        let slowest = in_force().map(|it| it.rate()).fold(f64::MAX, f64::min);
        let longest = f64::from(it.cost) / slowest + 2.0 * TTL.as_nanos() as f64;
        if wait as f64 > longest + MS as f64 {
            return Some(format!("a wait of {} ms is too long: {it:?}", wait / MS));
        }
        // The header states whole seconds, rounded up.
        let mut due = it.answered + wait.div_ceil(SECOND).max(1) * SECOND;
        if in_force().any(|plan| !plan.strict) {
            due += GATHER + scene.round_trip * MS;
        }
        let retry = entries[place..]
            .iter()
            .find(|retry| retry.asked >= due && retry.cost <= it.cost);
        let Some(retry) = retry.filter(|retry| retry.answer == Answer::Denied) else {
            continue;
        };
        // A replica may repeat a denial until the denial expires, even if other replicas have taken nothing in the
        // meantime. The replica may also hold tokens that other replicas cannot get.
        let from = it.asked.saturating_sub(longest as u64 + HELD);
        let is_taken = |other: &Entry| {
            let known_since = match (other.replica == it.replica, retry.replica == it.replica) {
                (true, true) => it.asked,
                (true, false) => it.asked.saturating_sub(HELD),
                (false, _) => from,
            };
            other.answer != Answer::Denied
                && known_since <= other.answered
                && other.asked <= retry.answered
        };
        if !entries.iter().any(is_taken) && !is_eventful(scene, key, from, retry.answered) {
            return Some(format!(
                "denied again after the stated wait: {it:?}, {retry:?}"
            ));
        }
    }
    None
}
