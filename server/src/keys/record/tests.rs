use std::{
    num::NonZeroU32,
    sync::{atomic::AtomicUsize, mpsc},
};

use async_trait::async_trait;
use chrono::DateTime;
use parking_lot::Mutex;
use uuid::Uuid;

use super::*;
use crate::{
    clock::{Clock, Monotonic, TestClock},
    config::DatabaseSettings,
    db::Db,
    keys::{ledger::PostgresLedger, lookups::Batches},
    limiter::{
        CounterError, Decision, KeyTableSettings, LimitStore, LimiterError, LocalStore,
        ReturnedQuota,
    },
    repo::invalidation::{Invalidation, Target},
    secret_text::Kind,
};

const TENANT: Uuid = Uuid::from_u128(1);

/// A store that pauses while it creates the handle of one key. At that point, the key's data has been read, but its
/// record is not cached yet.
#[derive(Debug)]
struct PausingStore {
    inner: Arc<LocalStore>,
    key: ApiKeyId,
    pause: Mutex<Option<(mpsc::Sender<()>, mpsc::Receiver<()>)>>,
}

#[async_trait]
impl LimitStore for PausingStore {
    fn handle(&self, tenant: TenantId, key: ApiKeyId) -> Result<Arc<KeyHandle>, LimiterError> {
        if key == self.key
            && let Some((reached, resume)) = self.pause.lock().take()
        {
            reached.send(()).unwrap();
            resume.recv().unwrap();
        }
        self.inner.handle(tenant, key)
    }

    fn try_take(
        &self,
        handle: &Arc<KeyHandle>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Option<Decision> {
        self.inner.try_take(handle, policies, cost)
    }

    async fn take(
        &self,
        handle: &Arc<KeyHandle>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Result<Decision, LimiterError> {
        self.inner.take(handle, policies, cost).await
    }

    fn peek(&self, handle: &KeyHandle, policies: &Policies) -> Decision {
        self.inner.peek(handle, policies)
    }

    fn is_local(&self) -> bool {
        self.inner.is_local()
    }

    fn prune(&self) -> usize {
        self.inner.prune()
    }

    async fn delete(&self, keys: &[(TenantId, ApiKeyId)]) -> Result<(), CounterError> {
        self.inner.delete(keys).await
    }

    async fn drain(&self) -> ReturnedQuota {
        self.inner.drain().await
    }
}

fn secret(n: u16) -> SecretText {
    let mut bytes = [7; 32];
    // The digits of `n` in base 62.
    bytes[0] = u8::try_from(n / 62).unwrap();
    bytes[1] = u8::try_from(n % 62).unwrap();
    SecretText::from_bytes(Kind::ApiKey, &bytes)
}

fn facts(id: u16, plan_id: Uuid, plan_name: &str) -> KeyFacts {
    KeyFacts {
        tenant_id: TENANT,
        id: Uuid::from_u128(1000 + u128::from(id)),
        plan_id,
        prefix: "qk_00000000".into(),
        is_active: true,
        expires_at: None,
        rpm_override: None,
        plan_name: plan_name.into(),
        default_rpm: 60,
        burst: 60,
        daily_quota: None,
        monthly_quota: None,
        strict: false,
        on_redis_failure: None,
        billing: "free".into(),
        has_paid_access: false,
        paid_access_until: None,
        time_zone: "UTC".into(),
    }
}

/// Returns a store that caches up to `capacity` keys, and its clock and freshness. `limits` may wrap the limits' store.
fn key_store(
    lookups: Lookups,
    capacity: usize,
    limits: impl FnOnce(Arc<LocalStore>) -> Arc<dyn LimitStore>,
) -> (KeyStore, Arc<dyn Clock>, Arc<Freshness>) {
    let clock: Arc<dyn Clock> = Arc::new(TestClock::at(UnixNanos::from_secs(1_785_738_360)));
    let metrics = Arc::<Metrics>::default();
    let freshness = Arc::new(Freshness::new(clock.clone()));
    // No connection is needed, because the keys have no quotas.
    let db = Db::new(
        &"postgres://localhost/none".into(),
        &DatabaseSettings::default(),
    );
    let ledger = Arc::new(PostgresLedger::new(db, metrics.clone()));
    let local = LocalStore::new(clock.clone(), ledger, KeyTableSettings::default());
    let keys = KeyStore::new(
        lookups,
        Limiter::new(limits(local), clock.clone()),
        None,
        capacity,
        Duration::from_mins(1),
        &freshness,
        &metrics,
    );
    (keys, clock, freshness)
}

/// There is one record per cached key, so the size of a record determines how many keys fit into memory.
#[test]
fn a_record_is_small() {
    assert!(size_of::<KeyRecord>() <= 56, "{}", size_of::<KeyRecord>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn plan_edit_reaches_a_key_that_is_being_cached() {
    const CAPACITY: usize = 100;
    let (plan, other_plan) = (Uuid::from_u128(2), Uuid::from_u128(3));
    let (reached, has_reached) = mpsc::channel();
    let (resume, has_resumed) = mpsc::channel();
    let hash = secret(0).hash();
    let loads = Arc::new(AtomicUsize::new(0));
    let lookups = Lookups {
        keys: Batches::of(move |it| {
            if *it == hash {
                let name = match loads.fetch_add(1, Ordering::SeqCst) {
                    0 => "old",
                    _ => "new",
                };
                return Some((facts(0, plan, name), 1));
            }
            let n = (1..=3 * 100).find(|n| secret(*n).hash() == *it)?;
            Some((facts(n, other_plan, "other"), 1))
        }),
        tokens: Batches::of(|_| None),
    };
    let (keys, clock, freshness) = key_store(lookups, CAPACITY, |inner| {
        Arc::new(PausingStore {
            inner,
            key: ApiKeyId(facts(0, plan, "").id),
            pause: Mutex::new(Some((reached, has_resumed))),
        })
    });

    let paused = {
        let keys = keys.clone();
        tokio::spawn(async move {
            keys.key(
                secret(0).hash(),
                Monotonic::default(),
                LookupCaller::default(),
            )
            .await
        })
    };
    // Blocks only the test's own thread, which runs no loads.
    has_reached.recv().unwrap();
    // More keys than the cache has room for.
    for n in 1..=300 {
        let (secret, now) = (secret(n), clock.monotonic());
        let found = keys.key(secret.hash(), now, LookupCaller::default()).await;
        assert!(found.unwrap().is_some());
    }
    resume.send(()).unwrap();
    let cached = paused.await.unwrap().unwrap().unwrap();
    assert_eq!(cached.plan.name, "old");
    let name = async || {
        let (secret, now) = (secret(0), clock.monotonic());
        let found = keys.key(secret.hash(), now, LookupCaller::default()).await;
        found.unwrap().unwrap().plan.name.clone()
    };
    assert_eq!(name().await, "old", "the old record is cached");
    let edit = Invalidation {
        seq: 2,
        tenant: TENANT,
        target: Some(Target::Plan(plan)),
        at: DateTime::UNIX_EPOCH,
    };
    freshness.changed([Owner::from(&edit)]);
    assert_eq!(name().await, "new");
}

#[tokio::test]
async fn service_token_is_loaded_again_after_a_change_to_it_or_its_tenant() {
    let loads = Arc::new(AtomicUsize::new(0));
    let counter = loads.clone();
    let lookups = Lookups {
        keys: Batches::of(|_| None),
        tokens: Batches::of(move |hash| {
            counter.fetch_add(1, Ordering::SeqCst);
            let id = Uuid::from_slice(&hash[..16]).unwrap();
            Some((TenantId(TENANT), ServiceTokenId(id)))
        }),
    };
    let (keys, _, freshness) = key_store(lookups, 1000, |local| local);
    let token = async |n| {
        let secret = SecretText::from_bytes(Kind::ServiceToken, &[n; 32]);
        let caller = LookupCaller::default();
        let found = keys.service_token(secret.hash(), caller).await;
        found.unwrap().unwrap().id.0
    };
    let reloads = async |n| {
        let before = loads.load(Ordering::SeqCst);
        token(n).await;
        loads.load(Ordering::SeqCst) - before
    };
    let id = token(0).await;
    token(1).await;
    for other in [
        Owner::Tenant(Uuid::from_u128(2)),
        Owner::Key(id),
        Owner::Session(id),
    ] {
        freshness.changed([other]);
        assert_eq!((reloads(0).await, reloads(1).await), (0, 0), "{other:?}");
    }
    freshness.changed([Owner::ServiceToken(id)]);
    assert_eq!((reloads(0).await, reloads(1).await), (1, 0));
    freshness.changed([Owner::Tenant(TENANT)]);
    assert_eq!((reloads(0).await, reloads(1).await), (1, 1));
}
