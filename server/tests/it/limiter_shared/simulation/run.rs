//! Plays a scene with the real store on every replica, in virtual time, and logs every request.

use std::{
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use fastrand::Rng;
use parking_lot::Mutex;
use quota_common::{
    id::{ApiKeyId, TenantId},
    plan::OnRedisFailure,
};
use quota_server::{
    clock::Clock,
    limiter::{
        COUNTED_EVERY, Decision, DistributedSettings, DistributedStore, KeyHandle,
        KeyTableSettings, LedgerError, Limiter, LimiterError, LocalStore, Membership, PRUNE_EVERY,
        Policies, Policy, QuotaLedger, RatePolicy, ReturnBatch, SharedCounters, TakeRequest, Taken,
        Zone,
    },
    telemetry::metrics::Metrics,
};
use tokio::time::{Instant, sleep, sleep_until};

use super::{
    plants::Plant,
    registry::Registry,
    scene::{Change, Fault, FaultKind, Scene},
    world::{Linked, Reach, SkewedClock, World},
};
use crate::{limiter_contract::TestLedger, limiter_shared::model::State};

pub(super) const TTL: Duration = Duration::from_millis(100);
pub(super) const DEADLINE: Duration = Duration::from_millis(30);
/// The time after which all replicas have counted each other.
const WARM_UP: Duration = Duration::from_secs(11);
/// The time after which a plan edit applies on every replica.
pub(super) const EDIT_KNOWN: Duration = Duration::from_secs(1);
/// The time between the last request that a load balancer sends to a replica and the replica's stop.
const LAST_REQUESTS: Duration = Duration::from_millis(70);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Admitted,
    Denied,
    /// The decision failed with an error, which the server reports as status 503.
    Unavailable,
    /// The replica crashed before it responded.
    None,
}

/// One request. Times are in nanoseconds since the load began.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub(super) key: usize,
    pub(super) replica: usize,
    pub(super) cost: u32,
    /// Which of the key's plans the replica applied.
    pub(super) plan: usize,
    pub(super) asked: u64,
    pub(super) answered: u64,
    pub(super) answer: Answer,
    /// The wait that a denial states, in nanoseconds.
    pub(super) retry_after: Option<u64>,
    /// Whether the decision was made without Redis.
    pub(super) degraded: bool,
    /// Whether the daily quota denied the request, and whether the monthly quota did.
    pub(super) denied_by: [bool; 2],
    /// Tokens of the key that Redis had granted when the response arrived; `None` once Redis had reported a new epoch.
    pub(super) granted: Option<u64>,
}

#[derive(Debug)]
pub(super) struct Log {
    pub(super) entries: Vec<Entry>,
    /// The times at which Redis reported a new epoch, in nanoseconds since the load began, by key.
    pub(super) epochs: Vec<Vec<u64>>,
    /// By key: when tokens were lost, and how many. Neither a replica nor a bucket has these tokens afterward.
    pub(super) missed: Vec<Vec<(u64, u64)>>,
    /// The times at which any replica received a response in time, by key.
    pub(super) heard: Vec<Vec<u64>>,
    /// Tokens that Redis granted, and tokens that were returned, by key.
    pub(super) granted: Vec<(u64, u64)>,
    /// Totals reported by the replicas that are running at the end: the tokens that were taken, the tokens that were
    /// spent, and the tokens that were returned or lost.
    pub(super) books: Vec<(u64, u64, u64)>,
    /// Replicas that are running at the end and still consider Redis unavailable.
    pub(super) degraded: Vec<usize>,
}

struct Replica {
    limiter: Limiter,
    store: Arc<DistributedStore>,
    metrics: Arc<Metrics>,
    keys: Vec<Arc<KeyHandle>>,
    /// When the replica learns of each edit, by key.
    knows: Vec<Vec<u64>>,
    /// Whether the replica accepts new requests.
    open: AtomicBool,
    counting: AtomicBool,
    crashed: Arc<AtomicBool>,
    /// The number of requests that the replica is deciding.
    deciding: AtomicUsize,
}

/// Prunes the key table, like the server's background job.
async fn prune(replica: Arc<Replica>) {
    while !replica.crashed.load(Ordering::Relaxed) {
        sleep(PRUNE_EVERY).await;
        replica.limiter.prune();
    }
}

/// The ledger of quotas, as one replica sees it.
#[derive(Debug)]
struct ReplicaLedger {
    ledger: Arc<TestLedger>,
    crashed: Arc<AtomicBool>,
    returns: bool,
}

#[async_trait]
impl QuotaLedger for ReplicaLedger {
    async fn take(&self, requests: &[TakeRequest]) -> Vec<Result<Taken, LedgerError>> {
        if self.crashed.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        self.ledger.take(requests).await
    }

    async fn give_back(&self, batch: &ReturnBatch) -> Result<(), LedgerError> {
        if self.crashed.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        if self.returns {
            self.ledger.give_back(batch).await
        } else {
            Ok(())
        }
    }
}

pub(super) fn key_id(key: usize) -> ApiKeyId {
    ApiKeyId(uuid::Uuid::from_u128(key as u128 + 1))
}

struct Stage {
    scene: Scene,
    world: Arc<World>,
    plant: Plant,
    registry: Registry,
    replicas: Mutex<Vec<Arc<Replica>>>,
    /// The policies of each key, by edit.
    policies: Vec<Vec<Policies>>,
    entries: Mutex<Vec<Entry>>,
    ledger: Arc<TestLedger>,
    /// If set, the local store that all replicas share instead of having their own stores.
    one_bucket: Option<Arc<LocalStore>>,
    /// When the load begins.
    begin: Instant,
}

impl Stage {
    fn join(self: &Arc<Self>, rng: &mut Rng) {
        let world = &self.world;
        let index = {
            let mut links = world.links.lock();
            links.push(super::world::Link::default());
            links.len() - 1
        };
        let clock: Arc<dyn Clock> = Arc::new(SkewedClock {
            zero: world.zero,
            skew_ms: rng.i64(-120_000..=120_000),
        });
        let metrics = Arc::new(Metrics::default());
        let membership = Arc::new(Membership::default());
        self.registry.count(index, &membership, world.now());
        let counters: Arc<dyn SharedCounters> = Arc::new(Linked {
            world: Arc::clone(world),
            replica: index,
        });
        let crashed = Arc::new(AtomicBool::new(false));
        let ledger = Arc::new(ReplicaLedger {
            ledger: self.plant.ledger(&self.ledger),
            crashed: Arc::clone(&crashed),
            returns: self.plant != Plant::ReturnsNoQuota,
        });
        let store = store(
            &clock,
            ledger,
            counters,
            &membership,
            &metrics,
            OnRedisFailure::Share,
            DEADLINE,
        );
        let limiter = match &self.one_bucket {
            Some(bucket) => Limiter::new(Arc::clone(bucket) as _, clock),
            None => Limiter::new(self.plant.store(Arc::clone(&store)), clock),
        };
        let keys = (0..self.scene.keys.len())
            .map(|key| limiter.handle(TenantId(uuid::Uuid::from_u128(1)), key_id(key)))
            .collect::<Result<_, _>>()
            .unwrap();
        let late = u64::try_from(EDIT_KNOWN.as_millis()).unwrap();
        let knows = self.scene.keys.iter().map(|key| {
            let mut edits: Vec<u64> = key.plans.iter().map(|it| it.from).collect();
            for at in &mut edits[1..] {
                *at += rng.u64(..late);
            }
            edits
        });
        let replica = Arc::new(Replica {
            knows: knows.collect(),
            limiter,
            store,
            metrics,
            keys,
            open: AtomicBool::new(true),
            counting: AtomicBool::new(true),
            crashed,
            deciding: AtomicUsize::new(0),
        });
        self.replicas.lock().push(Arc::clone(&replica));
        tokio::spawn(prune(Arc::clone(&replica)));
        tokio::spawn(Arc::clone(self).count(index, replica, membership));
    }

    async fn count(
        self: Arc<Self>,
        index: usize,
        replica: Arc<Replica>,
        membership: Arc<Membership>,
    ) {
        loop {
            sleep(COUNTED_EVERY).await;
            if !replica.counting.load(Ordering::Relaxed) {
                return;
            }
            self.registry.count(index, &membership, self.world.now());
        }
    }

    async fn change(self: Arc<Self>, at: u64, change: Change, mut rng: Rng) {
        sleep_until(self.begin + Duration::from_millis(at)).await;
        let replica = |index: usize| Arc::clone(&self.replicas.lock()[index]);
        match change {
            Change::Join => self.join(&mut rng),
            Change::StopCounting(index) => {
                replica(index).counting.store(false, Ordering::Relaxed);
            }
            Change::Crash(index) => {
                let it = replica(index);
                it.crashed.store(true, Ordering::Relaxed);
                it.open.store(false, Ordering::Relaxed);
                it.counting.store(false, Ordering::Relaxed);
                self.world.links.lock()[index].dead = true;
            }
            Change::Leave(index) => {
                let it = replica(index);
                it.open.store(false, Ordering::Relaxed);
                sleep(LAST_REQUESTS).await;
                while it.deciding.load(Ordering::Relaxed) > 0 {
                    sleep(Duration::from_millis(1)).await;
                }
                it.counting.store(false, Ordering::Relaxed);
                // A replica that stops during an outage remains in the registry, since its share may have admitted
                // requests.
                if !it.store.is_degraded() {
                    self.registry.leave(index);
                }
                if self.one_bucket.is_none() {
                    it.limiter.drain().await;
                }
                self.world.links.lock()[index].dead = true;
                it.crashed.store(true, Ordering::Relaxed);
            }
        }
    }

    async fn ask(self: Arc<Self>, index: usize, key: usize, cost: u32) {
        let replica = Arc::clone(&self.replicas.lock()[index]);
        let now = || u64::try_from(self.begin.elapsed().as_nanos()).unwrap();
        let asked = now();
        let known = replica.knows[key].iter();
        let edit = known.filter(|at| **at * 1_000_000 <= asked).count() - 1;
        let policies = &self.policies[key][edit];
        let limiter = &replica.limiter;
        let cost = NonZeroU32::new(cost).unwrap();
        replica.deciding.fetch_add(1, Ordering::Relaxed);
        let decision = limiter.admit(&replica.keys[key], policies, cost).await;
        replica.deciding.fetch_sub(1, Ordering::Relaxed);
        let initialized_again = self.world.initialized_again.load(Ordering::Relaxed);
        let violated = decision.as_ref().ok().map(Decision::violated);
        let denied_by = [Policy::Daily, Policy::Monthly]
            .map(|policy| violated.is_some_and(|it| it.contains(policy)));
        let retry_after = decision.as_ref().ok().and_then(Decision::retry_after);
        let (answer, degraded) = match decision {
            _ if replica.crashed.load(Ordering::Relaxed) => (Answer::None, false),
            Ok(decision) if decision.is_allowed() => (Answer::Admitted, decision.degraded),
            Ok(decision) => (Answer::Denied, decision.degraded),
            Err(LimiterError::CountersUnavailable) => (Answer::Unavailable, true),
            Err(LimiterError::LedgerUnavailable(_)) => (Answer::Unavailable, false),
            Err(error) => panic!("{error}"),
        };
        self.entries.lock().push(Entry {
            key,
            replica: index,
            cost: cost.get(),
            plan: edit,
            asked,
            answered: now(),
            answer,
            retry_after,
            degraded,
            denied_by,
            granted: (!initialized_again).then(|| self.world.granted(key_id(key)).0),
        });
    }

    fn open(&self) -> Vec<usize> {
        let replicas = self.replicas.lock();
        (0..replicas.len())
            .filter(|index| replicas[*index].open.load(Ordering::Relaxed))
            .collect()
    }
}

/// Creates a store, configured as on a server.
pub(super) fn store(
    clock: &Arc<dyn Clock>,
    ledger: Arc<dyn QuotaLedger>,
    counters: Arc<dyn SharedCounters>,
    membership: &Arc<Membership>,
    metrics: &Arc<Metrics>,
    on_failure: OnRedisFailure,
    deadline: Duration,
) -> Arc<DistributedStore> {
    DistributedStore::new(
        Arc::clone(clock),
        ledger,
        counters,
        Arc::clone(membership),
        Arc::clone(metrics),
        DistributedSettings {
            lease_ttl: TTL,
            deadline,
            on_failure,
            keys: KeyTableSettings::default(),
        },
    )
}

pub(super) async fn play(scene: &Scene, plant: Plant) -> Log {
    let mut rng = Rng::with_seed(!scene.seed);
    let world = World::with_partitions(scene.partitions, scene.seed, scene.round_trip, plant);
    let policies = scene.keys.iter().map(|key| {
        let plans = (1..).zip(&key.plans);
        plans
            .map(|(version, plan)| {
                let rate = RatePolicy {
                    rpm: NonZeroU32::new(plan.rpm).unwrap(),
                    burst: NonZeroU32::new(plan.burst).unwrap(),
                };
                let [daily, monthly] = key.quotas.map(|it| plant.quota(it));
                Policies::new(rate, daily, monthly, Zone::utc(), plan.strict)
                    .on_redis_failure(Some(key.on_failure))
                    .with_version(version)
            })
            .collect()
    });
    let stage = Arc::new(Stage {
        scene: scene.clone(),
        policies: policies.collect(),
        plant,
        registry: Registry::default(),
        replicas: Mutex::default(),
        entries: Mutex::default(),
        ledger: TestLedger::new(),
        one_bucket: (plant == Plant::OneBucket).then(|| {
            let clock = SkewedClock {
                zero: world.zero,
                skew_ms: 0,
            };
            let ledger = TestLedger::new();
            LocalStore::new(Arc::new(clock), ledger, KeyTableSettings::default())
        }),
        begin: world.zero + WARM_UP,
        world,
    });
    let ledger_delay = Duration::from_millis(scene.ledger_delay);
    stage.ledger.set_delay(ledger_delay);
    for _ in 0..scene.replicas {
        stage.join(&mut rng);
        // Start the replicas at different times, so that they do not count each other at the same time.
        sleep(Duration::from_millis(rng.u64(..300))).await;
    }
    sleep_until(stage.begin).await;

    let mut happening = Vec::new();
    for (at, change) in &scene.changes {
        happening.push(tokio::spawn(Arc::clone(&stage).change(
            *at,
            *change,
            rng.fork(),
        )));
    }
    for fault in &scene.faults {
        let fault = misbehave(Arc::clone(&stage), *fault, rng.fork());
        happening.push(tokio::spawn(fault));
    }
    let mut requests = Vec::new();
    for request in &scene.load.0 {
        sleep_until(stage.begin + Duration::from_millis(request.at)).await;
        let open = stage.open();
        let replica = open[request.pick % open.len()];
        requests.push(tokio::spawn(Arc::clone(&stage).ask(
            replica,
            request.key,
            request.cost,
        )));
    }
    for task in happening.into_iter().chain(requests) {
        task.await.unwrap();
    }
    // Wait until leases have expired and been returned, and replicas have returned to Redis.
    sleep(Duration::from_millis(3000)).await;

    let replicas = stage.replicas.lock();
    let left = || {
        let all = replicas.iter().enumerate();
        all.filter(|(_, replica)| !replica.crashed.load(Ordering::Relaxed))
    };
    let begin = stage.begin.duration_since(stage.world.zero);
    let begin = u64::try_from(begin.as_nanos()).unwrap();
    let since_begin = |at: u64| at.saturating_sub(begin);
    let mut entries = std::mem::take(&mut *stage.entries.lock());
    entries.sort_by_key(|entry| entry.asked);
    Log {
        entries,
        epochs: (0..scene.keys.len())
            .map(|key| {
                let told = stage.world.epochs.lock();
                let of_key = told.iter().filter(|it| it.0 == scene.partition(key));
                of_key.map(|(_, at)| since_begin(*at)).collect()
            })
            .collect(),
        missed: (0..scene.keys.len())
            .map(|key| {
                let missed = stage.world.missed.lock();
                let of_key = missed.iter().filter(|it| it.key == key_id(key));
                of_key.map(|it| (since_begin(it.at), it.tokens)).collect()
            })
            .collect(),
        heard: (0..scene.keys.len())
            .map(|key| {
                let heard = stage.world.heard.lock();
                let of_key = heard.iter().filter(|it| it.0 == scene.partition(key));
                of_key.map(|(_, at)| since_begin(*at)).collect()
            })
            .collect(),
        granted: (0..scene.keys.len())
            .map(|key| stage.world.granted(key_id(key)))
            .collect(),
        books: left()
            .map(|(_, replica)| {
                let metrics = &replica.metrics;
                (
                    metrics.lease_tokens_taken.get(),
                    metrics.lease_tokens_spent.get(),
                    metrics.lease_tokens_returned.get() + metrics.lease_tokens_lost.get(),
                )
            })
            .collect(),
        degraded: left()
            .filter(|(_, replica)| replica.store.is_degraded())
            .map(|(index, _)| index)
            .collect(),
    }
}

async fn misbehave(stage: Arc<Stage>, fault: Fault, mut rng: Rng) {
    let world = &stage.world;
    let at = stage.begin + Duration::from_millis(fault.at);
    // The copy that will take over lags behind by up to a second.
    let lag = Duration::from_millis(rng.u64(..1000).min(fault.at));
    sleep_until(at - lag).await;
    {
        let mut process = world.process.lock();
        process.copy = process.state.clone();
    }
    sleep_until(at).await;
    let over = || sleep(Duration::from_millis(fault.lasts));
    let each_link = |set: &dyn Fn(usize, &mut super::world::Link)| {
        for (index, link) in world.links.lock().iter_mut().enumerate() {
            set(index, link);
        }
    };
    match fault.kind {
        FaultKind::Stall => {
            world.stalled.send_replace(true);
            over().await;
            world.stalled.send_replace(false);
        }
        FaultKind::Slow(up_to) => {
            world.slow.store(up_to, Ordering::Relaxed);
            over().await;
            world.slow.store(0, Ordering::Relaxed);
            if stage.plant == Plant::LosesStateWhenSlow {
                world.process.lock().run += 1;
            }
        }
        FaultKind::Restart | FaultKind::FailOver => {
            world.process.lock().up = false;
            over().await;
            let mut process = world.process.lock();
            process.run += 1;
            process.state = match fault.kind {
                FaultKind::FailOver => process.copy.clone(),
                _ if stage.plant == Plant::FullAfterLoss => {
                    State::fresh(process.run, stage.scene.partitions)
                }
                _ => State::default(),
            };
            if fault.kind == FaultKind::FailOver {
                process.ahead += rng.u64(..5_000_000);
            }
            process.up = true;
        }
        FaultKind::Cut | FaultKind::Deaf => {
            *world.reach.lock() = if fault.kind == FaultKind::Cut {
                Reach::Cut
            } else {
                Reach::Deaf
            };
            over().await;
            *world.reach.lock() = Reach::Up;
        }
        FaultKind::CutSome { replicas, refused } => {
            let reach = if refused { Reach::Refused } else { Reach::Cut };
            each_link(&|index, link| {
                if replicas.contains(index) {
                    link.reach = reach;
                }
            });
            over().await;
            each_link(&|_, link| link.reach = Reach::Up);
        }
        FaultKind::Late {
            replicas,
            by,
            percent,
        } => {
            each_link(&|index, link| {
                if replicas.contains(index) {
                    link.late = (percent, by);
                }
            });
            over().await;
            each_link(&|_, link| link.late = (0, 0));
        }
        FaultKind::Lost { replicas, percent } => {
            each_link(&|index, link| {
                if replicas.contains(index) {
                    link.lost = percent;
                }
            });
            over().await;
            each_link(&|_, link| link.lost = 0);
        }
    }
}
