//! Redis and the network to it, in virtual time.
//!
//! A simulated Redis process runs the [model](crate::limiter_shared::model) of the Redis script. Replicas reach this
//! process over links. The process stalls, loses its state and fails over to a stale copy. The links delay, lose and
//! cut traffic. A call that no link loses arrives even if the caller is no longer waiting.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use fastrand::Rng;
use parking_lot::Mutex;
use quota_common::id::ApiKeyId;
use quota_server::{
    clock::{Clock, Monotonic, Nanos, UnixNanos},
    limiter::{
        BucketName, BucketState, CounterError, CounterMicros, SharedCounters, TakeCall, TakeReply,
    },
};
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

use super::{plants::Plant, run::DEADLINE};
use crate::{limiter_contract::START, limiter_shared::model::State};

/// A replica's own clock: the true time plus an offset.
#[derive(Debug, Clone)]
pub(super) struct SkewedClock {
    pub(super) zero: Instant,
    pub(super) skew_ms: i64,
}

impl Clock for SkewedClock {
    fn now(&self) -> UnixNanos {
        let at = START.0.saturating_add(self.monotonic().0);
        UnixNanos(at.saturating_add_signed(self.skew_ms * 1_000_000))
    }

    fn monotonic(&self) -> Monotonic {
        Monotonic(Nanos::from(self.zero.elapsed()).0)
    }
}

/// The Redis process that stores the counters.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) state: State,
    /// The state of a copy of the process. The copy lags behind, and takes over in a failover.
    pub(super) copy: State,
    pub(super) run: u64,
    pub(super) up: bool,
    /// By how many microseconds the process's clock is ahead.
    pub(super) ahead: u64,
    /// The counters of each replica, if every replica has its own counters.
    alone: HashMap<usize, State>,
}

/// How calls reach Redis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Reach {
    #[default]
    Up,
    /// Calls neither arrive nor fail.
    Cut,
    /// Calls arrive, but responses do not.
    Deaf,
    Refused,
}

/// One replica's link.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Link {
    pub(super) reach: Reach,
    /// The percentage of responses that are delayed, and the delay in milliseconds.
    pub(super) late: (u8, u64),
    /// The percentage of responses that never arrive.
    pub(super) lost: u8,
    /// The replica has exited, and none of its calls arrive anymore.
    pub(super) dead: bool,
}

/// The number of calls to Redis so far, by purpose.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Calls {
    pub(super) heartbeats: u64,
    /// Calls that take tokens, including those that get none.
    pub(super) takes: u64,
    /// Calls that only return tokens.
    pub(super) returns: u64,
    /// Calls that only read the state of a bucket.
    pub(super) reads: u64,
}

impl Calls {
    pub(super) fn all(self) -> u64 {
        self.heartbeats + self.takes + self.returns + self.reads
    }

    /// Returns the number of calls since `before`.
    pub(super) fn since(self, before: Self) -> Self {
        Self {
            heartbeats: self.heartbeats - before.heartbeats,
            takes: self.takes - before.takes,
            returns: self.returns - before.returns,
            reads: self.reads - before.reads,
        }
    }

    fn count(&mut self, call: TakeCall) {
        let count = match call {
            TakeCall {
                bucket: BucketName::Heartbeat,
                ..
            } => &mut self.heartbeats,
            TakeCall { want: 1.., .. } => &mut self.takes,
            TakeCall { back: 1.., .. } => &mut self.returns,
            _ => &mut self.reads,
        };
        *count += 1;
    }
}

/// Lost tokens of a key, and when they were lost.
#[derive(Debug, Clone, Copy)]
pub(super) struct Missed {
    pub(super) key: ApiKeyId,
    pub(super) at: u64,
    pub(super) tokens: u64,
}

#[derive(Debug)]
pub(super) struct World {
    pub(super) zero: Instant,
    pub(super) process: Mutex<Process>,
    pub(super) links: Mutex<Vec<Link>>,
    /// How calls of all replicas reach Redis.
    pub(super) reach: Mutex<Reach>,
    pub(super) stalled: watch::Sender<bool>,
    pub(super) calls: Mutex<Calls>,
    pub(super) slow: AtomicU64,
    /// Whether any response reported a new epoch, even if the response was lost.
    pub(super) initialized_again: AtomicBool,
    /// The partitions and times of the responses that reported a new epoch.
    pub(super) epochs: Mutex<Vec<(u16, u64)>>,
    /// Tokens that no replica can spend. They were granted in responses that arrived late or never, or returned by
    /// calls that never arrived or that Redis answered with a new epoch.
    pub(super) missed: Mutex<Vec<Missed>>,
    /// The partitions and times of responses that arrived in time.
    pub(super) heard: Mutex<Vec<(u16, u64)>>,
    round_trip: u64,
    partitions: u16,
    seed: u64,
    plant: Plant,
    /// Replicas that were promised a new epoch and have not returned since.
    told: Mutex<HashSet<usize>>,
    /// Tokens granted so far and tokens returned so far, by key.
    granted: Mutex<HashMap<ApiKeyId, (u64, u64)>>,
    /// A generator for each link and bucket, so that no random number depends on the order of other calls.
    generators: Mutex<HashMap<(usize, BucketName), Rng>>,
}

#[derive(Debug, thiserror::Error)]
#[error("refused")]
struct Refused;

fn refused() -> CounterError {
    Arc::new(Refused)
}

impl World {
    pub(super) fn new(seed: u64, round_trip: u64, plant: Plant) -> Arc<Self> {
        Self::with_partitions(1, seed, round_trip, plant)
    }

    pub(super) fn with_partitions(
        partitions: u16,
        seed: u64,
        round_trip: u64,
        plant: Plant,
    ) -> Arc<Self> {
        let state = State::fresh(1, partitions);
        Arc::new(Self {
            zero: Instant::now(),
            process: Mutex::new(Process {
                copy: state.clone(),
                state,
                run: 1,
                up: true,
                ahead: 0,
                alone: HashMap::new(),
            }),
            links: Mutex::default(),
            reach: Mutex::default(),
            stalled: watch::Sender::new(false),
            calls: Mutex::default(),
            slow: AtomicU64::new(0),
            initialized_again: AtomicBool::new(false),
            epochs: Mutex::default(),
            missed: Mutex::default(),
            heard: Mutex::default(),
            round_trip,
            partitions,
            seed,
            plant,
            told: Mutex::default(),
            granted: Mutex::default(),
            generators: Mutex::default(),
        })
    }

    pub(super) fn now(&self) -> u64 {
        u64::try_from(self.zero.elapsed().as_nanos()).unwrap()
    }

    /// Returns how many tokens of a key Redis has granted so far, and how many were returned.
    pub(super) fn granted(&self, key: ApiKeyId) -> (u64, u64) {
        self.granted.lock().get(&key).copied().unwrap_or_default()
    }

    fn random(&self, link: usize, bucket: BucketName, of: impl FnOnce(&mut Rng) -> u64) -> u64 {
        let mut generators = self.generators.lock();
        let rng = generators.entry((link, bucket)).or_insert_with(|| {
            let key = match bucket {
                BucketName::Key(_, key) => u64::try_from(key.0.as_u128() & 0xffff).unwrap(),
                BucketName::Heartbeat => 0xffff,
            };
            Rng::with_seed(self.seed ^ (key << 20) ^ ((link as u64 + 1) << 40))
        });
        of(rng)
    }

    /// Waits for the latency in one direction.
    async fn travel(&self, link: usize, bucket: BucketName, back: bool) {
        let slow = self.slow.load(Ordering::Relaxed);
        let one_way = if back {
            self.round_trip / 2
        } else {
            self.round_trip - self.round_trip / 2
        };
        let ms = self.random(link, bucket, |rng| {
            if slow > 0 && rng.u64(..100) < 5 {
                one_way + rng.u64(..slow)
            } else {
                one_way
            }
        });
        if ms > 0 {
            sleep(Duration::from_millis(ms)).await;
        }
    }

    fn serve(&self, replica: usize, call: TakeCall) -> Result<TakeReply, CounterError> {
        let mut process = self.process.lock();
        if !process.up {
            return Err(refused());
        }
        let micros = START.0 / 1000 + self.now() / 1000 + process.ahead;
        let run = process.run;
        let mut call = self.plant.call(call, micros);
        if self.plant == Plant::PromiseNeverExpires {
            let mut told = self.told.lock();
            if call.outage_since == CounterMicros::NONE {
                told.remove(&replica);
            } else if told.contains(&replica) {
                call.outage_since = CounterMicros::NONE;
            }
        }
        let state = if self.plant == Plant::SharesNothing {
            process
                .alone
                .entry(replica)
                .or_insert_with(|| State::fresh(run, self.partitions))
        } else {
            &mut process.state
        };
        if self.plant == Plant::ReturnsTwice && call.back > 0 {
            let again = TakeCall {
                need: 0,
                want: 0,
                ..call
            };
            state.take(run, micros, again);
        }
        let reply = state.take(run, micros, call);
        drop(process);
        match (reply.state, call.bucket) {
            (BucketState::Active { granted, .. }, BucketName::Key(_, key)) => {
                let mut all = self.granted.lock();
                let (taken, returned) = all.entry(key).or_default();
                *taken += granted;
                *returned += call.back;
            }
            (BucketState::Active { .. }, BucketName::Heartbeat) => {}
            (BucketState::Initializing { .. }, _) => {
                self.initialized_again.store(true, Ordering::Relaxed);
                self.epochs.lock().push((call.partition, self.now()));
                self.told.lock().insert(replica);
            }
        }
        Ok(reply)
    }

    fn link(&self, replica: usize) -> (Link, Reach) {
        let link = self.links.lock()[replica];
        let all = *self.reach.lock();
        let reach = if link.dead {
            Reach::Cut
        } else if link.reach == Reach::Up {
            all
        } else {
            link.reach
        };
        (link, reach)
    }

    async fn call(&self, replica: usize, call: TakeCall) -> Result<TakeReply, CounterError> {
        let sent = self.now();
        self.calls.lock().count(call);
        match self.link(replica).1 {
            Reach::Refused => {
                self.miss(call, sent, call.back);
                return Err(refused());
            }
            Reach::Cut => {
                self.miss(call, sent, call.back);
                std::future::pending::<()>().await;
            }
            Reach::Up | Reach::Deaf => {}
        }
        self.travel(replica, call.bucket, false).await;
        let mut stalled = self.stalled.subscribe();
        let _ = stalled.wait_for(|stalled| !stalled).await;
        let served = self.now();
        let reply = self.serve(replica, call);
        let granted = match &reply {
            Ok(TakeReply {
                state: BucketState::Active { granted, .. },
                ..
            }) => *granted,
            _ => {
                self.miss(call, served, call.back);
                0
            }
        };
        let (link, _) = self.link(replica);
        let percent = self.random(replica, call.bucket, |rng| rng.u64(..100));
        if percent < u64::from(link.lost) {
            self.miss(call, served, granted);
            std::future::pending::<()>().await;
        }
        if percent < u64::from(link.late.0) {
            sleep(Duration::from_millis(link.late.1)).await;
        }
        self.travel(replica, call.bucket, true).await;
        let is_late = u128::from(self.now() - sent) >= DEADLINE.as_nanos();
        let is_lost = self.link(replica).1 != Reach::Up;
        if is_late || is_lost {
            self.miss(call, served, granted);
        } else if reply.is_ok() {
            self.heard.lock().push((call.partition, self.now()));
        }
        if is_lost {
            std::future::pending::<()>().await;
        }
        reply
    }

    fn miss(&self, call: TakeCall, at: u64, tokens: u64) {
        if let BucketName::Key(_, key) = call.bucket
            && tokens > 0
        {
            self.missed.lock().push(Missed { key, at, tokens });
        }
    }
}

/// The counters as seen by one replica.
#[derive(Debug)]
pub(super) struct Linked {
    pub(super) world: Arc<World>,
    pub(super) replica: usize,
}

#[async_trait]
impl SharedCounters for Linked {
    fn partitions(&self) -> u16 {
        self.world.partitions
    }

    async fn take(&self, call: TakeCall) -> Result<TakeReply, CounterError> {
        let (world, replica) = (Arc::clone(&self.world), self.replica);
        let served = tokio::spawn(async move { world.call(replica, call).await });
        served.await.unwrap_or_else(|_| Err(refused()))
    }

    async fn delete(&self, _: u16, buckets: &[BucketName]) -> Result<(), CounterError> {
        self.world.process.lock().state.delete(buckets);
        Ok(())
    }
}
