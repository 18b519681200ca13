//! Runs three replicas as in production, and tests that a change made on one replica reaches all replicas: with
//! messages between them, without messages, and without Redis.
//!
//! Prints how long changes take to arrive, and asserts bounds that hold on a busy machine. The benchmarks measure
//! whether changes arrive within one second, as documented.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use quota_server::{db, repo::invalidation};
use quota_testkit::{
    proxy::{Fault, FaultProxy, Upstream},
    redis::RedisServer,
};
use reqwest::{Client, Method};
use secrecy::SecretString;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::sleep;

use crate::support::{
    app::{PASSWORD, TestApp},
    locks::wait_for_lock,
    postgres::TestDatabase,
    quota::{Quota, data_dir},
};

/// The time limit for every change. Long enough for a busy machine.
const AT_MOST: Duration = Duration::from_secs(60);
/// The time limit for most changes. A pause of the machine delays only a few changes.
const MOST_WITHIN: Duration = Duration::from_secs(5);
const CHANGES: usize = 120;
/// The number of concurrent changes.
const AT_ONCE: usize = 5;

struct World {
    redis: RedisServer,
    proxy: FaultProxy,
    replicas: Vec<Quota>,
    http: Client,
    token: String,
    _database: Arc<TestDatabase>,
    _dir: TempDir,
}

impl World {
    async fn start() -> Self {
        let migrate =
            |url: String| async move { db::migrate(&SecretString::from(url)).await.map(drop) };
        let database = Arc::new(TestDatabase::create(migrate).await);
        let redis = RedisServer::start().await;
        let proxy = FaultProxy::start(Upstream::Tcp(redis.addr())).await;
        let dir = data_dir();
        let url = format!("redis://{}", proxy.addr());
        let settings = [
            ("DATABASE_URL", database.url()),
            ("REDIS_URL", &url),
            ("QUOTA_ADMIN_RPM", "0"),
            ("QUOTA_DATABASE_POOL", "7"),
            ("QUOTA_DATABASE_WAIT", "10s"),
            ("QUOTA_DATABASE_STATEMENT_TIMEOUT", "60s"),
            // This test checks which requests are admitted, not how many.
            ("QUOTA_ON_REDIS_FAILURE", "open"),
        ];
        let replicas = (0..3)
            .map(|_| Quota::start_with(dir.path(), &settings))
            .collect::<Vec<_>>();
        let mut world = Self {
            redis,
            proxy,
            replicas,
            http: Client::new(),
            token: String::new(),
            _database: database,
            _dir: dir,
        };
        let account = json!({"email": "owner@example.com", "password": PASSWORD});
        let account = world.act(Method::POST, "/auth/register", account).await;
        let token = account["access_token"].as_str();
        world.token = token.map(str::to_owned).expect("a token");
        world
    }

    /// Sends a request to the first replica.
    async fn act(&self, method: Method, path: &str, body: Value) -> Value {
        let url = format!("http://{}{path}", self.replicas[0].addr);
        let answer = self
            .http
            .request(method, url)
            .bearer_auth(&self.token)
            .json(&body)
            .send()
            .await
            .expect("the server responds");
        let status = answer.status();
        let text = answer.text().await.expect("text");
        assert!(status.is_success(), "{path}: {status} {text}");
        serde_json::from_str(&text).unwrap_or(Value::Null)
    }

    /// Returns the status of a request with the key, and the limit in the response if there is one.
    async fn used(&self, replica: &Quota, key: &str) -> (u16, Option<String>) {
        let url = format!("http://{}/v1/echo", replica.addr);
        let answer = self.http.get(url).header("X-API-Key", key).send().await;
        let answer = answer.expect("the server responds");
        let limit = answer.headers().get("x-ratelimit-limit");
        let limit = limit.map(|it| it.to_str().expect("text").to_owned());
        (answer.status().as_u16(), limit)
    }

    /// Creates a plan and a key, lets every replica cache both, and changes the plan or the key. Returns how long after
    /// the response each replica applied the change.
    async fn change(&self, n: usize) -> Vec<Duration> {
        let plan =
            json!({"name": format!("Plan {n} {}", uuid::Uuid::now_v7()), "default_rpm": 600_000});
        let plan = self.act(Method::POST, "/admin/plans", plan).await;
        let plan_id = plan["id"].as_str().expect("an id");
        let key = json!({"name": "it", "plan_id": plan_id});
        let made = self.act(Method::POST, "/admin/api-keys", key).await;
        let key = made["key"].as_str().expect("the key's secret");
        let path = format!(
            "/admin/api-keys/{}",
            made["api_key"]["id"].as_str().expect("an id")
        );
        for replica in &self.replicas {
            assert_eq!(self.used(replica, key).await.0, 200);
        }
        let expected = match n % 4 {
            0 => {
                self.act(Method::PATCH, &path, json!({"is_active": false}))
                    .await;
                (401, None)
            }
            1 => {
                let path = format!("/admin/plans/{plan_id}");
                self.act(Method::PATCH, &path, json!({"default_rpm": 700_000}))
                    .await;
                (200, Some("700000".to_owned()))
            }
            2 => {
                self.act(Method::DELETE, &path, json!({})).await;
                (401, None)
            }
            _ => {
                let path = format!("{path}/rotate");
                self.act(Method::POST, &path, json!({"grace_seconds": 0}))
                    .await;
                (401, None)
            }
        };
        let answered = Instant::now();
        let watch = self.replicas.iter().map(async |replica| {
            while self.used(replica, key).await != expected {
                assert!(
                    answered.elapsed() < AT_MOST,
                    "change {n} has not been applied by {}",
                    replica.addr
                );
                sleep(Duration::from_millis(10)).await;
            }
            let lag = answered.elapsed();
            // The change remains applied.
            sleep(Duration::from_millis(300)).await;
            assert_eq!(self.used(replica, key).await, expected, "change {n}");
            lag
        });
        join_all(watch).await
    }

    /// Makes many changes, and prints how long they took to reach the replicas.
    async fn many(&self, what: &str) {
        let mut lags = Vec::new();
        for group in (0..CHANGES).collect::<Vec<_>>().chunks(AT_ONCE) {
            let changes = group.iter().map(|n| self.change(*n));
            lags.extend(join_all(changes).await.into_iter().flatten());
        }
        lags.sort_unstable();
        let at = |part: usize| lags[(lags.len() - 1) * part / 100];
        println!(
            "{what}: {} changes on 3 replicas: p50 {:?}, p99 {:?}, slowest {:?}",
            lags.len() / 3,
            at(50),
            at(99),
            at(100)
        );
        assert!(at(90) < MOST_WITHIN, "{:?}", at(90));
    }

    async fn counted(&self, name: &str) -> u64 {
        let counts = self.replicas.iter().map(|it| it.counter(&self.http, name));
        join_all(counts).await.into_iter().sum()
    }
}

/// A poll reads only rows with numbers above the highest one so far. If a row with a lower number could be committed
/// later, the poll would miss this row.
#[tokio::test(flavor = "multi_thread")]
async fn changes_are_committed_in_the_order_of_their_numbers() {
    let app = TestApp::setup().without_jobs().start().await;
    let account = app.register().await;
    let insert = format!(
        "INSERT INTO revocations (tenant_id, target_type, target_id) \
         VALUES ('{0}', 'tenant', '{0}') RETURNING seq",
        account.tenant_id
    );
    let (mut first, second) = (app.database.connect().await, app.database.connect().await);
    let observer = app.database.connect().await;
    let transaction = first.transaction().await.expect("a transaction");
    let earlier = transaction.query_one(&insert, &[]).await.expect("a row");
    let committed = tokio::spawn(async move { second.query_one(&insert, &[]).await });
    wait_for_lock(&observer, "locktype = 'advisory' AND NOT granted").await;
    let highest = async || {
        let mut tx = app.state.db.system().await.expect("a transaction");
        let position = invalidation::position(&mut tx).await.expect("a position");
        tx.commit().await.expect("committed");
        position.highest
    };
    let earlier = earlier.get::<_, i64>(0);
    assert!(highest().await < earlier);
    transaction.commit().await.expect("committed");
    let later = committed.await.expect("no panic").expect("a row");
    let later = later.get::<_, i64>(0);
    assert!(later > earlier, "{later} {earlier}");
    assert_eq!(highest().await, later);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_change_reaches_every_replica() {
    let world = World::start().await;
    world.many("with messages").await;
    let received = world.counted("quota_invalidations_received_total").await;
    assert!(received > 2 * CHANGES as u64, "{received} were received");
    // While the machine is paused, a poll can fail.
    let errors = world.counted("quota_invalidation_poll_errors_total").await;
    let polls = world.counted("quota_invalidation_polls_total").await;
    assert!(errors * 20 <= polls, "{errors} of {polls} polls failed");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_change_reaches_every_replica_without_messages() {
    let world = World::start().await;
    // Forbid publishing and subscribing. All other commands work.
    let done = world
        .redis
        .command("ACL SETUSER default resetchannels")
        .await;
    assert!(done.contains("OK"), "{done}");
    let before = world.counted("quota_invalidations_received_total").await;
    world.many("without messages").await;
    let received = world.counted("quota_invalidations_received_total").await - before;
    assert_eq!(received, 0, "the channel was not cut");
    assert!(
        world
            .counted("quota_invalidation_publish_errors_total")
            .await
            > 0
    );
    assert!(world.counted("quota_key_shared_misses_total").await > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_change_reaches_every_replica_while_redis_is_unreachable() {
    let world = World::start().await;
    world.proxy.set(Fault::Refuse);
    world.proxy.cut();
    world.many("without Redis").await;
}
