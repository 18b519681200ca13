//! What was promised, recounted from the log of requests alone.
//!
//! Derived from the promises in the contract with the customer, and unaware of how the limiter keeps them. A
//! replica's or Redis's own numbers are used for two things only: a denial is a lie if Redis had never granted
//! enough to empty the bucket, and the books must add up.
//!
//! **Upper bound.** In any window of `T`, at most `burst + rate·(T + ttl)` tokens, and `burst + rate·T` for a strict
//! plan, over all replicas and whatever happens. In the second after an edit replicas may follow either plan, so a
//! window that touches it has the larger burst and at each moment the larger rate of the plans that may be in force;
//! a plan under which the key is not used is not one of them.
//! `share` has one exception, and `closed` none: while some replicas lose Redis
//! (or have all their answers late) and others do not, the former sell their share `p` of the bucket beside the
//! latter, together at most `(1 + p)` times as much. `open` promises nothing for what is admitted without Redis.
//! What is admitted by Redis keeps the plain bound in every mode.
//!
//! **Lower bound.** In any 2 s without a fault and at least [`RECOVERED`] after the last one, at least 99 % of what
//! an exact bucket would serve of the same requests, to a token or two. The bucket starts as full as the admissions
//! before leave it. Of a leased key two kinds of tokens are not counted as there: those that another replica may hold
//! (at most a tenth of the burst and twice what was asked for there just before, for no longer than [`HELD`]), and,
//! once the bucket has run dry, those of the last [`GATHER`], which are taken together and not one by one. Requests that
//! come while Redis is being asked are decided together by the next call, so at the end of a window what refilled in
//! the last round trip may be there unused, of every plan. And Redis hears of an edit with the first request after it:
//! the tokens that refill before count at the lower of the two rates.
#![expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "times of a run and counts of requests are far below 2^52"
)]

use quota_common::plan::OnRedisFailure;
use quota_testkit::envelope::{Envelope, Span};

use super::{
    run::{Answer, DEADLINE, EDIT_KNOWN, Entry, Log, TTL},
    scene::{Change, FaultKind, Key, Plan, Scene},
};

const MS: u64 = 1_000_000;
const FOREVER: u64 = u64::MAX / 4;

/// After a fault: probes find Redis, and buckets that were lost start empty.
const RECOVERED: u64 = 2000 * MS;
/// The lower bound holds in every window as long as this.
const WINDOW: u64 = 2000 * MS;
/// Windows start so often.
const STEP: u64 = 250 * MS;
/// The life of a lease, its return, and as long again twice for denials that other replicas remember.
const HELD: u64 = 350 * MS;
/// So long tokens of a dry bucket may gather before they are taken: half the life of a lease, and the way to Redis and
/// back.
const GATHER: u64 = 60 * MS;
/// A decision waits for Redis at most twice.
const PATIENCE: u64 = 2 * DEADLINE.as_nanos() as u64 + 5 * MS;

/// Which promise was broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Promise {
    Upper,
    Lower,
    /// A 429 although the bucket certainly had the tokens.
    Honest,
    /// An answer took longer than two deadlines.
    Prompt,
    /// Failure modes as the plan chose them, books that add up, and a return to Redis.
    Mode,
}

#[derive(Debug)]
pub(super) struct Violation {
    pub(super) promise: Promise,
    pub(super) text: String,
}

pub(super) fn judge(scene: &Scene, log: &Log) -> Vec<Violation> {
    let mut found = Vec::new();
    for (number, key) in scene.keys.iter().enumerate() {
        let entries: Vec<Entry> = log
            .entries
            .iter()
            .filter(|it| it.key == number)
            .copied()
            .collect();
        let mut broken = |promise, text: String| {
            let text = format!("key {number} ({}): {text}", key.load);
            found.push(Violation { promise, text });
        };
        if let Some(text) = over(scene, key, &entries) {
            broken(Promise::Upper, text);
        }
        if let Some(text) = under(scene, key, &entries) {
            broken(Promise::Lower, text);
        }
        if let Some(text) = dishonest(key, &entries) {
            broken(Promise::Honest, text);
        }
        if let Some(late) = entries.iter().find(|it| it.answered - it.asked > PATIENCE) {
            broken(Promise::Prompt, format!("{late:?}"));
        }
        for it in &entries {
            let wrong = match key.on_failure {
                OnRedisFailure::Closed => it.answer == Answer::Admitted && it.degraded,
                _ => it.answer == Answer::Unavailable,
            };
            if wrong {
                broken(Promise::Mode, format!("{it:?}"));
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
            broken(Promise::Mode, text);
        }
    }
    for (taken, spent, gone) in &log.books {
        if *taken != spent + gone {
            found.push(Violation {
                promise: Promise::Mode,
                text: format!("{taken} tokens taken, {spent} spent, {gone} returned or lost"),
            });
        }
    }
    if !log.degraded.is_empty() {
        found.push(Violation {
            promise: Promise::Mode,
            text: format!("replicas {:?} do not come back to Redis", log.degraded),
        });
    }
    found
}

/// A plan with the time in which it may be in force, nanoseconds since the load began.
struct InForce {
    plan: Plan,
    from: u64,
    until: u64,
}

/// How long after an edit the plan before may be followed, and its tokens be spent.
fn known() -> u64 {
    EDIT_KNOWN.as_nanos() as u64 + TTL.as_nanos() as u64
}

fn in_force(key: &Key) -> Vec<InForce> {
    let plans = key.plans.iter().enumerate();
    plans
        .map(|(n, plan)| InForce {
            plan: *plan,
            from: plan.from * MS,
            until: key
                .plans
                .get(n + 1)
                .map_or(FOREVER, |next| next.from * MS + known()),
        })
        .collect()
}

/// The plans that buckets have followed. An edit reaches a bucket with the first request after it, and until then the
/// bucket refills as before, so a plan under which no request came was never in force. Redis hears of an edit from
/// whichever replica is asked first. A `share` is its replica's own: it hears of an edit when that replica is asked.
fn followed(key: &Key, entries: &[Entry], shares: bool) -> Vec<InForce> {
    let after = |plan: usize, replica: Option<usize>| {
        let of = |it: &&Entry| replica.is_none_or(|replica| it.replica == replica);
        let later = entries.iter().filter(of).filter(|it| it.plan > plan);
        let next = later.map(|it| it.plan).min();
        next.map(|next| key.plans[next].from * MS + known())
    };
    let plans = key.plans.iter().enumerate();
    let used = plans.filter(|(n, _)| entries.iter().any(|it| it.plan == *n));
    used.map(|(n, plan)| {
        let followers = entries.iter().filter(|it| shares && it.plan == n);
        let by_shares = followers.filter_map(|it| after(n, Some(it.replica))).max();
        InForce {
            plan: *plan,
            from: plan.from * MS,
            until: after(n, None).max(by_shares).unwrap_or(FOREVER),
        }
    })
    .collect()
}

/// A time in which some replicas sell their share beside Redis, and the part of a bucket that they sell.
struct Beside {
    from: u64,
    until: u64,
    part: f64,
}

/// Tokens that refill from the start until then, at the highest rate of the plans that may be in force, and faster
/// where shares are sold `beside` Redis.
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

/// When replicas that alone have lost Redis sell beside it: during the fault, and until they have returned.
fn beside(scene: &Scene, key: &Key) -> Vec<Beside> {
    if key.on_failure != OnRedisFailure::Share {
        return Vec::new();
    }
    let (least, all) = scene.replica_bounds();
    let part = |plan: &Plan| f64::from(plan.burst.div_ceil(least as u32)) / f64::from(plan.burst);
    let part = key.plans.iter().map(part).fold(0.0, f64::max);
    let alone = scene.faults.iter().filter_map(|fault| {
        let (FaultKind::CutSome { replicas, .. }
        | FaultKind::Late {
            replicas,
            percent: 100,
            ..
        }
        | FaultKind::Lost {
            replicas,
            percent: 100,
        }) = fault.kind
        else {
            return None;
        };
        let alone = (0..all).filter(|it| replicas.contains(*it)).count();
        (alone < all).then(|| Beside {
            from: fault.at * MS,
            until: fault.end() * MS + RECOVERED,
            part: part * alone as f64,
        })
    });
    alone.collect()
}

fn over(scene: &Scene, key: &Key, entries: &[Entry]) -> Option<String> {
    let admitted = || entries.iter().filter(|it| it.answer == Answer::Admitted);
    let by_redis: Vec<&Entry> = admitted().filter(|it| !it.degraded).collect();
    let all: Vec<&Entry> = admitted().collect();
    let found = worst(&followed(key, entries, false), &by_redis, &[])
        .map(|text| format!("by Redis alone, {text}"));
    if found.is_some() || key.on_failure == OnRedisFailure::Open {
        return found;
    }
    let beside = beside(scene, key);
    let plans = followed(key, entries, key.on_failure == OnRedisFailure::Share);
    // Windows that touch no time in which shares are sold beside Redis.
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

/// The window that is most above the promise, if any is. More is allowed where shares are sold `beside` Redis.
fn worst(plans: &[InForce], admitted: &[&Entry], beside: &[Beside]) -> Option<String> {
    /// A token, in the time that the checker runs on: one in which tokens refill evenly.
    const TOKEN: f64 = 1e9;
    let part = beside.iter().map(|it| it.part).fold(0.0, f64::max);
    for first in 0..plans.len() {
        for last in first..plans.len() {
            // Windows that touch no other plan.
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
            // Redis tells microseconds.
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

/// The least that a key's plans promise from a time on.
#[derive(Debug, Clone, Copy)]
struct Least {
    from: u64,
    rate: f64,
    burst: f64,
    /// The largest burst of them: more than that need not refill before the bucket is full.
    most: f64,
    /// The largest burst so far: more than that cannot be missing.
    ever: f64,
    leased: bool,
    /// Tokens that may be lost then: leases of a plan that was edited.
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

/// An exact bucket, in tokens.
#[derive(Debug, Clone)]
struct Bucket<'a> {
    pieces: &'a [Least],
    piece: usize,
    at: u64,
    missing: f64,
    /// Missing beyond an empty bucket, since the burst was larger. It is still missing when the burst is larger again,
    /// less what would have refilled while the bucket was full.
    beyond: f64,
    /// Tokens that refilled since it was emptied, less those taken. A larger burst that comes later is not there before.
    refilled: f64,
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
        let crossed = &self.pieces[self.piece..=last];
        let rate = crossed.iter().map(|it| it.rate).fold(f64::MAX, f64::min);
        while self.piece < last {
            self.refill(self.pieces[self.piece + 1].from, rate);
            self.piece += 1;
            self.take(self.now().lost);
        }
        self.refill(to, rate);
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
        self.refilled -= cost;
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

/// Tokens that other replicas may hold when this request comes.
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

fn under(scene: &Scene, key: &Key, entries: &[Entry]) -> Option<String> {
    let pieces = least(key, scene.replica_bounds().1);
    // Not to be counted: faults and what follows them.
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
    // A bucket may be empty then.
    let mut emptied: Vec<u64> = faults.iter().map(|(_, end)| *end).collect();
    let crash = |(at, change): &(u64, Change)| matches!(change, Change::Crash(_)).then(|| at * MS);
    emptied.extend(scene.changes.iter().filter_map(crash));
    emptied.sort_unstable();

    let dearest = entries.iter().map(|it| it.cost).max()?;
    let fastest = key.plans.iter().map(Plan::rate).fold(0.0, f64::max);
    let grain = f64::from(dearest) + 1.0 + fastest * (scene.round_trip * MS) as f64;
    let mut bucket = Bucket {
        pieces: &pieces,
        piece: 0,
        at: 0,
        missing: 0.0,
        beyond: 0.0,
        refilled: f64::INFINITY,
    };
    let mut next = 0;
    let mut empties = emptied.iter().copied().peekable();
    let mut start = 0;
    while start + WINDOW <= scene.length * MS {
        // What was really admitted until then.
        while next < entries.len() && entries[next].asked < start {
            let it = entries[next];
            while let Some(at) = empties.next_if(|at| *at <= it.asked) {
                bucket.advance(at);
                bucket.empty();
            }
            bucket.advance(it.asked);
            if it.answer == Answer::Admitted {
                bucket.take(f64::from(it.cost));
            }
            next += 1;
        }
        while let Some(at) = empties.next_if(|at| *at <= start) {
            bucket.advance(at);
            bucket.empty();
        }
        let end = start + WINDOW;
        if !faults
            .iter()
            .any(|(from, until)| *from < end && start < *until)
        {
            let (mut exact, mut due, mut served) = (bucket.clone(), 0.0, 0.0);
            // It had run dry just before.
            let gather = GATHER + scene.round_trip * MS;
            let mut dry = entries[..next]
                .iter()
                .rev()
                .take_while(|it| it.asked + gather >= start)
                .any(|it| it.answer == Answer::Denied);
            let mut empties = empties.clone();
            for (place, it) in entries.iter().enumerate().skip(next) {
                if it.asked >= end {
                    break;
                }
                while let Some(at) = empties.next_if(|at| *at <= it.asked) {
                    exact.advance(at);
                    exact.empty();
                }
                exact.advance(it.asked);
                let cost = f64::from(it.cost);
                match it.answer {
                    Answer::None => continue,
                    Answer::Admitted => served += cost,
                    Answer::Denied | Answer::Unavailable => {}
                }
                let least = exact.now();
                let mut level = exact.level() - held(entries, place, least);
                if dry && least.leased {
                    level -= (least.rate * gather as f64).min(least.burst / 10.0);
                }
                if cost > level {
                    dry |= cost <= least.burst;
                } else {
                    exact.take(cost);
                    due += cost;
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

/// A denial by the rate, although all that Redis ever granted leaves enough in the bucket.
fn dishonest(key: &Key, entries: &[Entry]) -> Option<String> {
    let least = key.plans.iter().map(|plan| u64::from(plan.burst)).min()?;
    let lie = entries.iter().find(|it| {
        let enough = it
            .granted
            .is_some_and(|granted| granted + u64::from(it.cost) <= least);
        it.answer == Answer::Denied && !it.degraded && enough
    })?;
    Some(format!(
        "denied with at most {:?} of {least} tokens gone: {lie:?}",
        lie.granted
    ))
}
