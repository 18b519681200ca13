//! Tests that make PostgreSQL unreachable for a while: keys in memory are accepted during the grace period, no other
//! key is accepted, no request hangs, and there are no internal errors.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use quota_server::db;
use quota_testkit::{
    proxy::{Fault, FaultProxy, Upstream},
    redis::RedisServer,
};
use secrecy::SecretString;
use serde_json::json;
use tokio::{io::AsyncWriteExt as _, net::TcpStream};

use crate::support::{
    app::{Account, Answer, Key, PASSWORD, Setup, TestApp},
    postgres::TestDatabase,
};

/// The time limit for a response, regardless of what PostgreSQL does, and for noticing a change. Much longer than
/// necessary on an idle machine, but shorter than the request timeout that [`world`] sets.
const AT_MOST: Duration = Duration::from_secs(30);

/// A server whose connections to PostgreSQL can be made to fail.
struct World {
    app: TestApp,
    proxy: FaultProxy,
    account: Account,
    key: Key,
}

/// Starts a proxy in front of the test's PostgreSQL. Returns the proxy, and the URL of the database through the proxy.
pub(crate) async fn through_proxy(database: &TestDatabase) -> (FaultProxy, String) {
    let config: tokio_postgres::Config = database.url().parse().expect("a URL");
    let port = config.get_ports().first().copied().unwrap_or(5432);
    let upstream = match &config.get_hosts()[0] {
        tokio_postgres::config::Host::Unix(dir) => {
            Upstream::Unix(PathBuf::from(dir).join(format!(".s.PGSQL.{port}")))
        }
        tokio_postgres::config::Host::Tcp(host) => {
            let addr = tokio::net::lookup_host((host.as_str(), port))
                .await
                .expect("the host resolves");
            Upstream::Tcp(addr.into_iter().next().expect("an address"))
        }
    };
    let proxy = FaultProxy::start(upstream).await;
    let user = config.get_user().unwrap_or("postgres");
    let password = config
        .get_password()
        .map(|it| String::from_utf8_lossy(it).into_owned());
    let password = password.map(|it| format!(":{it}")).unwrap_or_default();
    let name = config.get_dbname().expect("a database");
    let url = format!("postgres://{user}{password}@{}/{name}", proxy.addr());
    (proxy, url)
}

async fn world(change: impl FnOnce(Setup) -> Setup) -> World {
    let migrate =
        |url: String| async move { db::migrate(&SecretString::from(url)).await.map(drop) };
    let database = Arc::new(TestDatabase::create(migrate).await);
    let (proxy, url) = through_proxy(&database).await;
    // The database timeouts are the server's defaults. `TestApp` sets longer ones.
    let setup = TestApp::setup()
        .database(database)
        .url(url)
        .flag("--database-wait=500ms")
        .flag("--database-statement-timeout=2s")
        .flag("--database-lock-timeout=1s")
        .flag("--request-timeout=60s");
    let app = change(setup).start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({"default_rpm": 60_000})).await;
    let key = app.key(&account, &plan).await;
    World {
        app,
        proxy,
        account,
        key,
    }
}

impl World {
    /// Sets the fault that affects open and new connections. `Refuse` also resets every open connection.
    fn lose(&self, fault: Fault) {
        self.proxy.set(fault);
        if fault == Fault::Refuse {
            self.proxy.cut();
        }
    }

    fn find(&self) {
        self.proxy.set(Fault::Pass);
        // Close the connections that were open during the fault, because they remain silent.
        self.proxy.cut();
    }

    async fn ready(&self) -> u16 {
        self.app.get("/health/ready").send().await.status
    }

    /// Waits until the server has recovered.
    async fn recovers(&self) {
        let began = Instant::now();
        loop {
            let plans = self
                .app
                .get("/admin/plans")
                .bearer(&self.account.access_token)
                .send()
                .await;
            if plans.status == 200 && self.ready().await == 200 {
                return;
            }
            assert_eq!(plans.status, 503, "{}", plans.text);
            assert!(
                began.elapsed() < Duration::from_secs(20),
                "the server does not recover"
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

fn assert_unavailable(answer: &Answer, what: &str) {
    assert_eq!(answer.status, 503, "{what}: {}", answer.text);
    assert!(answer.number("retry-after") >= 1, "{what}");
}

/// Returns a well-formed key that does not exist.
fn unknown_key() -> String {
    use quota_server::secret_text::{Kind, SecretText};
    SecretText::generate(Kind::ApiKey)
        .expect("random bytes")
        .reveal()
}

async fn an_outage(fault: Fault) {
    let world = world(|setup| setup).await;
    let app = &world.app;
    assert_eq!(app.echo(&world.key.text).await.status, 200);
    assert_eq!(world.ready().await, 200);

    world.lose(fault);
    // Readiness is cached for a quarter of a second.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let began = Instant::now();
    assert_unavailable(&app.get("/health/ready").send().await, "ready");
    assert!(began.elapsed() < AT_MOST, "{:?}", began.elapsed());
    assert_eq!(
        app.get("/health/live").send().await.status,
        200,
        "the liveness probe still succeeds"
    );

    // Wait until cached records are stale. After that, they are served only during the grace period.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let token = &world.account.access_token;
    let unknown = unknown_key();
    let began = Instant::now();
    let (used, other, list, make, login) = tokio::join!(
        app.echo(&world.key.text),
        app.echo(&unknown),
        app.get("/admin/plans").bearer(token).send(),
        app.post("/admin/plans", json!({"name": "Lost", "default_rpm": 1}))
            .bearer(token)
            .send(),
        app.post(
            "/auth/login",
            json!({"email": "a@b.example", "password": "violet-harbour-quilt"})
        )
        .send(),
    );
    assert!(began.elapsed() < AT_MOST, "{:?}", began.elapsed());
    assert_eq!(used.status, 200, "a key in use is served: {}", used.text);
    assert_unavailable(&other, "an unknown key");
    assert_unavailable(&list, "a list");
    assert_unavailable(&make, "a change");
    assert_unavailable(&login, "a login");

    world.find();
    world.recovers().await;
    assert_eq!(app.echo(&world.key.text).await.status, 200);
    assert_eq!(
        app.echo(&unknown).await.status,
        401,
        "the failed lookup was not cached"
    );
    let plans = app.get("/admin/plans").bearer(token).send().await;
    assert!(
        !plans.text.contains("Lost"),
        "a rejected change was made: {}",
        plans.text
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_that_rejects_connections_is_survived() {
    an_outage(Fault::Refuse).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_postgres_is_survived() {
    an_outage(Fault::BlackHole).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn key_in_use_is_served_no_longer_than_the_grace_period() {
    let world = world(|setup| setup.flag("--stale-grace=2s")).await;
    assert_eq!(world.app.echo(&world.key.text).await.status, 200);
    world.lose(Fault::Refuse);
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(
        world.app.echo(&world.key.text).await.status,
        200,
        "within the grace period"
    );
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_unavailable(
        &world.app.echo(&world.key.text).await,
        "after the grace period",
    );
    world.find();
    world.recovers().await;
    assert_eq!(world.app.echo(&world.key.text).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn unreachable_ledger_reduces_capacity_and_never_exceeds_a_quota() {
    let world = world(|setup| setup).await;
    let plan = world
        .app
        .plan(
            &world.account,
            json!({"default_rpm": 60_000, "daily_quota": 300}),
        )
        .await;
    let key = world.app.key(&world.account, &plan).await;
    // A block is at most a hundredth of the quota: three tokens.
    assert_eq!(world.app.echo(&key.text).await.status, 200);
    world.lose(Fault::Refuse);
    let (mut served, mut refused) = (1, 0);
    for _ in 0..40 {
        let began = Instant::now();
        let answer = world.app.echo(&key.text).await;
        assert!(began.elapsed() < AT_MOST, "{:?}", began.elapsed());
        if answer.status == 200 {
            served += 1;
            continue;
        }
        assert_unavailable(&answer, "a quota");
        assert_eq!(answer.problem(), "temporary-reduced-capacity");
        refused += 1;
        if refused == 3 {
            break;
        }
    }
    // The tokens of the served requests were available locally or were prefetched.
    assert!(
        served <= 9 && refused == 3,
        "{served} served, {refused} refused"
    );
    world.find();
    world.recovers().await;
    let mut status = 503;
    let began = Instant::now();
    while status == 503 && began.elapsed() < Duration::from_secs(20) {
        tokio::time::sleep(Duration::from_millis(100)).await;
        status = world.app.echo(&key.text).await.status;
    }
    assert_eq!(status, 200);
    served += 1 + world.app.spend(&key.text).await;
    assert!(served <= 300, "{served}: more than the quota");
    assert!(
        served >= 291,
        "{served} of 300: more than three blocks were lost"
    );
}

/// Clients disconnect at various points during a request.
#[tokio::test(flavor = "multi_thread")]
async fn canceled_requests_leave_no_broken_connection_behind() {
    let world = world(|setup| setup.flag("--database-pool=6")).await;
    world.proxy.set(Fault::Delay(Duration::from_millis(3)));
    let token = &world.account.access_token;
    for step in 0..40_u64 {
        let name = format!("Left {step}");
        let body = json!({"name": name, "default_rpm": 60}).to_string();
        let request = format!(
            "POST /admin/plans HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut stream = TcpStream::connect(world.app.addr)
            .await
            .expect("the server listens");
        stream.write_all(request.as_bytes()).await.expect("sent");
        tokio::time::sleep(Duration::from_millis(step * 2)).await;
        stream.set_zero_linger().expect("an open connection");
        drop(stream);
    }
    world.proxy.set(Fault::Pass);
    world.recovers().await;
    // The pool's connections have no leftover role, tenant or transaction.
    let other = world.app.register().await;
    for _ in 0..6 {
        let plans = world
            .app
            .get("/admin/plans")
            .bearer(&other.access_token)
            .send()
            .await;
        assert_eq!((plans.status, &plans.body["total"]), (200, &json!(0)));
        world.app.plan(&world.account, json!({})).await;
    }
    // Changes are atomic: both a plan and its audit event exist, or neither does.
    let client = world.app.database.connect().await;
    let halves = client
        .query_one(
            "SELECT (SELECT count(*) FROM plans WHERE NOT EXISTS (SELECT FROM audit_events \
                WHERE action = 'plan.create' AND target_id = plans.id::text)), \
             (SELECT count(*) FROM audit_events WHERE action = 'plan.create' AND NOT EXISTS \
                (SELECT FROM plans WHERE plans.id::text = target_id))",
            &[],
        )
        .await
        .expect("a superuser sees all");
    let counts = (0..2).map(|i| halves.get::<_, i64>(i)).collect::<Vec<_>>();
    assert_eq!(counts, [0, 0]);
    // A transaction of a job can be idle for a moment, but a transaction that was left open stays idle.
    let idle = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                AND state LIKE 'idle in transaction%' AND state_change < now() - interval '1 second'";
    let mut left = 0;
    for _ in 0..2 {
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let row = client.query_one(idle, &[]).await;
        left = row.expect("a superuser sees all").get::<_, i64>(0);
        if left == 0 {
            break;
        }
    }
    assert_eq!(left, 0);
}

/// When a poll for invalidations is late, every key needs to be confirmed again. Only the first requests may wait for
/// the confirmation.
#[tokio::test(flavor = "multi_thread")]
async fn only_the_first_requests_wait_when_postgres_goes_silent() {
    const KEYS: usize = 30;
    const AT_ONCE: Duration = Duration::from_millis(300);
    let world = world(|setup| setup).await;
    let app = &world.app;
    let plan = app
        .plan(&world.account, json!({"default_rpm": 60_000}))
        .await;
    let mut keys = Vec::new();
    for _ in 0..KEYS {
        let key = app.key(&world.account, &plan).await;
        assert_eq!(app.echo(&key.text).await.status, 200);
        keys.push(key);
    }
    // Start another replica, which can always reach PostgreSQL.
    let other = TestApp::setup()
        .database(Arc::clone(&app.database))
        .start()
        .await;

    world.lose(Fault::BlackHole);
    tokio::time::sleep(Duration::from_millis(1000)).await;
    let mut waited = Vec::new();
    for key in &keys {
        let began = Instant::now();
        assert_eq!(app.echo(&key.text).await.status, 200);
        if began.elapsed() > AT_ONCE {
            waited.push(began.elapsed());
        }
    }
    assert!(waited.len() <= 3, "{} waited: {waited:?}", waited.len());
    assert!(app.metric("quota_key_stale_served_total").await >= 20.0);
    // An unknown key is still not admitted.
    assert_unavailable(&app.echo(&unknown_key()).await, "an unknown key");

    let token = &world.account.access_token;
    let path = format!("/admin/api-keys/{}", keys[0].id);
    let off = other.request(reqwest::Method::PATCH, &path);
    let off = off.bearer(token).json(json!({"is_active": false}));
    assert_eq!(off.send().await.status, 200);
    let path = format!("/admin/api-keys/{}", keys[1].id);
    let gone = other.request(reqwest::Method::DELETE, &path);
    assert_eq!(gone.bearer(token).send().await.status, 204);
    assert_eq!(other.echo(&keys[0].text).await.status, 401);

    world.find();
    let began = Instant::now();
    for key in &keys[..2] {
        while app.echo(&key.text).await.status != 401 {
            assert!(began.elapsed() < AT_MOST, "a change is not noticed");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    for key in &keys[2..] {
        assert_eq!(app.echo(&key.text).await.status, 200);
    }
}

/// Floods the server with well-formed keys that do not exist, each of which must be looked up.
#[tokio::test(flavor = "multi_thread")]
async fn flood_of_unknown_keys_does_not_affect_the_poll_the_ledger_or_known_keys() {
    const FLOOD: usize = 60;
    let world = world(|setup| setup.flag("--key-lookups=20")).await;
    let app = Arc::new(world.app);
    let plan = json!({"default_rpm": 60_000, "daily_quota": 500});
    let plan = app.plan(&world.account, plan).await;
    let with_quota = app.key(&world.account, &plan).await;
    let deleted = app.key(&world.account, &plan).await;
    for key in [&with_quota, &deleted, &world.key] {
        assert_eq!(app.echo(&key.text).await.status, 200);
    }
    let other = TestApp::setup()
        .database(Arc::clone(&app.database))
        .start()
        .await;

    world.proxy.set(Fault::Delay(Duration::from_millis(15)));
    let until = Instant::now() + Duration::from_secs(5);
    let flood = (0..FLOOD).map(|_| {
        let app = app.clone();
        tokio::spawn(async move {
            let mut answers = Vec::new();
            while Instant::now() < until {
                // The response is not validated against the OpenAPI document, because that takes longer than the
                // request.
                let call = app.http.get(app.url("/v1/echo"));
                let answer = call.header("x-api-key", unknown_key()).send().await;
                answers.push(answer.expect("the server responds").status().as_u16());
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            answers
        })
    });
    let flood = flood.collect::<Vec<_>>();
    tokio::time::sleep(Duration::from_millis(500)).await;

    let failed = "quota_invalidation_poll_errors_total";
    let (errors, polls) = (
        app.metric(failed).await,
        app.metric("quota_invalidation_polls_total").await,
    );
    let (mut known, mut ready) = (0, 0);
    // A block of the quota is five tokens.
    for _ in 0..25 {
        let began = Instant::now();
        assert_eq!(app.echo(&world.key.text).await.status, 200);
        assert!(began.elapsed() < AT_MOST, "{:?}", began.elapsed());
        let answer = app.echo(&with_quota.text).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        ready += u32::from(app.get("/health/ready").send().await.status == 200);
        known += 1;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(known == 25 && ready >= 20, "{known} known, {ready} ready");
    // A change takes effect during the flood.
    let path = format!("/admin/api-keys/{}", deleted.id);
    let gone = other.request(reqwest::Method::DELETE, &path);
    let gone = gone.bearer(&world.account.access_token).send().await;
    assert_eq!(gone.status, 204);
    let began = Instant::now();
    while app.echo(&deleted.text).await.status == 200 {
        assert!(began.elapsed() < AT_MOST, "a deleted key still works");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let errors = app.metric(failed).await - errors;
    let polls = app.metric("quota_invalidation_polls_total").await - polls;
    // On a busy machine, a poll may be late. If the flood had an effect, nearly all polls would be late.
    assert!(
        polls >= 3.0 && errors <= polls / 4.0,
        "{errors} of {polls} polls failed"
    );

    let mut counts = (0, 0);
    for flood in flood {
        for status in flood.await.expect("a response") {
            match status {
                401 => counts.0 += 1,
                503 => counts.1 += 1,
                other => panic!("{other}"),
            }
        }
    }
    assert!(
        counts.0 >= 5 && counts.1 >= 5,
        "{counts:?} looked up and rejected"
    );
    assert!(app.metric("quota_lookups_rejected_total").await >= 5.0);
    // After the flood, a key that is not in memory is looked up, although PostgreSQL is still slow.
    assert_eq!(app.echo(&unknown_key()).await.status, 401);
}

/// A change that waits too long for a lock can be retried, so its failure is not an internal error.
#[tokio::test]
async fn change_that_waits_too_long_for_a_lock_is_503() {
    let setup = TestApp::setup().flag("--database-lock-timeout=1s");
    let app = setup.start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({})).await;
    let path = format!("/admin/plans/{plan}");
    let patch = || {
        let call = app.request(reqwest::Method::PATCH, &path);
        call.json(json!({"burst": 7})).bearer(&account.access_token)
    };
    let other = app.database.connect().await;
    let hold = "BEGIN; SELECT id FROM plans FOR UPDATE";
    other
        .batch_execute(hold)
        .await
        .expect("the lock is acquired");
    let answer = patch().send().await;
    assert_eq!(answer.status, 503, "{:?}", answer.body);
    assert!(answer.number("retry-after") >= 1);
    other
        .batch_execute("ROLLBACK")
        .await
        .expect("the transaction ends");
    assert_eq!(patch().send().await.status, 200);
}

/// After a backup is restored, changes get numbers that are lower than those that the server has already polled.
#[tokio::test]
async fn changes_are_noticed_after_postgres_was_restored() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = json!({"default_rpm": 600_000, "burst": 10_000});
    let plan = app.plan(&account, plan).await;
    let key = app.key(&account, &plan).await;
    for burst in 1..=6 {
        let call = app.request(reqwest::Method::PATCH, &format!("/admin/plans/{plan}"));
        let call = call.json(json!({"burst": 10_000 + burst}));
        assert_eq!(call.bearer(&account.access_token).send().await.status, 200);
    }
    // Wait for several polls.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(app.echo(&key.text).await.status, 200);

    let restore = format!(
        "BEGIN; \
         CREATE TEMP TABLE first AS SELECT * FROM revocations ORDER BY seq LIMIT 1; \
         DELETE FROM revocations WHERE seq > (SELECT seq FROM first); \
         SELECT setval(pg_get_serial_sequence('revocations', 'seq'), (SELECT seq FROM first)); \
         UPDATE api_keys SET is_active = false WHERE id = '{id}'; \
         INSERT INTO revocations (tenant_id, target_type, target_id) \
             SELECT tenant_id, 'api_key', id FROM api_keys WHERE id = '{id}'; \
         COMMIT",
        id = key.id
    );
    let other = app.database.connect().await;
    other
        .batch_execute(&restore)
        .await
        .expect("the database is restored");
    let began = Instant::now();
    while app.echo(&key.text).await.status == 200 {
        assert!(
            began.elapsed() < AT_MOST,
            "a key that was ended is admitted"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!((401..=403).contains(&app.echo(&key.text).await.status));
}

/// A key was deleted by mistake, and PostgreSQL is restored to an earlier time while the replicas run.
#[tokio::test]
async fn restored_key_is_accepted_again() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({})).await;
    let key = app.key(&account, &plan).await;
    let other = app.database.connect().await;
    let keep = format!(
        "CREATE TABLE kept AS SELECT * FROM api_keys WHERE id = '{}'",
        key.id
    );
    other.batch_execute(&keep).await.expect("the row is kept");
    let call = app.request(
        reqwest::Method::DELETE,
        &format!("/admin/api-keys/{}", key.id),
    );
    assert_eq!(call.bearer(&account.access_token).send().await.status, 204);
    for _ in 0..10 {
        // The consumer keeps using the key, so its absence is cached.
        assert_eq!(app.echo(&key.text).await.status, 401);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    other
        .batch_execute(
            "BEGIN; \
             DELETE FROM revocations; \
             SELECT setval(pg_get_serial_sequence('revocations', 'seq'), 1); \
             INSERT INTO api_keys SELECT * FROM kept; \
             COMMIT",
        )
        .await
        .expect("the database is restored");
    let began = Instant::now();
    while app.echo(&key.text).await.status != 200 {
        assert!(
            began.elapsed() < AT_MOST,
            "a restored key is still rejected"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Simulates a restore that was followed by so many changes that their numbers are as high as before the restore.
#[tokio::test]
async fn a_restore_is_noticed_although_the_numbers_of_changes_have_caught_up() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = json!({"default_rpm": 600_000, "burst": 10_000});
    let plan = app.plan(&account, plan).await;
    let key = app.key(&account, &plan).await;
    for burst in 1..=6 {
        let call = app.request(reqwest::Method::PATCH, &format!("/admin/plans/{plan}"));
        let call = call.json(json!({"burst": 10_000 + burst}));
        assert_eq!(call.bearer(&account.access_token).send().await.status, 200);
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(app.echo(&key.text).await.status, 200);

    // The restored table is a new one, with a different change under the highest number.
    let restore = format!(
        "BEGIN; \
         CREATE TEMP TABLE before AS SELECT * FROM revocations; \
         TRUNCATE revocations; \
         INSERT INTO revocations OVERRIDING SYSTEM VALUE SELECT * FROM before ORDER BY seq; \
         UPDATE api_keys SET is_active = false WHERE id = '{id}'; \
         UPDATE revocations SET target_type = 'api_key', target_id = '{id}' \
             WHERE seq = (SELECT max(seq) FROM before); \
         COMMIT",
        id = key.id
    );
    let other = app.database.connect().await;
    other
        .batch_execute(&restore)
        .await
        .expect("the database is restored");
    let began = Instant::now();
    while app.echo(&key.text).await.status == 200 {
        assert!(
            began.elapsed() < AT_MOST,
            "a key that was ended is admitted"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!((401..=403).contains(&app.echo(&key.text).await.status));
}

/// A sign-in whose client disconnects before the password is verified does not count as a failed attempt.
#[tokio::test(flavor = "multi_thread")]
async fn sign_ins_given_up_during_an_outage_do_not_count_as_failed() {
    give_up_sign_ins(world(|setup| setup.flag("--login-free-failures=5")).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sign_ins_given_up_during_an_outage_do_not_count_as_failed_in_redis() {
    let redis = RedisServer::start().await;
    let url = format!("--redis-url={}", redis.url());
    let configure = |setup: Setup| {
        let setup = setup.flag("--login-free-failures=5").flag(url);
        setup.flag("--redis-timeout=2s")
    };
    give_up_sign_ins(world(configure).await).await;
}

async fn give_up_sign_ins(world: World) {
    let app = &world.app;
    let email = &world.account.email;
    world.lose(Fault::BlackHole);
    let impatient = reqwest::Client::builder()
        .timeout(Duration::from_millis(150))
        .build()
        .unwrap();
    for n in 0..20 {
        let body = json!({"email": email, "password": "incorrect-harbour-quilt"});
        let gone = impatient.post(app.url("/auth/login")).json(&body).send();
        let gone = gone.await;
        let is_given_up = gone.as_ref().is_err_and(reqwest::Error::is_timeout);
        assert!(is_given_up, "sign-in {n}: {gone:?}");
    }
    world.find();
    world.recovers().await;
    let sign_in = async |password: &str| {
        let body = json!({"email": email, "password": password});
        app.post("/auth/login", body).send().await.status
    };
    assert_eq!(sign_in(PASSWORD).await, 200);
    // Attempts whose password is verified do count.
    for _ in 0..5 {
        assert_eq!(sign_in("incorrect-harbour-quilt").await, 401);
    }
    assert_eq!(sign_in("incorrect-harbour-quilt").await, 429);
}
