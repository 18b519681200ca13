//! Tests of calendar quotas while the tenant's time zone changes.
//!
//! The oracle is derived from the documented behavior, not from the code. It keeps the windows with usage, ordered by
//! start. A request inside the last window belongs to that window. Any other request opens a new window. This window
//! starts at the end of the last window, or at the start of the day or month in the zone if that is later. It ends with
//! that day or month. The window's quota is proportional to its length. Days and months are computed from fixed
//! offsets.

use std::time::Duration;

use chrono::{DateTime, Datelike, Months, NaiveTime, TimeDelta, Utc};
use quota_server::{
    clock::UnixNanos,
    limiter::{Decision, Policy, PolicyState},
};

use super::world::{self, Key, Plan, START, World, settle};

const HOUR: u64 = 3_600_000_000_000;
/// Zones without daylight saving time, and their offsets in minutes.
const ZONES: [(&str, i64); 6] = [
    ("UTC", 0),
    ("Asia/Tokyo", 540),
    ("Pacific/Honolulu", -600),
    ("Pacific/Kiritimati", 840),
    ("Pacific/Pago_Pago", -660),
    ("Asia/Kolkata", 330),
];

fn at(text: &str) -> UnixNanos {
    let at: DateTime<Utc> = text.parse().unwrap();
    UnixNanos(u64::try_from(at.timestamp_nanos_opt().unwrap()).unwrap())
}

fn hours(hours: u64) -> Duration {
    Duration::from_hours(hours)
}

/// Returns the day or month that contains `now`, for a UTC offset of `minutes`.
fn calendar(policy: Policy, minutes: i64, now: UnixNanos) -> (u64, u64) {
    let offset = TimeDelta::minutes(minutes);
    let local = DateTime::from_timestamp_nanos(i64::try_from(now.0).unwrap()) + offset;
    let midnight = |date: chrono::NaiveDate| {
        let instant = date.and_time(NaiveTime::MIN).and_utc() - offset;
        u64::try_from(instant.timestamp_nanos_opt().unwrap()).unwrap()
    };
    let today = local.date_naive();
    if policy == Policy::Daily {
        (midnight(today), midnight(today.succ_opt().unwrap()))
    } else {
        let first = today.with_day(1).unwrap();
        (midnight(first), midnight(first + Months::new(1)))
    }
}

#[derive(Debug, Clone, Copy)]
struct Opened {
    start: u64,
    end: u64,
    quota: u64,
    admitted: u64,
}

/// The windows of one policy.
struct Oracle {
    policy: Policy,
    limit: u64,
    /// Whether only the requesting replica holds unspent tokens, so that the rules at the top of this file determine
    /// the next window. Otherwise, the oracle accepts the window that a decision states, which must not overlap any
    /// other.
    is_strict: bool,
    windows: Vec<Opened>,
}

impl Oracle {
    fn new(policy: Policy, limit: u64, is_strict: bool) -> Self {
        Self {
            policy,
            limit,
            is_strict,
            windows: Vec::new(),
        }
    }

    /// Returns the window of a request, and whether the window is already open.
    fn window(&self, minutes: i64, now: UnixNanos) -> (Opened, bool) {
        let last = self.windows.last().copied();
        if let Some(last) = last.filter(|last| now.0 < last.end) {
            return (last, true);
        }
        let (begin, end) = calendar(self.policy, minutes, now);
        let start = last.map_or(begin, |last| last.end.max(begin));
        let part = u128::from(self.limit) * u128::from(end - start);
        let opened = Opened {
            start,
            end,
            quota: u64::try_from(part.div_ceil(u128::from(end - begin))).unwrap(),
            admitted: 0,
        };
        (opened, false)
    }

    /// Returns whether the stated window ends with a day or month of some zone, and has a proportional quota.
    fn is_in_proportion(&self, state: PolicyState) -> bool {
        ZONES.iter().any(|(_, minutes)| {
            let (begin, end) = calendar(self.policy, *minutes, UnixNanos(state.reset_at.0 - 1));
            let length = state
                .shortened_to
                .map_or(end - begin, |it| u64::from(it.get()) * 1_000_000_000);
            let part = u128::from(self.limit) * u128::from(length);
            end == state.reset_at.0
                && u128::from(state.limit) == part.div_ceil(u128::from(end - begin))
        })
    }

    /// Checks a decision. At most `stranded` tokens of the quota may be unavailable.
    fn check(&mut self, minutes: i64, decision: &Decision, cost: u64, stranded: u64) {
        let (mut window, is_open) = self.window(minutes, decision.at);
        let state = of(self.policy, decision);
        if !is_open && !self.is_strict {
            assert!(decision.at < state.reset_at && state.limit <= self.limit);
            (window.end, window.quota) = (state.reset_at.0, state.limit);
            assert!(self.is_in_proportion(state), "{state:?}, {self:?}");
        }
        if is_open || decision.is_allowed() {
            assert_eq!(state.reset_at.0, window.end, "{self:?}");
            assert_eq!(state.limit, window.quota, "{self:?}");
            let length = (window.end - window.start) / 1_000_000_000;
            let (begin, end) = calendar(self.policy, minutes, UnixNanos(window.start));
            if self.is_strict && !is_open {
                let is_whole = window.start == begin && window.end == end;
                let stated = state.shortened_to.map(|it| u64::from(it.get()));
                assert_eq!(stated, (!is_whole).then_some(length));
            }
        }
        if decision.is_allowed() {
            window.admitted += cost;
            assert!(
                window.admitted <= window.quota,
                "more than the quota is admitted: {window:?}"
            );
            if is_open {
                self.windows.pop();
            }
            self.windows.push(window);
        } else if decision.violated().contains(self.policy) && is_open {
            let left = window.quota - window.admitted;
            assert!(
                left < cost + stranded,
                "{left} of {window:?} are left, {stranded} of them stranded, and {cost} is denied"
            );
        }
    }
}

impl std::fmt::Debug for Oracle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let last = &self.windows[self.windows.len().saturating_sub(3)..];
        write!(f, "{:?} {last:?}", self.policy)
    }
}

fn of(policy: Policy, decision: &Decision) -> PolicyState {
    let state = match policy {
        Policy::Daily => decision.daily,
        _ => decision.monthly,
    };
    state.expect("the plan has this quota")
}

/// Asserts that no two windows with usage overlap.
fn no_windows_overlap(world: &World) {
    let owners = world.ledger.used_windows();
    assert!(!owners.is_empty(), "nothing was used");
    for rows in owners {
        for pair in rows.windows(2) {
            let (before, after) = (pair[0].window.span, pair[1].window.span);
            assert!(before.end <= after.start, "{before:?} and {after:?}");
        }
    }
}

/// Plays random requests, waits, zone changes, restarts and crashes on `replicas` replicas. Each replica learns of a
/// zone change at a random time.
async fn play(seed: u64, replicas: usize) -> u64 {
    let mut random = fastrand::Rng::with_seed(seed);
    let world = world::memory();
    let start = || Key::of(&world.start());
    let mut keys: Vec<_> = (0..replicas).map(|_| start()).collect();
    let mut known = vec![0; replicas];
    let mut zone = 0;
    let (daily, monthly) = (random.u64(1..70), random.u64(30..700));
    let is_strict = replicas == 1 && seed.is_multiple_of(2);
    let mut oracles = [
        Oracle::new(Policy::Daily, daily, is_strict),
        Oracle::new(Policy::Monthly, monthly, is_strict),
    ];
    // The block size of the larger quota.
    let block = (monthly / 100).max(1);
    // The tokens that the other replicas may hold, and the number of crashes, each of which may strand tokens.
    let held = block * (replicas as u64 - 1);
    let mut crashes = 0;
    let mut admitted = 0;
    for _ in 0..80 {
        match random.u8(0..20) {
            0..=3 => zone = random.usize(0..ZONES.len()),
            4..=8 => world.advance(Duration::from_secs(random.u64(0..20 * 3600))),
            9 => world.advance(Duration::from_secs(random.u64(0..20 * 86_400))),
            // Advance to about the end of a day in some zone.
            10 => {
                let (_, minutes) = ZONES[random.usize(0..ZONES.len())];
                let (_, end) = calendar(Policy::Daily, minutes, world.now());
                let nanos = end - world.now().0 + random.u64(0..3);
                world.advance(Duration::from_nanos(nanos - 1));
            }
            11 => {
                let n = random.usize(0..replicas);
                settle().await;
                assert_eq!(keys[n].limiter.drain().await.lost, 0);
                keys[n] = start();
            }
            12 if !is_strict => {
                settle().await;
                keys[random.usize(0..replicas)] = start();
                crashes += 1;
            }
            _ => {
                let n = random.usize(0..replicas);
                if known[n] != zone && random.bool() {
                    known[n] = zone;
                }
                let (name, minutes) = ZONES[known[n]];
                let plan = Plan::any_rate().daily(daily).monthly(monthly).zone(name);
                for _ in 0..random.u8(1..40) {
                    // Unspent tokens of another replica keep a window open even if no request in it was allowed.
                    // Therefore, requests cost 1 if there are several replicas.
                    let cost = if replicas == 1 { random.u32(1..4) } else { 1 };
                    let decision = keys[n].ask(&plan, cost).await;
                    let stranded = held + (block + 3) * crashes;
                    for oracle in &mut oracles {
                        oracle.check(minutes, &decision, u64::from(cost), stranded);
                    }
                    admitted += u64::from(decision.is_allowed());
                }
            }
        }
    }
    no_windows_overlap(&world);
    // In the long run, at most one quota per day or month is granted, however often the zone changes. Only the first
    // window and rounding up may add to this.
    for oracle in &oracles {
        let windows = &oracle.windows;
        let sold: u64 = windows.iter().map(|it| it.admitted).sum();
        let day = if oracle.policy == Policy::Daily {
            24 * HOUR
        } else {
            28 * 24 * HOUR
        };
        let span = windows.last().unwrap().end - windows[0].start;
        let rate = u128::from(oracle.limit) * u128::from(span) / u128::from(day);
        assert!(u128::from(sold) <= rate + windows.len() as u128 + u128::from(oracle.limit));
    }
    admitted
}

#[test]
fn no_schedule_of_zone_changes_grants_more_or_less_than_the_quota() {
    for replicas in [1, 2, 3] {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        let mut admitted = 0;
        for seed in 0..250 {
            admitted += runtime.block_on(play(1000 * replicas as u64 + seed, replicas));
        }
        assert!(
            admitted > 250 * 100,
            "hardly anything was admitted: {admitted}"
        );
    }
}

#[tokio::test]
async fn window_after_a_change_is_shortened_with_a_quota_in_proportion() {
    let world = world::memory();
    let key = Key::of(&world.start());
    let plan = |zone| Plan::any_rate().daily(50).zone(zone);
    assert_eq!(key.admitted(&plan("UTC"), 1).await, 1);
    let state = key.ask(&plan("Asia/Tokyo"), 1).await.daily.unwrap();
    assert_eq!((state.limit, state.shortened_to), (50, None));
    assert_eq!(state.reset_at, at("2026-11-25T00:00:00Z"));

    // From midnight UTC to midnight in Tokyo, 15 hours of a 24-hour day pass.
    world.advance(hours(14));
    let state = key.ask(&plan("Asia/Tokyo"), 1).await.daily.unwrap();
    assert_eq!(state.limit, 32);
    assert_eq!(state.shortened_to.unwrap().get(), 15 * 3600);
    assert_eq!(state.reset_at, at("2026-11-25T15:00:00Z"));
    assert_eq!(key.admitted(&plan("Asia/Tokyo"), 60).await, 31);

    world.advance(hours(15));
    let state = key.ask(&plan("Asia/Tokyo"), 1).await.daily.unwrap();
    assert_eq!((state.limit, state.shortened_to), (50, None));
    assert_eq!(state.reset_at, at("2026-11-26T15:00:00Z"));
    assert_eq!(key.admitted(&plan("Asia/Tokyo"), 60).await, 49);
}

#[tokio::test]
async fn change_applies_immediately_if_nothing_was_used() {
    let world = world::memory();
    let limiter = world.start();
    let plan = |zone| Plan::any_rate().daily(50).zone(zone);
    let key = Key::of(&limiter);
    // The request was denied, so nothing was used, although the ledger was called.
    assert!(!key.ask(&plan("UTC"), 51).await.is_allowed());
    let state = key.ask(&plan("Asia/Tokyo"), 1).await.daily.unwrap();
    assert_eq!((state.limit, state.shortened_to), (50, None));
    assert_eq!(state.reset_at, at("2026-11-24T15:00:00Z"));
    assert_eq!(key.admitted(&plan("Asia/Tokyo"), 60).await, 49);
    // Another key of the tenant has its own window.
    let other = Key::number(&limiter, 8);
    let state = other.ask(&plan("Pacific/Honolulu"), 1).await.daily.unwrap();
    assert_eq!(state.reset_at, at("2026-11-25T10:00:00Z"));
}

#[tokio::test]
async fn only_the_last_change_before_the_window_ends_counts() {
    let world = world::memory();
    let key = Key::of(&world.start());
    let plan = |zone| Plan::any_rate().daily(24).zone(zone);
    for zone in [
        "UTC",
        "Asia/Tokyo",
        "Pacific/Honolulu",
        "Asia/Kolkata",
        "UTC",
    ] {
        key.ask(&plan(zone), 1).await;
    }
    world.advance(hours(14));
    let state = key.ask(&plan("UTC"), 1).await.daily.unwrap();
    assert_eq!((state.limit, state.shortened_to), (24, None));
    assert_eq!(state.reset_at, at("2026-11-26T00:00:00Z"));
}

#[tokio::test]
async fn days_of_23_and_25_hours_and_months_are_cut_in_proportion() {
    let world = world::memory();
    let limiter = world.start();
    world.clock.set_now(at("2026-03-28T12:00:00Z"));
    let plan = |zone| Plan::any_rate().daily(2300).monthly(7430).zone(zone);
    let key = Key::of(&limiter);
    key.ask(&plan("UTC"), 1).await;
    // March 29 has 23 hours in Berlin and begins at 23:00Z. At midnight UTC, 22 of these hours are left.
    world.clock.set_now(at("2026-03-29T00:00:00Z"));
    let decision = key.ask(&plan("Europe/Berlin"), 1).await;
    let daily = decision.daily.unwrap();
    assert_eq!(daily.limit, 2200);
    assert_eq!(daily.reset_at, at("2026-03-29T22:00:00Z"));
    // The month is still the full UTC month.
    let monthly = decision.monthly.unwrap();
    assert_eq!((monthly.limit, monthly.shortened_to), (7430, None));
    assert_eq!(monthly.reset_at, at("2026-04-01T00:00:00Z"));
    // April has 720 hours in Berlin and began two hours before midnight UTC.
    world.clock.set_now(at("2026-04-01T00:00:00Z"));
    let monthly = key.ask(&plan("Europe/Berlin"), 1).await.monthly.unwrap();
    assert_eq!(monthly.limit, (7430 * 718_u64).div_ceil(720));
    assert_eq!(monthly.shortened_to.unwrap().get(), 718 * 3600);
    assert_eq!(monthly.reset_at, at("2026-04-30T22:00:00Z"));

    // October 25 has 25 hours in Berlin and begins at 22:00Z. At midnight UTC, 23 of these hours are left.
    let key = Key::number(&limiter, 8);
    world.clock.set_now(at("2026-10-24T12:00:00Z"));
    key.ask(&plan("UTC").daily(2500), 1).await;
    world.clock.set_now(at("2026-10-25T00:00:00Z"));
    let daily = key.ask(&plan("Europe/Berlin").daily(2500), 1).await;
    assert_eq!(daily.daily.unwrap().limit, 2300);
}

#[tokio::test]
async fn edited_quota_scales_a_shortened_window() {
    let world = world::memory();
    let key = Key::of(&world.start());
    let plan = |quota, zone| Plan::any_rate().daily(quota).zone(zone);
    key.ask(&plan(240, "UTC"), 1).await;
    world.advance(hours(14));
    // The window has 15 hours of a 24-hour day.
    assert_eq!(key.admitted(&plan(240, "Asia/Tokyo"), 100).await, 100);
    let state = key.ask(&plan(480, "Asia/Tokyo"), 1).await.daily.unwrap();
    assert_eq!((state.limit, state.remaining), (300, 199));
    let state = key.ask(&plan(160, "Asia/Tokyo"), 1).await.daily.unwrap();
    assert_eq!((state.limit, state.remaining), (100, 0));
    assert_eq!(key.admitted(&plan(168, "Asia/Tokyo"), 100).await, 4);
}

#[tokio::test]
async fn cost_above_a_shortened_quota_waits_for_the_next_window() {
    let world = world::memory();
    let key = Key::of(&world.start());
    let plan = |zone| Plan::any_rate().daily(50).zone(zone);
    key.ask(&plan("UTC"), 1).await;
    world.advance(hours(14));
    let denied = key.ask(&plan("Asia/Tokyo"), 40).await;
    assert!(!denied.is_allowed());
    assert_eq!(denied.retry_after(), Some(15 * HOUR));
    world.advance(hours(15));
    assert!(key.ask(&plan("Asia/Tokyo"), 40).await.is_allowed());
}

#[tokio::test]
async fn change_survives_restarts_and_reaches_replicas_that_do_not_know_of_it() {
    let world = world::memory();
    let plan = |zone| Plan::any_rate().daily(50).zone(zone);
    let mut admitted = 0;
    for zone in ["UTC", "Asia/Tokyo", "Pacific/Honolulu", "UTC"] {
        let key = Key::of(&world.start());
        admitted += key.admitted(&plan(zone), 15).await;
        assert_eq!(key.limiter.drain().await.lost, 0);
    }
    assert_eq!(admitted, 50);
    // A replica that knows of the change opens the new day. The other replica still has the old zone.
    world.advance(hours(14));
    let (knows, does_not) = (Key::of(&world.start()), Key::of(&world.start()));
    let mut admitted = 0;
    for _ in 0..30 {
        admitted += knows.admitted(&plan("Asia/Tokyo"), 1).await;
        admitted += does_not.admitted(&plan("UTC"), 1).await;
    }
    assert!((31..=32).contains(&admitted), "{admitted}");
    let state = does_not.ask(&plan("UTC"), 1).await.daily.unwrap();
    assert_eq!(state.reset_at, at("2026-11-25T15:00:00Z"));
    no_windows_overlap(&world);
}

#[tokio::test]
async fn prefetched_block_gives_way_to_a_change_of_zone() {
    let world = world::memory();
    let key = Key::of(&world.start());
    let plan = |zone| Plan::any_rate().daily(2400).zone(zone);
    assert_eq!(key.admitted(&plan("UTC"), 100).await, 100);
    world.advance(Duration::from_mins(14 * 60 - 1));
    key.limiter.prune();
    settle().await;
    let ahead: u64 = world.ledger.used_windows()[0]
        .iter()
        .filter(|row| row.window.span.start == at("2026-11-25T00:00:00Z"))
        .map(|row| row.used)
        .sum();
    assert_eq!(ahead, 24, "a block of the next day");
    // The block is returned with the first request in the new zone.
    key.ask(&plan("Asia/Tokyo"), 1).await;
    settle().await;
    world.advance(Duration::from_secs(60));
    let state = key.ask(&plan("Asia/Tokyo"), 1).await.daily.unwrap();
    assert_eq!(state.limit, 1500);
    assert_eq!(key.admitted(&plan("Asia/Tokyo"), 1600).await, 1499);
    assert!(START < world.now());
    no_windows_overlap(&world);
}
