//! Tests that the ledger of calendar quotas in a real PostgreSQL has the properties that the limiter's tests assume.

use std::{
    num::{NonZeroU32, NonZeroU64},
    sync::Arc,
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use futures_util::{StreamExt as _, stream};
use quota_common::id::{ApiKeyId, TenantId};
use quota_server::{
    clock::{Nanos, SystemClock, UnixNanos},
    config::DatabaseSettings,
    db::{self, Db},
    keys::ledger::PostgresLedger,
    limiter::{
        KeyTableSettings, LedgerRow, Limiter, LocalStore, Policies, Policy, QuotaLedger as _,
        RatePolicy, ReturnBatch, TakeRequest, Taken, Zone, window,
    },
};
use secrecy::SecretString;
use tokio_postgres::Client;
use uuid::Uuid;

use crate::{limiter_contract::TestLedger, restarts::drain_keys, support::postgres::TestDatabase};

struct World {
    database: TestDatabase,
    client: Client,
    tenant: TenantId,
    keys: Vec<ApiKeyId>,
}

impl World {
    async fn with_keys(count: usize) -> Self {
        let database = TestDatabase::create(|url| async move {
            db::migrate(&SecretString::from(url)).await.map(drop)
        })
        .await;
        let client = database.connect().await;
        let tenant = Uuid::now_v7();
        let plan = Uuid::now_v7();
        let mut keys: Vec<_> = (0..count).map(|_| Uuid::now_v7()).collect();
        keys.sort_unstable();
        let sql = format!(
            "INSERT INTO tenants (id, name) VALUES ('{tenant}', 'it');
             INSERT INTO plans (tenant_id, id, name, default_rpm, burst) VALUES ('{tenant}', '{plan}', 'it', 1, 1);"
        );
        client.batch_execute(&sql).await.expect("a plan is added");
        let ids: Vec<_> = keys.iter().map(Uuid::to_string).collect();
        let sql = format!(
            "INSERT INTO api_keys (tenant_id, id, plan_id, name, prefix, key_hash) \
             SELECT '{tenant}', id::uuid, '{plan}', 'it', 'qk_', sha256(id::bytea) FROM unnest($1::text[]) AS id"
        );
        client
            .execute(&sql, &[&ids])
            .await
            .expect("the keys are added");
        Self {
            database,
            client,
            tenant: TenantId(tenant),
            keys: keys.into_iter().map(ApiKeyId).collect(),
        }
    }

    fn ledger(&self) -> PostgresLedger {
        let url = SecretString::from(self.database.url());
        // On a busy machine, transactions wait for each other for longer than the defaults allow.
        let settings = DatabaseSettings {
            wait: Duration::from_secs(10),
            statement_timeout: Duration::from_secs(60),
            lock_timeout: Duration::from_secs(60),
            ..DatabaseSettings::default()
        };
        let db = Db::new(&url, &settings);
        PostgresLedger::new(db, Arc::default())
    }

    fn request(&self, key: usize, policy: Policy, zone: &str, at: UnixNanos) -> TakeRequest {
        TakeRequest {
            tenant: self.tenant,
            key: self.keys[key],
            policy,
            at,
            calendar: window(policy, &Zone::named(zone).expect("a zone"), at),
            limit: 50,
            want: 5,
        }
    }

    fn row(&self, key: usize, taken: Taken) -> LedgerRow {
        LedgerRow {
            tenant: self.tenant,
            key: self.keys[key],
            policy: Policy::Daily,
            window_start: taken.window.span.start,
        }
    }

    async fn used(&self) -> i64 {
        let sql = "SELECT coalesce(sum(used), 0)::bigint FROM quota_usage";
        let row = self.client.query_one(sql, &[]).await.expect("a sum");
        row.get(0)
    }

    /// Returns how many pairs of windows with usage overlap.
    async fn overlaps(&self) -> i64 {
        let sql = "SELECT count(*) FROM quota_usage a JOIN quota_usage b USING (tenant_id, key_id, policy) \
            WHERE a.used > 0 AND b.used > 0 AND a.window_start < b.window_start \
            AND b.window_start < a.window_end";
        let row = self.client.query_one(sql, &[]).await.expect("a count");
        row.get(0)
    }
}

fn at(text: &str) -> UnixNanos {
    let at: DateTime<Utc> = text.parse().expect("a time");
    UnixNanos(u64::try_from(at.timestamp_nanos_opt().expect("in range")).expect("after 1970"))
}

async fn take(ledger: &PostgresLedger, request: TakeRequest) -> Taken {
    let mut taken = ledger.take(&[request]).await;
    taken.remove(0).expect("a response")
}

/// The replicas use different time zones, and all of them open the first window of each key at the same time.
#[tokio::test(flavor = "multi_thread")]
async fn replicas_that_open_a_window_concurrently_agree_on_one() {
    let world = World::with_keys(30).await;
    let now = at("2026-11-24T10:00:00Z");
    let zones = ["UTC", "Asia/Tokyo", "Pacific/Honolulu", "Asia/Kolkata"];
    let replicas: Vec<_> = zones.iter().map(|_| world.ledger()).collect();
    let calls = replicas.iter().zip(zones).map(|(ledger, zone)| {
        let requests: Vec<_> = (0..world.keys.len())
            .map(|key| world.request(key, Policy::Daily, zone, now))
            .collect();
        async move { ledger.take(&requests).await }
    });
    let answers = futures_util::future::join_all(calls).await;
    let mut granted = 0;
    let mut windows = std::collections::HashSet::new();
    for key in 0..world.keys.len() {
        let taken: Vec<_> = answers
            .iter()
            .map(|answer| *answer[key].as_ref().expect("a response"))
            .collect();
        for one in &taken {
            assert_eq!(one.window, taken[0].window, "key {key}");
            assert!(one.window.span.contains(now));
            granted += one.granted;
        }
        assert_eq!(taken.iter().map(|one| one.used).max(), Some(20));
        windows.insert(taken[0].window.span.start);
    }
    assert_eq!(granted, 20 * world.keys.len() as u64);
    assert_eq!(world.used().await, i64::try_from(granted).expect("a sum"));
    assert_eq!(world.overlaps().await, 0);
}

/// A clean stop returns the blocks of many keys, two for each key. Set `DRAIN_KEYS=100000` for a measurement with more
/// keys.
#[tokio::test(flavor = "multi_thread")]
async fn drain_returns_the_blocks_of_many_keys_exactly() {
    let count = drain_keys();
    let world = World::with_keys(count).await;
    let clock = Arc::new(SystemClock::new());
    let store = LocalStore::new(
        clock.clone(),
        Arc::new(world.ledger()),
        KeyTableSettings {
            ledger_deadline: Duration::from_secs(60),
            call_deadline: Duration::from_secs(60),
            drain_deadline: Duration::from_secs(100),
            ..KeyTableSettings::default()
        },
    );
    let limiter = Limiter::new(store, clock);
    let rate = RatePolicy {
        rpm: NonZeroU32::MIN,
        burst: NonZeroU32::MIN,
    };
    let (daily, monthly) = (NonZeroU64::new(5000), NonZeroU64::new(50_000));
    let policies = Policies::new(rate, daily, monthly, Zone::utc(), false);
    let admitted = stream::iter(&world.keys)
        .map(|key| async {
            let handle = limiter.handle(world.tenant, *key).expect("there is room");
            let decision = limiter.admit(&handle, &policies, NonZeroU32::MIN).await;
            i64::from(decision.expect("the ledger responds").is_allowed())
        })
        .buffer_unordered(100)
        .fold(0, async |sum, one| sum + one)
        .await;
    assert_eq!(usize::try_from(admitted), Ok(count));
    assert!(world.used().await > 100 * admitted, "no blocks are held");
    let began = Instant::now();
    assert_eq!(limiter.drain().await.lost, 0);
    println!(
        "{count} keys with two blocks each: drained in {:?}",
        began.elapsed()
    );
    assert_eq!(world.used().await, 2 * admitted);
}

/// A random sequence of calls gets the same results from PostgreSQL and from the limiter's test ledger.
#[tokio::test(flavor = "multi_thread")]
async fn postgres_behaves_like_the_test_ledger() {
    let world = World::with_keys(4).await;
    let (postgres, model) = (world.ledger(), TestLedger::new());
    let mut random = fastrand::Rng::with_seed(7);
    let zones = [
        "UTC",
        "Asia/Tokyo",
        "Pacific/Honolulu",
        "Europe/Berlin",
        "Asia/Kolkata",
    ];
    let mut now = at("2026-10-20T10:00:00Z");
    let mut held: Vec<(LedgerRow, u64)> = Vec::new();
    let (mut granted, mut shortened) = (0, 0);
    for step in 0..250 {
        if random.u8(0..4) == 0 {
            now = now.saturating_add(Nanos::from_secs(random.u64(0..30 * 3600)));
        }
        if random.u8(0..4) == 0 && !held.is_empty() {
            // A batch may list a row only once, so all tokens held for one row are returned together.
            held.sort_unstable();
            let (row, _) = held[random.usize(0..held.len())];
            let all = held.extract_if(.., |(it, _)| *it == row);
            let batch = ReturnBatch {
                id: Uuid::now_v7(),
                rows: vec![(row, all.map(|(_, n)| n).sum())],
            };
            // Returning the batch a second time has no effect.
            for _ in 0..2 {
                postgres
                    .give_back(&batch)
                    .await
                    .expect("the batch is applied");
                model.give_back(&batch).await.expect("the batch is applied");
            }
        }
        // Sometimes, tokens are taken hours later, possibly from the next window.
        let later = now.saturating_add(Nanos::from_secs(
            random.u64(0..2) * random.u64(0..20 * 3600),
        ));
        let mut keys: Vec<_> = (0..world.keys.len()).collect();
        random.shuffle(&mut keys);
        let requests: Vec<_> = keys[..random.usize(1..4)]
            .iter()
            .map(|key| {
                let policy = [Policy::Daily, Policy::Monthly][random.usize(0..2)];
                let zone = zones[random.usize(0..zones.len())];
                TakeRequest {
                    want: random.u64(1..20),
                    limit: random.u64(1..200),
                    ..world.request(*key, policy, zone, later)
                }
            })
            .collect();
        let answers = postgres.take(&requests).await;
        let expected = model.take(&requests).await;
        for ((request, answer), expected) in requests.iter().zip(answers).zip(expected) {
            let answer = answer.expect("PostgreSQL responds");
            assert_eq!(
                answer,
                expected.expect("the model responds, too"),
                "step {step}: {request:?}"
            );
            granted += answer.granted;
            shortened += u64::from(answer.window.is_shortened());
            if answer.granted > 0 {
                let row = LedgerRow {
                    tenant: request.tenant,
                    key: request.key,
                    policy: request.policy,
                    window_start: answer.window.span.start,
                };
                held.push((row, answer.granted));
            }
        }
    }
    assert!(
        granted > 500 && shortened > 50,
        "{granted} granted, {shortened} shortened"
    );
    assert_eq!(world.overlaps().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_key_fails_without_affecting_others() {
    let world = World::with_keys(3).await;
    let ledger = world.ledger();
    let now = at("2026-11-24T10:00:00Z");
    let request = |key| world.request(key, Policy::Daily, "UTC", now);
    take(&ledger, request(1)).await;
    let sql = format!("DELETE FROM api_keys WHERE id = '{}'", world.keys[1].0);
    world
        .client
        .batch_execute(&sql)
        .await
        .expect("the key is deleted");
    let answers = ledger.take(&[request(0), request(1), request(2)]).await;
    let granted: Vec<_> = answers
        .iter()
        .map(|it| it.as_ref().ok().map(|taken| taken.granted))
        .collect();
    assert_eq!(granted, [Some(5), None, Some(5)]);
    // Returning tokens for the deleted key does not affect the other keys either.
    let taken = *answers[0].as_ref().expect("a response");
    let batch = ReturnBatch {
        id: Uuid::now_v7(),
        rows: vec![(world.row(0, taken), 2), (world.row(1, taken), 5)],
    };
    ledger
        .give_back(&batch)
        .await
        .expect("the batch is applied");
    assert_eq!(world.used().await, 3 + 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn batch_sent_twice_concurrently_is_applied_once() {
    let world = World::with_keys(1).await;
    let ledger = world.ledger();
    let now = at("2026-11-24T10:00:00Z");
    let taken = take(&ledger, world.request(0, Policy::Daily, "UTC", now)).await;
    let batch = ReturnBatch {
        id: Uuid::now_v7(),
        rows: vec![(world.row(0, taken), 2)],
    };
    let answers = futures_util::future::join_all((0..8).map(|_| ledger.give_back(&batch))).await;
    assert!(answers.iter().all(Result::is_ok));
    assert_eq!(world.used().await, 3);
}

/// Takes tokens as the previous version does during a rolling upgrade.
async fn take_as_before(world: &World, key: usize, start: &str, want: i64) {
    let sql = format!(
        "INSERT INTO quota_usage (tenant_id, key_id, policy, window_start, used) \
         VALUES ('{tenant}', '{key}', 'daily', '{start}', 0) \
         ON CONFLICT ON CONSTRAINT quota_usage_pkey DO NOTHING; \
         UPDATE quota_usage SET used = used + {want}, updated_at = now() \
         WHERE tenant_id = '{tenant}' AND key_id = '{key}' AND policy = 'daily' AND window_start = '{start}'",
        tenant = world.tenant.0,
        key = world.keys[key].0,
    );
    world
        .client
        .batch_execute(&sql)
        .await
        .expect("the tokens are taken");
}

#[tokio::test(flavor = "multi_thread")]
async fn previous_version_counts_in_the_same_windows() {
    let world = World::with_keys(2).await;
    let ledger = world.ledger();
    let now = at("2026-11-24T10:00:00Z");
    let midnight = "2026-11-24T00:00:00Z";
    // For the first key, the previous version creates the row, so the current version takes tokens from that row,
    // regardless of the time zone.
    take_as_before(&world, 0, midnight, 30).await;
    for zone in ["UTC", "Asia/Tokyo", "Pacific/Honolulu"] {
        let taken = take(&ledger, world.request(0, Policy::Daily, zone, now)).await;
        assert_eq!(taken.window.span.start, at(midnight), "{zone}");
        assert_eq!(taken.window.span.end, at("2026-11-25T00:00:00Z"), "{zone}");
    }
    assert_eq!(world.used().await, 45);
    // For the second key, the current version creates the row, so the previous version takes tokens from that row.
    take(&ledger, world.request(1, Policy::Daily, "UTC", now)).await;
    take_as_before(&world, 1, midnight, 40).await;
    let taken = take(&ledger, world.request(1, Policy::Daily, "UTC", now)).await;
    assert_eq!((taken.granted, taken.used), (5, 50));
}

/// The deletion of a key does not deadlock with concurrent ledger calls, either for this key or for other keys.
#[tokio::test(flavor = "multi_thread")]
async fn deletion_and_ledger_do_not_deadlock() {
    let world = World::with_keys(3).await;
    let ledger = world.ledger();
    let now = at("2026-11-24T10:00:00Z");
    for key in 0..3 {
        take(&ledger, world.request(key, Policy::Monthly, "UTC", now)).await;
    }
    let id = world.keys[1].0;
    let deleting = world.database.connect().await;
    let sql = format!(
        "SET lock_timeout = '700ms'; BEGIN; SELECT 1 FROM api_keys WHERE id = '{id}' FOR UPDATE"
    );
    deleting
        .batch_execute(&sql)
        .await
        .expect("the key is locked");
    let mut requests = Vec::new();
    for key in 0..3 {
        requests.push(world.request(key, Policy::Daily, "UTC", now));
        requests.push(world.request(key, Policy::Monthly, "UTC", now));
    }
    let calls = tokio::spawn(async move { ledger.take(&requests).await });
    let waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted";
    for _ in 0..200 {
        let row = world.client.query_one(waiting, &[]).await.expect("a count");
        if row.get::<_, i64>(0) > 0 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    let sql = format!("DELETE FROM api_keys WHERE id = '{id}'");
    deleting
        .batch_execute(&sql)
        .await
        .expect("the key is deleted");
    deleting.batch_execute("COMMIT").await.expect("committed");
    let answers = calls.await.expect("the task does not panic");
    let granted: Vec<_> = answers
        .iter()
        .map(|it| it.as_ref().ok().map(|taken| taken.granted))
        .collect();
    assert_eq!(granted[..2], [Some(5); 2]);
    assert_eq!(granted[2..4], [None; 2]);
    assert_eq!(granted[4..], [Some(5); 2]);
}
