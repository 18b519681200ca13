//! The scene that a seed generates: keys with their plans and edits, the load, replicas that join and leave, and
//! faults.
//!
//! A scene is a pure function of the seed. Times are in milliseconds since the load began.

use std::num::NonZeroU64;

use fastrand::Rng;
use quota_common::plan::OnRedisFailure;

use super::run::key_id;

/// The approximate maximum number of requests per key in ordinary scenes, so that a seed takes only milliseconds.
const REQUESTS_MAX: usize = 700;

#[derive(Debug, Clone)]
pub(super) struct Scene {
    pub(super) seed: u64,
    /// The number of replicas at the start. Replicas that join later get the next indices.
    pub(super) replicas: usize,
    /// The usual round-trip time between a replica and Redis.
    pub(super) round_trip: u64,
    /// The number of partitions of the cluster. All faults affect all partitions.
    pub(super) partitions: u16,
    /// The time in which the ledger of quotas responds.
    pub(super) ledger_delay: u64,
    pub(super) keys: Vec<Key>,
    pub(super) changes: Vec<(u64, Change)>,
    pub(super) faults: Vec<Fault>,
    pub(super) length: u64,
    /// The load, in chronological order.
    pub(super) load: Load,
}

#[derive(Clone)]
pub(super) struct Load(pub(super) Vec<Request>);

impl std::fmt::Debug for Load {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} requests", self.0.len())
    }
}

#[derive(Debug, Clone)]
pub(super) struct Key {
    pub(super) on_failure: OnRedisFailure,
    /// The plan and its edits, in chronological order; the first applies from the start.
    pub(super) plans: Vec<Plan>,
    /// The quota per day and the quota per month.
    pub(super) quotas: [Option<NonZeroU64>; 2],
    pub(super) load: &'static str,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    pub(super) from: u64,
    pub(super) rpm: u32,
    pub(super) burst: u32,
    pub(super) strict: bool,
}

impl Plan {
    /// Tokens per nanosecond.
    pub(super) fn rate(&self) -> f64 {
        f64::from(self.rpm) / 60e9
    }
}

/// A change to the set of replicas, or to what one of them knows about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    Join,
    /// A clean stop: no new requests, then draining.
    Leave(usize),
    Crash(usize),
    /// The replica can no longer reach PostgreSQL, so its count of replicas becomes outdated.
    StopCounting(usize),
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Fault {
    pub(super) at: u64,
    pub(super) lasts: u64,
    pub(super) kind: FaultKind,
}

impl Fault {
    pub(super) fn end(&self) -> u64 {
        self.at + self.lasts
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FaultKind {
    /// Redis freezes, keeps its state, and then processes the calls that have arrived.
    Stall,
    /// Some calls are delayed in each direction, by up to the given number of milliseconds.
    Slow(u64),
    /// Redis processes the call, but the response is delayed by `by`. Affects a percentage of the calls of the given
    /// replicas.
    Late {
        replicas: Replicas,
        by: u64,
        percent: u8,
    },
    /// Redis processes the call, but the response never arrives.
    Lost { replicas: Replicas, percent: u8 },
    /// Redis is killed and restarts empty.
    Restart,
    /// A replica of Redis that lags behind takes over; its clock is ahead.
    FailOver,
    /// No calls arrive at Redis, from any replica.
    Cut,
    /// All calls arrive, and no responses come back.
    Deaf,
    /// The given replicas do not reach Redis: calls get no response, or connections are refused.
    CutSome { replicas: Replicas, refused: bool },
}

/// A set of initial replicas, with one bit for each replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Replicas(pub(super) u32);

impl Replicas {
    pub(super) fn contains(self, replica: usize) -> bool {
        replica < 32 && self.0 & (1 << replica) != 0
    }

    fn some(rng: &mut Rng, of: usize) -> Self {
        let all = (1 << of) - 1;
        Self((rng.u32(..) & all).max(1))
    }
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Request {
    pub(super) at: u64,
    pub(super) key: usize,
    pub(super) cost: u32,
    /// Selects one of the replicas that are running at the time `at`.
    pub(super) pick: usize,
}

impl Scene {
    pub(super) fn of(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let replicas = rng.usize(1..=4);
        let mut scene = Self {
            seed,
            replicas,
            round_trip: [0, 2, 5, 10, 20][rng.usize(..5)],
            partitions: 1,
            ledger_delay: 0,
            keys: Vec::new(),
            changes: Vec::new(),
            faults: Vec::new(),
            length: 8000,
            load: Load(Vec::new()),
        };
        // Draw from a separate generator, so that a seed that selects none of the scenes below produces the same scene
        // as before those scenes were added.
        match Rng::with_seed(seed ^ 0x005C_E9E5).u8(..24) {
            0 | 1 => {
                scene.long_outage(&mut rng);
                return scene;
            }
            2 => {
                scene.cluster(&mut rng);
                return scene;
            }
            _ => {}
        }
        let special = rng.u8(..28);
        if special == 0 {
            scene.miscounted_outage(&mut rng);
        } else if special < 7 || special == 27 {
            match special {
                27 => scene.unseen_edit(&mut rng),
                1 | 2 => scene.late_returns(&mut rng),
                3 | 4 => scene.slow_for_all(&mut rng),
                _ => scene.edited_outage(&mut rng),
            }
            scene.load.0.sort_by_key(|request| request.at);
            return scene;
        } else {
            if rng.u8(..5) < 2 {
                scene.membership(&mut rng);
            }
            if rng.u8(..3) < 2 {
                scene.misfortunes(&mut rng);
            }
        }
        for key in 0..rng.usize(1..=4) {
            let on_failure = match rng.u8(..8) {
                0..=1 => OnRedisFailure::Closed,
                2 => OnRedisFailure::Open,
                _ => OnRedisFailure::Share,
            };
            let mut plans = vec![plan(&mut rng, 0)];
            if rng.u8(..3) == 0 {
                for edit in 0..rng.u64(1..=2) {
                    let at = 1500 + edit * 3000 + rng.u64(..1500);
                    plans.push(plan(&mut rng, at));
                }
            }
            let load = load(&mut rng, key, plans[0], scene.length, &mut scene.load.0);
            scene.keys.push(Key {
                on_failure,
                plans,
                quotas: [None; 2],
                load,
            });
        }
        scene.load.0.sort_by_key(|request| request.at);
        scene
    }

    /// Replicas join, stop or crash at any time.
    fn membership(&mut self, rng: &mut Rng) {
        let mut gone = 0;
        for _ in 0..rng.usize(1..=3) {
            let at = rng.u64(..self.length);
            let leaver = self.replicas - 1 - gone.min(self.replicas - 1);
            let change = match rng.u8(..3) {
                0 if leaver > 0 => Change::Leave(leaver),
                1 if leaver > 0 => Change::Crash(leaver),
                _ => Change::Join,
            };
            gone += usize::from(change != Change::Join);
            self.changes.push((at, change));
        }
        self.changes.sort_by_key(|(at, _)| *at);
    }

    fn misfortunes(&mut self, rng: &mut Rng) {
        let mut at = rng.u64(..2500);
        for _ in 0..rng.usize(1..=2) {
            let fault = fault(rng, at, self.replicas);
            at = fault.end() + rng.u64(..3000);
            self.faults.push(fault);
        }
    }

    /// One replica loses PostgreSQL, so it does not learn that another replica joins. Then Redis becomes unavailable.
    fn miscounted_outage(&mut self, rng: &mut Rng) {
        let at = rng.u64(..500);
        self.length = 10_000;
        self.changes = vec![
            (at, Change::StopCounting(0)),
            (at + rng.u64(1..=1200), Change::Join),
        ];
        self.faults.push(Fault {
            at: at + rng.u64(2500..7000),
            lasts: rng.u64(1000..2500),
            kind: FaultKind::Cut,
        });
    }

    /// Sends requests to one replica, to which Redis responds too late, so the granted tokens are returned. Then sends
    /// requests to other replicas: the returned tokens must not be available twice.
    fn late_returns(&mut self, rng: &mut Rng) {
        self.replicas = rng.usize(2..=4);
        let plan = Plan {
            from: 0,
            rpm: [6000, 20_000, 60_000][rng.usize(..3)],
            burst: rng.u32(20..=300),
            strict: rng.bool(),
        };
        self.keys.push(Key {
            on_failure: OnRedisFailure::Closed,
            plans: vec![plan],
            quotas: [None; 2],
            load: "late returns",
        });
        let mut at = rng.u64(50..300);
        for _ in 0..3 {
            let by = rng.u64(31..400);
            self.faults.push(Fault {
                at,
                lasts: by,
                kind: FaultKind::Late {
                    replicas: Replicas(1),
                    by,
                    percent: 100,
                },
            });
            let mut send = |at, count, replica| {
                for _ in 0..count {
                    self.load.0.push(Request {
                        at,
                        key: 0,
                        cost: 1,
                        pick: replica,
                    });
                }
            };
            // Some of the tokens that these requests take refill before the other replicas get requests.
            send(at, plan.burst * rng.u32(20..=100) / 100, 0);
            for part in 0..rng.u32(2..=8) {
                let others = rng.usize(1..self.replicas);
                let later = at + by + rng.u64(..150);
                send(later, plan.burst / (1 + part), others);
            }
            at += by + rng.u64(600..2500);
        }
    }

    /// The key's bucket is emptied. Then, Redis responds too late to every replica for 2 to 20 seconds. After Redis has
    /// recovered, the key gets more requests than its limit allows.
    fn slow_for_all(&mut self, rng: &mut Rng) {
        self.replicas = rng.usize(2..=4);
        let rpm = [600, 2000, 6000][rng.usize(..3)];
        self.keys.push(Key {
            on_failure: OnRedisFailure::Share,
            plans: vec![Plan {
                from: 0,
                rpm,
                burst: rng.u32(40..=300),
                strict: rng.bool(),
            }],
            quotas: [None; 2],
            load: "slow for all",
        });
        let fault = Fault {
            at: rng.u64(700..1500),
            lasts: rng.u64(2000..20_000),
            kind: FaultKind::Late {
                replicas: Replicas((1 << self.replicas) - 1),
                by: rng.u64(35..200),
                percent: 100,
            },
        };
        self.faults.push(fault);
        self.length = fault.end() + 2500;
        let burst = self.keys[0].plans[0].burst;
        self.crowd(rng, fault.at - 400, burst * 6 / 5);
        let per_second = rpm * rng.u32(100..=140) / 6000;
        let mut at = fault.at;
        while at < fault.end() {
            self.crowd(rng, at, (per_second / 10).max(1));
            at += 100;
        }
        while at < fault.end() + 2000 {
            self.crowd(rng, at, burst / 8 + per_second / 20 + 1);
            at += 50;
        }
    }

    /// Redis is unavailable to all replicas for several seconds. Before the outage, all replicas have used every key.
    fn long_outage(&mut self, rng: &mut Rng) {
        let fault = Fault {
            at: rng.u64(500..1500),
            lasts: rng.u64(2500..7000),
            kind: match rng.u8(..6) {
                0 => FaultKind::Cut,
                1 => FaultKind::Deaf,
                2 => FaultKind::Restart,
                3 => FaultKind::Late {
                    replicas: Replicas((1 << self.replicas) - 1),
                    by: rng.u64(35..200),
                    percent: 100,
                },
                _ => FaultKind::CutSome {
                    replicas: Replicas((1 << self.replicas) - 1),
                    refused: rng.bool(),
                },
            },
        };
        self.faults.push(fault);
        self.length = fault.end() + 2500;
        for key in 0..rng.usize(1..=3) {
            let mut plan = plan(rng, 0);
            plan.rpm = plan.rpm.min(6000);
            self.keys.push(Key {
                on_failure: if rng.u8(..3) == 0 {
                    OnRedisFailure::Open
                } else {
                    OnRedisFailure::Share
                },
                plans: vec![plan],
                quotas: [None; 2],
                load: "long outage",
            });
            let dearest = rng.u32(1..=5).min((plan.burst / 4).max(1));
            let mut send = |rng: &mut Rng, at, pick| {
                self.load.0.push(Request {
                    at,
                    key,
                    cost: rng.u32(1..=dearest),
                    pick,
                });
            };
            for replica in 0..self.replicas {
                let before = rng.u64(..fault.at - 100);
                send(rng, before, replica);
            }
            let percent = [30, 80, 150, 400][rng.usize(..4)];
            let per_second = u64::from((plan.rpm * percent / 6000).clamp(2, 150));
            let mut at = fault.at + rng.u64(..2000);
            while at < self.length {
                if rng.u8(..40) == 0 {
                    for _ in 0..plan.burst.min(60) {
                        let pick = rng.usize(..1000);
                        send(rng, at, pick);
                    }
                }
                let pick = rng.usize(..1000);
                send(rng, at, pick);
                at += rng.u64(0..=2000 / per_second);
            }
        }
        self.load.0.sort_by_key(|request| request.at);
    }

    /// The counters have several partitions, which every replica uses regularly, but at long intervals. Some replicas
    /// lose Redis for a while, or all of them do. Then, requests empty the keys' buckets.
    fn cluster(&mut self, rng: &mut Rng) {
        self.replicas = rng.usize(2..=3);
        self.partitions = 2;
        let at = rng.u64(2000..4000);
        let lasts = if rng.bool() {
            rng.u64(250..700)
        } else {
            rng.u64(700..2500)
        };
        let kind = if rng.u8(..4) == 0 {
            FaultKind::Cut
        } else {
            FaultKind::CutSome {
                replicas: Replicas(rng.u32(1..(1 << self.replicas) - 1)),
                refused: rng.bool(),
            }
        };
        self.faults.push(Fault { at, lasts, kind });
        self.length = at + lasts + 5000;
        for key in 0..usize::from(self.partitions) {
            let mut plan = plan(rng, 0);
            plan.burst = plan.burst.max(20);
            self.keys.push(Key {
                on_failure: [OnRedisFailure::Share, OnRedisFailure::Closed][rng.usize(..2)],
                plans: vec![plan],
                quotas: [None; 2],
                load: "cluster",
            });
            for replica in 0..self.replicas {
                let mut next = rng.u64(..500);
                while next < self.length {
                    self.load.0.push(Request {
                        at: next,
                        key,
                        cost: 1,
                        pick: replica,
                    });
                    next += rng.u64(1000..6000);
                }
            }
            for _ in 0..plan.burst {
                let later = at + lasts + 2000 + rng.u64(..500);
                self.load.0.push(Request {
                    at: later,
                    key,
                    cost: 1,
                    pick: rng.usize(..1000),
                });
            }
        }
        self.load.0.sort_by_key(|request| request.at);
    }

    /// Returns the partition of a key.
    pub(super) fn partition(&self, key: usize) -> u16 {
        let partition = key_id(key).0.as_u128() % u128::from(self.partitions);
        u16::try_from(partition).unwrap()
    }

    /// The plan is edited twice while Redis is unavailable and every replica admits its share.
    fn edited_outage(&mut self, rng: &mut Rng) {
        self.replicas = rng.usize(1..=3);
        let burst = rng.u32(20..=200);
        let rates = if rng.bool() {
            [6000, 600, 60]
        } else {
            [6000, 60, 6000]
        };
        let mut plans = vec![Plan {
            from: 0,
            rpm: rates[0],
            burst,
            strict: rng.bool(),
        }];
        let at = rng.u64(100..500);
        let mut edit = at + u64::from(burst) * 10 + rng.u64(500..1500);
        self.crowd(rng, edit - 200, burst * 6 / 5);
        for rpm in &rates[1..] {
            plans.push(Plan {
                from: edit,
                rpm: *rpm,
                burst: if rng.u8(..3) == 0 {
                    (burst / 10).max(1)
                } else {
                    burst
                },
                strict: plans[0].strict,
            });
            for _ in 0..4 {
                let later = edit + rng.u64(..2000);
                self.crowd(rng, later, burst);
            }
            edit += rng.u64(2200..3000);
        }
        self.keys.push(Key {
            on_failure: OnRedisFailure::Share,
            plans,
            quotas: [None; 2],
            load: "edited outage",
        });
        self.faults.push(Fault {
            at,
            lasts: edit - at,
            kind: FaultKind::Cut,
        });
        self.length = edit + 1000;
    }

    /// One replica has used a key until its bucket was empty, and the key's rate is raised while Redis is unavailable.
    /// Then all replicas use the key.
    fn unseen_edit(&mut self, rng: &mut Rng) {
        self.replicas = rng.usize(2..=3);
        let burst = rng.u32(60..=300);
        let strict = rng.bool();
        let at = rng.u64(300..600);
        let edit = at + rng.u64(2500..6000);
        let plan = |from, rpm| Plan {
            from,
            rpm,
            burst,
            strict,
        };
        self.keys.push(Key {
            on_failure: OnRedisFailure::Share,
            plans: vec![plan(0, 60), plan(edit, 6000)],
            quotas: [None; 2],
            load: "unseen edit",
        });
        for _ in 0..burst {
            self.load.0.push(Request {
                at: at - 200,
                key: 0,
                cost: 1,
                pick: 0,
            });
        }
        for _ in 0..6 {
            let later = edit + rng.u64(..2500);
            self.crowd(rng, later, burst / 2);
        }
        self.faults.push(Fault {
            at,
            lasts: edit + 3000 - at,
            kind: FaultKind::Cut,
        });
        self.length = edit + 3500;
    }

    /// Sends `count` requests at the same time, to random replicas.
    fn crowd(&mut self, rng: &mut Rng, at: u64, count: u32) {
        for _ in 0..count {
            self.load.0.push(Request {
                at,
                key: 0,
                cost: 1,
                pick: rng.usize(..1000),
            });
        }
    }

    /// Returns the replicas that run at least from a second before `fault` until two seconds after its end.
    pub(super) fn present(&self, fault: &Fault) -> impl Iterator<Item = usize> {
        let (from, until) = (fault.at, fault.end() + 2000);
        let joins = self.changes.iter().filter(|(_, it)| *it == Change::Join);
        let joined = joins.filter(|(at, _)| at + 1000 <= from).count();
        let is_gone = move |replica: usize| {
            self.changes.iter().any(|(at, it)| {
                let is_it = [Change::Leave(replica), Change::Crash(replica)].contains(it);
                is_it && *at <= until
            })
        };
        (0..self.replicas + joined).filter(move |replica| !is_gone(*replica))
    }

    /// Returns the minimum number of replicas at any time, and the total number of replicas.
    pub(super) fn replica_bounds(&self) -> (usize, usize) {
        let (mut now, mut least, mut all) = (self.replicas, self.replicas, self.replicas);
        for (_, change) in &self.changes {
            match change {
                Change::Join => {
                    now += 1;
                    all += 1;
                }
                Change::Leave(_) | Change::Crash(_) => now -= 1,
                Change::StopCounting(_) => {}
            }
            least = least.min(now);
        }
        (least.max(1), all)
    }
}

fn plan(rng: &mut Rng, from: u64) -> Plan {
    let rpm = [1, 12, 60, 600, 2000, 6000, 60_000][rng.usize(..7)];
    let burst = match rng.u8(..6) {
        0 => 1,
        1 => 3,
        2 => rpm / 60,
        3 => rpm / 10,
        4 => 100,
        _ => rng.u32(5..=600),
    };
    Plan {
        from,
        rpm,
        burst: burst.clamp(1, 600),
        strict: rng.u8(..3) == 0,
    }
}

fn fault(rng: &mut Rng, at: u64, replicas: usize) -> Fault {
    let some = Replicas::some(rng, replicas);
    let percent = [5, 20, 100][rng.usize(..3)];
    let (kind, lasts) = match rng.u8(..12) {
        0..=2 => (FaultKind::Stall, rng.u64(50..=950)),
        3 => (FaultKind::Slow(rng.u64(5..120)), rng.u64(50..2500)),
        4 | 5 => {
            let late = FaultKind::Late {
                replicas: some,
                by: rng.u64(35..400),
                percent,
            };
            (late, rng.u64(200..3000))
        }
        6 => {
            let lost = FaultKind::Lost {
                replicas: some,
                percent,
            };
            (lost, rng.u64(50..2500))
        }
        7 => (FaultKind::Restart, rng.u64(50..2500)),
        8 => (FaultKind::FailOver, rng.u64(50..2500)),
        9 => (FaultKind::Cut, rng.u64(50..2500)),
        10 => (FaultKind::Deaf, rng.u64(50..2500)),
        _ => {
            let cut = FaultKind::CutSome {
                replicas: some,
                refused: rng.bool(),
            };
            (cut, rng.u64(50..2500))
        }
    };
    Fault { at, lasts, kind }
}

/// Adds one key's requests, and returns the name of their pattern.
fn load(
    rng: &mut Rng,
    key: usize,
    plan: Plan,
    length: u64,
    requests: &mut Vec<Request>,
) -> &'static str {
    let dear = rng.bool();
    let mut own = Vec::new();
    let mut at_once = |rng: &mut Rng, at: u64, count: u32, pick: Option<usize>| {
        for _ in 0..count {
            own.push(Request {
                at,
                key,
                cost: if dear { rng.u32(1..=5) } else { 1 },
                pick: pick.unwrap_or_else(|| rng.usize(..1000)),
            });
        }
    };
    let mean = if dear { 3 } else { 1 };
    // The average number of requests that the tokens of a full bucket allow.
    let whole = (plan.burst / mean).max(1);
    let name = match rng.u8(..5) {
        0 | 1 => {
            let percent = [50, 90, 110, 200, 400][rng.usize(..5)];
            let per_second = (plan.rpm * percent / 6000 / mean).max(3);
            let mut at = rng.u64(..length / 2);
            let pick = (rng.u8(..4) == 0).then(|| rng.usize(..1000));
            if rng.bool() {
                at_once(rng, at, whole, pick);
            }
            // If there are many requests, send several at a time.
            let (count, pause) = if per_second > 250 {
                (per_second / 250, 4)
            } else {
                (1, 1000 / u64::from(per_second))
            };
            let mut left = REQUESTS_MAX / count as usize;
            while at < length && left > 0 {
                at_once(rng, at, count, pick);
                at += rng.u64(0..=2 * pause);
                left -= 1;
            }
            "steady"
        }
        2 => {
            // Send the full burst of an idle key, to one replica or to random replicas.
            let mut at = rng.u64(..length / 2);
            let pick = rng.bool().then(|| rng.usize(..1000));
            let pause = rng.u64(200..3000);
            let mut left = REQUESTS_MAX / whole as usize + 1;
            while at < length && left > 0 {
                let more = whole * rng.u32(..2) / 4;
                at_once(rng, at, whole + more, pick);
                at += pause;
                left -= 1;
            }
            "spikes"
        }
        3 => {
            // One replica prefetches tokens and then goes idle, while the requests go to another replica.
            let mut at = rng.u64(..500);
            let mut left = REQUESTS_MAX / (whole as usize * 2) + 1;
            while at < length && left > 0 {
                let first = rng.usize(..1000);
                let stream = (plan.rpm * 35 / 6000 * 9 / 10 / mean).clamp(3, 80);
                for n in 0..u64::from(stream) {
                    at_once(rng, at + n * 350 / u64::from(stream), 1, Some(first));
                }
                at += 350 + rng.u64(..250);
                for part in 0..10 {
                    at_once(rng, at + part * 8, (whole / 10).max(1), Some(first + 1));
                }
                at += 80 + rng.u64(..1500);
                left -= 1;
            }
            "hurting"
        }
        _ => {
            let mut at = rng.u64(..1000);
            let mut left = REQUESTS_MAX;
            while at < length && left > 0 {
                let count = if rng.u8(..8) == 0 { whole.min(200) } else { 1 };
                at_once(rng, at, count, None);
                at += rng.u64(1..=400);
                left = left.saturating_sub(count as usize);
            }
            "mixed"
        }
    };
    own.retain(|request| request.at < length);
    requests.append(&mut own);
    name
}
