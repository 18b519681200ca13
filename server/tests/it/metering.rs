//! Tests that every decision on a known key reaches `usage_log` exactly once, no matter what fails in between. The
//! exception is a flood of denials, some of which are only counted.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use quota_server::{
    clock::{Clock as _, SystemClock, TestClock, UnixNanos},
    db::{self, Db},
    metering,
};
use quota_testkit::proxy::Fault;
use reqwest::{Client, Method};
use secrecy::SecretString;
use serde_json::json;
use tempfile::TempDir;

use crate::{
    outage::through_proxy,
    support::{
        app::{Account, Key, Setup, TestApp},
        postgres::TestDatabase,
        quota::{Quota, data_dir},
    },
};

async fn database() -> Arc<TestDatabase> {
    let migrate =
        |url: String| async move { db::migrate(&SecretString::from(url)).await.map(drop) };
    Arc::new(TestDatabase::create(migrate).await)
}

/// A row of `usage_log`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Logged {
    key_id: String,
    endpoint: String,
    was_rejected: bool,
    policy: Option<String>,
    cost: i64,
    retry_after: Option<i32>,
    billing: String,
}

/// Returns the rows of the usage log by request ID. Panics if a request has two rows.
async fn logged(database: &TestDatabase) -> BTreeMap<String, Logged> {
    let client = database.connect().await;
    let rows = client
        .query(
            "SELECT request_id, key_id::text, endpoint, was_rejected, policy, cost, retry_after_seconds, billing \
             FROM usage_log",
            &[],
        )
        .await
        .expect("the log is readable");
    let mut found = BTreeMap::new();
    for row in rows {
        let id: String = row.get(0);
        let it = Logged {
            key_id: row.get(1),
            endpoint: row.get(2),
            was_rejected: row.get(3),
            policy: row.get(4),
            cost: row.get(5),
            retry_after: row.get(6),
            billing: row.get(7),
        };
        assert_eq!(found.insert(id.clone(), it), None, "{id} was counted twice");
    }
    found
}

/// Returns the value of a metric, as text.
async fn metric(app: &TestApp, name: &str) -> String {
    app.metric(name).await.to_string()
}

/// A server with a key and without background jobs: the test triggers shipping.
struct World {
    app: TestApp,
    account: Account,
    key: Key,
}

impl World {
    async fn start(change: impl FnOnce(Setup) -> Setup) -> Self {
        let app = change(TestApp::setup().without_jobs()).start().await;
        let account = app.register().await;
        let plan = json!({"default_rpm": 1_000_000, "burst": 1_000_000});
        let plan = app.plan(&account, plan).await;
        let key = app.key(&account, &plan).await;
        Self { app, account, key }
    }

    /// Sends one request, and returns its ID and status.
    async fn echo(&self) -> (String, u16) {
        let answer = self.app.echo(&self.key.text).await;
        let id = answer
            .header("x-request-id")
            .expect("every response has an ID");
        (id.to_owned(), answer.status)
    }

    async fn echoes(&self, count: usize) -> BTreeSet<String> {
        let mut ids = BTreeSet::new();
        for _ in 0..count {
            let (id, status) = self.echo().await;
            assert_eq!(status, 200);
            ids.insert(id);
        }
        ids
    }

    async fn logged(&self) -> BTreeSet<String> {
        logged(&self.app.database).await.into_keys().collect()
    }

    fn usage_directory(&self) -> PathBuf {
        let root = self.app.state.config.data_dir.join("usage");
        let found = metering::directories(&root).expect("a readable directory");
        assert_eq!(found.len(), 1, "{found:?}");
        found[0].clone()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_decision_is_recorded_by_every_way_in() {
    let world = World::start(|setup| setup).await;
    let (app, account) = (&world.app, &world.account);
    let plan = json!({"default_rpm": 60, "burst": 3, "daily_quota": 2});
    let key = app.key(account, &app.plan(account, plan).await).await;
    let token = app.service_token(account).await;

    let echo = app.get("/v1/echo").header("X-API-Key", &key.text);
    let echo = echo.header("X-Request-Id", "way-echo").send().await;
    assert_eq!(echo.status, 200);
    let check = json!({"key": key.text, "cost": 1, "endpoint": "GET /orders"});
    let check = app.post("/v1/check", check).bearer(&token);
    let check = check.header("X-Request-Id", "way-check").send().await;
    assert_eq!(check.body["allowed"], true, "{}", check.text);
    let forward = |id: &'static str| {
        app.request(Method::PUT, "/v1/forward-auth")
            .header("X-Service-Token", &token)
            .header("X-API-Key", &key.text)
            .header("X-Forwarded-Method", "DELETE")
            .header("X-Forwarded-Uri", "/items/7?secret=1")
            .header("X-Request-Id", id)
    };
    let denied = forward("way-forward").send().await;
    assert_eq!(denied.status, 429);
    let costly = json!({"key": key.text, "cost": 2});
    let costly = app.post("/v1/check", costly).bearer(&token);
    let costly = costly.header("X-Request-Id", "way-costly").send().await;
    assert_eq!(costly.body["allowed"], false, "{}", costly.text);

    // No decision is made on requests with keys that do not exist or must not be used.
    assert_eq!(app.echo("qk_nothing").await.status, 401);
    let path = format!("/admin/api-keys/{}", key.id);
    let off = app.act(account, "PATCH", &path, json!({"is_active": false}));
    assert_eq!(off.await.status, 200);
    assert_eq!(app.echo(&key.text).await.status, 401);

    assert_eq!(logged(&app.database).await, BTreeMap::new());
    app.ship_usage().await;
    let row = |endpoint: &str, policy: Option<&str>, cost| Logged {
        key_id: key.id.clone(),
        endpoint: endpoint.to_owned(),
        was_rejected: policy.is_some(),
        policy: policy.map(str::to_owned),
        cost,
        retry_after: None,
        billing: "free".to_owned(),
    };
    let mut rows = logged(&app.database).await;
    let forwarded = rows.get_mut("way-forward").expect("the row exists");
    let retry_after = forwarded.retry_after.take().expect("a time to retry");
    assert_eq!(
        denied.number("retry-after").to_string(),
        retry_after.to_string()
    );
    rows.get_mut("way-costly")
        .expect("the row exists")
        .retry_after = None;
    let expected = [
        ("way-echo", row("GET /v1/echo", None, 1)),
        ("way-check", row("GET /orders", None, 1)),
        ("way-forward", row("DELETE /items/7", Some("daily"), 1)),
        ("way-costly", row("", Some("daily"), 2)),
    ];
    let expected = expected.map(|(id, row)| (id.to_owned(), row));
    assert_eq!(rows, BTreeMap::from(expected));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_metering_nothing_is_recorded() {
    let world = World::start(|setup| setup.flag("--metering=off")).await;
    world.echoes(3).await;
    world.app.ship_usage().await;
    assert_eq!(world.logged().await, BTreeSet::new());
    assert!(!world.app.state.config.data_dir.join("usage").exists());
}

/// The connection is cut at many points in PostgreSQL's responses to a batch's transaction, including after PostgreSQL
/// has committed and before its response has arrived.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_without_an_answer_counts_nothing_twice() {
    let database = database().await;
    let (proxy, url) = through_proxy(&database).await;
    let setup = |setup: Setup| setup.database(database.clone()).url(url);
    let world = World::start(setup).await;
    world.echoes(1).await;
    world.app.ship_usage().await;
    let (mut sent, mut failed, mut unanswered) = (1, 0, 0);
    for bytes in 0..200 {
        world.echoes(1).await;
        sent += 1;
        proxy.set(Fault::CutAfter(bytes * 9));
        let shipped = world.app.state.metering.ship().await;
        proxy.set(Fault::Pass);
        if shipped.is_err() {
            failed += 1;
            if world.logged().await.len() == sent {
                unanswered += 1;
            }
        }
        world.app.ship_usage().await;
        if shipped.is_ok() && failed > 20 {
            break;
        }
    }
    assert_eq!(world.logged().await.len(), sent, "each exactly once");
    assert!(failed >= 20, "{failed} batches failed");
    assert!(unanswered >= 1, "{unanswered} had been committed");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_postgresql_decisions_go_on_and_are_shipped_later() {
    let database = database().await;
    let (proxy, url) = through_proxy(&database).await;
    let setup = |setup: Setup| setup.database(database.clone()).url(url);
    let world = World::start(setup).await;
    let mut ids = world.echoes(5).await;
    proxy.set(Fault::Refuse);
    proxy.cut();
    ids.extend(world.echoes(300).await);
    assert!(world.app.state.metering.ship().await.is_err());
    assert_eq!(
        metric(&world.app, "quota_usage_backlog_records").await,
        "305"
    );
    assert!(world.app.metric("quota_usage_backlog_bytes").await > 10_000.0);
    let oldest = world
        .app
        .metric("quota_usage_oldest_record_timestamp_seconds");
    assert!(oldest.await > 1_700_000_000.0);
    proxy.set(Fault::Pass);
    world.app.ship_usage().await;
    assert_eq!(world.logged().await, ids);
    assert_eq!(metric(&world.app, "quota_usage_backlog_records").await, "0");
    assert_eq!(
        metric(&world.app, "quota_usage_records_shipped_total").await,
        "305"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_owner_and_two_replays_at_once_count_nothing_twice() {
    // The requests fill several segments of 128 KiB. Their files are reused however long the test takes, because they
    // do not become too old on this clock.
    let flag = "--usage-backlog-max=1048576";
    let clock = Arc::new(TestClock::at(SystemClock::new().now()));
    let world = World::start(|setup| setup.flag(flag).clock(clock)).await;
    let app = &world.app;
    let mut ids = world.echoes(1).await;
    let directory = world.usage_directory();
    let writing = AtomicBool::new(true);
    // Use separate connections, as another process would.
    let replay = async || {
        let url = SecretString::from(app.database.url());
        let db = Db::new(&url, &app.state.config.database);
        let (mut records, mut rounds) = (0, 0);
        while writing.load(Ordering::Relaxed) {
            let config = &app.state.config;
            // A replay that waits too long for another transaction fails, so count only the replays that succeed.
            if let Ok(replayed) = metering::replay(config, &db, &directory).await {
                assert!(replayed.is_owned);
                records += replayed.records;
            }
            rounds += 1;
        }
        (records, rounds)
    };
    let owner = async || {
        let mut records = 0;
        while writing.load(Ordering::Relaxed) {
            records += app.state.metering.ship().await.unwrap_or(0);
        }
        records
    };
    let load = async {
        for _ in 0..6 {
            ids.extend(world.echoes(1_000).await);
        }
        writing.store(false, Ordering::Relaxed);
    };
    let (owner, first, second, ()) = tokio::join!(owner(), replay(), replay(), load);
    app.ship_usage().await;
    let retired = directory.read_dir().expect("a readable directory");
    let retired = retired.filter(|it| {
        let path = it.as_ref().expect("a readable entry").path();
        path.extension().is_some_and(|it| it == "new")
    });
    assert_eq!(retired.count(), 1, "a file is kept for another segment");
    assert_eq!(world.logged().await, ids);
    let shares = [owner, first.0, second.0];
    let busy = shares.iter().filter(|records| **records > 0).count();
    assert!(busy >= 2, "{shares:?}, {} and {} rounds", first.1, second.1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_backlog_stops_decisions_and_consumes_nothing() {
    let flag = "--usage-backlog-max=1048576";
    let world = World::start(|setup| setup.flag(flag)).await;
    let (app, account) = (&world.app, &world.account);
    let plan = json!({"default_rpm": 1, "burst": 40_000, "monthly_quota": 1_000_000});
    let key = app.key(account, &app.plan(account, plan).await).await;
    let long = "x".repeat(120);
    let mut allowed = 0_u64;
    let refused = loop {
        let answer = app.get("/v1/echo").header("X-API-Key", &key.text);
        let id = format!("{long}{allowed}");
        let answer = answer.header("X-Request-Id", &id).send().await;
        if answer.status != 200 {
            break answer;
        }
        allowed += 1;
        assert!(allowed < 20_000, "the backlog is never full");
    };
    // With these long request IDs, a record takes about 220 bytes, so the backlog of 1 MiB holds more than 3,000
    // records.
    assert!(allowed > 3_000, "{allowed}");
    assert_eq!(
        (refused.status, refused.problem()),
        (503, "insufficient-storage")
    );
    assert!(refused.number("retry-after") >= 1);
    let token = app.service_token(account).await;
    let forward = app
        .get("/v1/forward-auth")
        .header("X-Service-Token", &token)
        .header("X-API-Key", &key.text);
    let forward = forward.send().await;
    assert_eq!(
        (forward.status, forward.header("x-quota-decision")),
        (503, Some("unavailable"))
    );
    assert_eq!(metric(app, "quota_usage_unrecordable").await, "1");
    assert!(app.metric("quota_usage_decisions_rejected_total").await >= 2.0);

    app.ship_usage().await;
    tokio::time::sleep(Duration::from_millis(150)).await;
    let again = app.echo(&key.text).await;
    assert_eq!(again.status, 200, "{}", again.text);
    let remaining = again.number("x-ratelimit-remaining");
    // Only allowed requests have taken tokens.
    assert!(remaining >= 40_000 - allowed - 1, "{remaining}");
    app.ship_usage().await;
    assert_eq!(world.logged().await.len() as u64, allowed + 1);
    assert_eq!(metric(app, "quota_usage_unrecordable").await, "0");
}

/// Denials cost the consumer nothing, so one consumer could cause enough denials to fill the backlog for every tenant.
#[tokio::test(flavor = "multi_thread")]
async fn denials_of_one_tenant_do_not_fill_the_backlog_of_all() {
    // Without a limit on recorded denials, this many would fill the backlog.
    const DENIED_MAX: u64 = 12_000;
    let database = database().await;
    let (proxy, url) = through_proxy(&database).await;
    let flag = "--usage-backlog-max=1048576";
    // On a busy machine, the test takes minutes. On this clock, no time passes: the keys stay known without a database,
    // the flooding key gets no more tokens, and all denials are in the same second.
    let clock = Arc::new(TestClock::at(SystemClock::new().now()));
    let world = World::start(|setup| {
        let setup = setup.database(database.clone()).url(url);
        setup.flag(flag).clock(clock)
    })
    .await;
    let app = &world.app;
    let flooding = app.register().await;
    let plan = json!({"default_rpm": 1, "burst": 3});
    let plan = app.plan(&flooding, plan).await;
    let key = app.key(&flooding, &plan).await;
    assert_eq!(app.echo(&key.text).await.status, 200);
    let mut ids = world.echoes(5).await;
    proxy.set(Fault::Refuse);
    proxy.cut();
    let unrecorded = async || {
        let unrecorded = metric(app, "quota_usage_denials_unrecorded_total").await;
        unrecorded.parse::<u64>().expect("a number")
    };
    let mut statuses = BTreeMap::new();
    let mut sent = 0;
    while sent < DENIED_MAX {
        let request = app.get("/v1/echo").header("X-API-Key", &key.text);
        let status = request.send().await.status;
        *statuses.entry(status).or_insert(0_u64) += 1;
        sent += 1;
        if sent % 200 == 0 {
            // Ship continuously, like the background job.
            assert!(app.state.metering.ship().await.is_err());
            if unrecorded().await > 1_000 {
                break;
            }
        }
    }
    assert_eq!(statuses.get(&200), Some(&2), "{statuses:?}");
    assert_eq!(statuses.get(&429), Some(&(sent - 2)), "{statuses:?}");
    ids.extend(world.echoes(300).await);
    let unrecorded = unrecorded().await;
    assert!(unrecorded > 1_000, "{unrecorded}");

    proxy.set(Fault::Pass);
    app.ship_usage().await;
    let logged = logged(&database).await;
    let (denied, allowed) = logged
        .iter()
        .partition::<Vec<_>, _>(|(_, it)| it.was_rejected);
    // Every admitted request is recorded, and every denial is either in the log or counted as unrecorded.
    let of_flooding = |it: &&(&String, &Logged)| it.1.key_id == key.id;
    assert_eq!(allowed.iter().filter(of_flooding).count(), 3);
    let others = allowed.iter().filter(|it| it.1.key_id == world.key.id);
    assert_eq!(others.map(|it| it.0.clone()).collect::<BTreeSet<_>>(), ids);
    assert_eq!(denied.len() as u64 + unrecorded, sent - 2);
    // Once the backlog has been shipped, all further denials are recorded.
    for _ in 0..150 {
        assert_eq!(app.echo(&key.text).await.status, 429);
    }
    app.ship_usage().await;
    let again = world.logged().await.len();
    assert_eq!(again, logged.len() + 150);
}

/// A separate file system of limited size.
struct SmallDisk(TempDir);

impl SmallDisk {
    /// Mounts the file system. Returns `None` if the test may not mount file systems.
    fn mount(bytes: u64) -> Option<Self> {
        let directory = data_dir();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"])
            .arg(directory.path())
            .status();
        mounted
            .is_ok_and(|it| it.success())
            .then_some(Self(directory))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn grow(&self, bytes: u64) {
        let mut mount = Command::new("mount");
        mount.args(["-o", &format!("remount,size={bytes}")]);
        let remounted = mount.arg(self.path()).status().expect("the program runs");
        assert!(remounted.success(), "{remounted}");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount")
            .arg("--lazy")
            .arg(self.path())
            .status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_stops_decisions_loses_nothing_and_recovers() {
    let Some(disk) = SmallDisk::mount(3 << 20) else {
        println!("skipped: mounting is not permitted here");
        return;
    };
    // Use segments of 1 MiB.
    let setup = |setup: Setup| {
        setup
            .data_dir(disk.path())
            .flag("--usage-backlog-max=8388608")
    };
    let world = World::start(setup).await;
    let mut ids = world.echoes(10).await;
    let ballast = disk.path().join("ballast");
    let fill = || {
        let mut bytes = 4 << 20;
        while bytes > 0 {
            let written = std::fs::read(&ballast).unwrap_or_default().len();
            if std::fs::write(&ballast, vec![1; written + bytes]).is_err() {
                bytes /= 2;
            }
        }
    };
    fill();
    let refused = loop {
        let (id, status) = world.echo().await;
        if status != 200 {
            break status;
        }
        ids.insert(id);
        assert!(ids.len() < 20_000, "the disk is never full");
    };
    assert_eq!(refused, 503);
    assert!(ids.len() > 5_000, "{}", ids.len());
    assert_eq!(metric(&world.app, "quota_usage_unrecordable").await, "1");
    // Requests that are not metered keep working.
    let plans = world
        .app
        .act(&world.account, "GET", "/admin/plans", json!(null));
    assert_eq!(plans.await.status, 200);

    std::fs::remove_file(&ballast).expect("the file exists");
    tokio::time::sleep(Duration::from_millis(150)).await;
    ids.extend(world.echoes(10).await);
    world.app.ship_usage().await;
    assert_eq!(world.logged().await, ids);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_starts_on_a_full_disk_and_serves_everything_else() {
    let Some(disk) = SmallDisk::mount(64 << 10) else {
        println!("skipped: mounting is not permitted here");
        return;
    };
    let world = World::start(|setup| setup.data_dir(disk.path())).await;
    assert_eq!(world.echo().await.1, 503);
    disk.grow(64 << 20);
    tokio::time::sleep(Duration::from_millis(150)).await;
    let ids = world.echoes(3).await;
    world.app.ship_usage().await;
    assert_eq!(world.logged().await, ids);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_have_postgresqls_time_whatever_the_machines_clock_says() {
    for seconds_off in [-120_i64, 120] {
        let now = SystemClock::new().now().0;
        let off = now.saturating_add_signed(seconds_off * 1_000_000_000);
        let clock = Arc::new(TestClock::at(UnixNanos(off)));
        let world = World::start(|setup| setup.clock(clock.clone())).await;
        world.echoes(1).await;
        world.app.ship_usage().await;
        let client = world.app.database.connect().await;
        let error = client
            .query_one(
                "SELECT extract(epoch FROM now() - timestamp)::float8 FROM usage_log",
                &[],
            )
            .await
            .expect("one row")
            .get::<_, f64>(0);
        // The test's clock stands still, so the error includes the time since the start of the server.
        assert!((-1.0..30.0).contains(&error), "{seconds_off}: {error} s");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clean_stop_leaves_nothing_behind() {
    let data = data_dir();
    let app = TestApp::setup().data_dir(data.path()).start().await;
    let database = app.database.clone();
    let account = app.register().await;
    let plan = app.plan(&account, json!({"default_rpm": 60_000})).await;
    let key = app.key(&account, &plan).await;
    for _ in 0..20 {
        assert_eq!(app.echo(&key.text).await.status, 200);
    }
    app.stop().await;
    assert_eq!(logged(&database).await.len(), 20);
    let left = metering::directories(&data.path().join("usage")).expect("a readable directory");
    assert_eq!(left, Vec::<PathBuf>::new());
    let client = database.connect().await;
    let reports = client.query("SELECT 1 FROM usage_shippers", &[]).await;
    assert_eq!(reports.expect("readable reports").len(), 0);
}

/// Copies the records of a running server to a directory that no process has locked, as if a second server had been
/// killed. Returns the paths of the copies.
fn copy_segments(from: &Path, to: &Path) -> Vec<PathBuf> {
    std::fs::create_dir_all(to).expect("there is space");
    let entries = std::fs::read_dir(from).expect("a readable directory");
    let segments = entries
        .map(|entry| entry.expect("a readable entry").path())
        .filter(|path| path.extension().is_some_and(|it| it == "segment"));
    segments
        .map(|path| {
            let copy = to.join(path.file_name().expect("a file name"));
            std::fs::copy(&path, &copy).expect("there is space");
            copy
        })
        .collect()
}

/// Sets the time of a segment to 1990.
fn make_ancient(segment: &Path) {
    let mut bytes = std::fs::read(segment).expect("readable");
    bytes[24..32].copy_from_slice(&631_152_000_000_000_000_u64.to_le_bytes());
    let crc = crc32fast::hash(&bytes[..40]);
    bytes[40..44].copy_from_slice(&crc.to_le_bytes());
    std::fs::write(segment, bytes).expect("there is space");
}

#[tokio::test(flavor = "multi_thread")]
async fn segments_of_stopped_replicas_are_counted_until_they_are_shipped() {
    let world = World::start(|setup| setup).await;
    let ids = world.echoes(5).await;
    let own = world.usage_directory();
    let left = own.with_file_name(uuid::Uuid::from_u128(1).to_string());
    copy_segments(&own, &left);
    let segments = "quota_usage_adopted_segments";
    assert_eq!(metric(&world.app, segments).await, "0");
    let lock = world.app.database.connect().await;
    let locked = lock.batch_execute("BEGIN; LOCK usage_segments").await;
    locked.expect("the lock is acquired");
    assert!(world.app.state.metering.ship_adopted().await.is_err());
    assert_eq!(metric(&world.app, segments).await, "1");
    let released = lock.batch_execute("ROLLBACK").await;
    released.expect("the lock is released");
    let shipped = world.app.state.metering.ship_adopted().await;
    assert_eq!(shipped.expect("the usage is shipped"), 5);
    assert_eq!(metric(&world.app, segments).await, "0");
    assert_eq!(world.logged().await, ids);
}

#[tokio::test(flavor = "multi_thread")]
async fn directories_and_segments_that_cannot_be_read_hold_up_no_others() {
    let world = World::start(|setup| setup).await;
    let ids = world.echoes(5).await;
    let own = world.usage_directory();
    let root = own.parent().expect("the directory has a parent");
    // The names of the bad directories sort before the name of the good directory, so the bad directories are processed
    // first.
    let [unlockable, unreadable, good] =
        [1_u128, 2, 3].map(|n| root.join(uuid::Uuid::from_u128(n).to_string()));
    std::fs::create_dir_all(unlockable.join("lock")).expect("there is space");
    std::fs::create_dir_all(unreadable.join("0.segment")).expect("there is space");
    copy_segments(&own, &good);
    assert!(world.app.state.metering.ship_adopted().await.is_err());
    assert_eq!(world.logged().await, ids);
    assert!(!good.exists(), "shipped segments are deleted");
    assert!(unreadable.exists(), "unreadable segments are kept");
    // Within one directory, an unreadable segment does not delay the other segments either.
    let ids = &ids | &world.echoes(5).await;
    copy_segments(&own, &unreadable);
    let url = SecretString::from(world.app.database.url());
    let db = Db::new(&url, &world.app.state.config.database);
    let replayed = metering::replay(&world.app.state.config, &db, &unreadable).await;
    assert!(replayed.is_err());
    assert_eq!(world.logged().await, ids);
    world.app.ship_usage().await;
    assert_eq!(world.logged().await, ids);
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_segments_are_kept_apart_and_their_directory_goes() {
    let world = World::start(|setup| setup).await;
    let ids = world.echoes(5).await;
    let own = world.usage_directory();
    let root = own.parent().expect("the directory has a parent").to_owned();
    let left = root.join(uuid::Uuid::from_u128(1).to_string());
    for segment in copy_segments(&own, &left) {
        let ancient = left.join("0.segment");
        std::fs::copy(&segment, &ancient).expect("there is space");
        make_ancient(&ancient);
    }
    std::fs::write(left.join("1.segment"), "not a segment").expect("there is space");
    // Simulates a rejected segment that an earlier version left in this directory.
    std::fs::write(left.join("2.refused"), "refused").expect("there is space");
    world
        .app
        .state
        .metering
        .ship_adopted()
        .await
        .expect("the rest is shipped");
    assert_eq!(world.logged().await, ids);
    assert!(!left.exists(), "nothing is left in the directory");
    let kept = std::fs::read_dir(root.join("rejected")).expect("the directory exists");
    let kept = kept
        .map(|entry| entry.expect("a readable entry").file_name())
        .collect::<BTreeSet<_>>();
    assert_eq!(kept.len(), 3, "{kept:?}");
    let rejected = "quota_usage_segments_rejected_total";
    assert_eq!(metric(&world.app, rejected).await, "1");
}

/// Takes the lock that [`append`](quota_server::repo::usage_append::append) waits for, and returns the connection that
/// holds the lock.
async fn lock_tenants(database: &TestDatabase) -> tokio_postgres::Client {
    let client = database.connect().await;
    client
        .batch_execute("BEGIN; SELECT FROM usage_tenants FOR UPDATE")
        .await
        .expect("the lock is acquired");
    client
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_may_take_longer_than_a_request() {
    let world = World::start(|setup| {
        let setup = setup.flag("--database-statement-timeout=1s");
        setup.flag("--database-lock-timeout=1s")
    })
    .await;
    world.echoes(1).await;
    world.app.ship_usage().await;
    let lock = lock_tenants(&world.app.database).await;
    world.echoes(1).await;
    let release = async {
        tokio::time::sleep(Duration::from_secs(3)).await;
        lock.batch_execute("ROLLBACK").await
    };
    let (shipped, released) = tokio::join!(world.app.state.metering.ship(), release);
    released.expect("the lock is released");
    assert_eq!(shipped.expect("the batch waits"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clean_stop_does_not_wait_for_a_batch_that_waits() {
    let data = data_dir();
    let app = TestApp::setup().data_dir(data.path()).start().await;
    let database = app.database.clone();
    let account = app.register().await;
    let plan = app.plan(&account, json!({"default_rpm": 60_000})).await;
    let key = app.key(&account, &plan).await;
    assert_eq!(app.echo(&key.text).await.status, 200);
    wait_for("the first record is shipped", async || {
        let rows = logged(&database).await.len();
        (rows == 1).then_some(()).ok_or(rows.to_string())
    })
    .await;
    let lock = lock_tenants(&database).await;
    assert_eq!(app.echo(&key.text).await.status, 200);
    wait_for("a batch waits", async || {
        let waiting = lock
            .query(
                "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() \
                 AND wait_event_type = 'Lock'",
                &[],
            )
            .await
            .expect("readable");
        (!waiting.is_empty()).then_some(()).ok_or_else(String::new)
    })
    .await;
    let began = Instant::now();
    app.stop().await;
    // A batch waits 10 s for the lock, but a server that is stopping must not wait that long.
    assert!(
        began.elapsed() < Duration::from_secs(8),
        "{:?}",
        began.elapsed()
    );
    lock.batch_execute("ROLLBACK")
        .await
        .expect("the lock is released");
    // The next startup ships the records.
    let app = TestApp::setup()
        .data_dir(data.path())
        .database(database.clone());
    let app = app.start().await;
    wait_for("the second record is shipped", async || {
        let rows = logged(&database).await.len();
        (rows == 2).then_some(()).ok_or(rows.to_string())
    })
    .await;
    app.stop().await;
}

/// Usage is reported as complete only up to the first decision that is still in flight, although the shipper cannot see
/// the time of this decision.
#[tokio::test(flavor = "multi_thread")]
async fn usage_is_not_complete_beyond_a_decision_in_flight() {
    let world = World::start(|setup| setup).await;
    world.echoes(1).await;
    world.app.ship_usage().await;
    let client = world.app.database.connect().await;
    // Returns the number of pending records, and how long before the report the usage ceases to be complete.
    let report = async || {
        // A shipper reports its progress at most once per second.
        tokio::time::sleep(Duration::from_millis(1_100)).await;
        let now = "SELECT extract(epoch FROM clock_timestamp())::float8";
        let now = client.query_one(now, &[]).await.expect("the time");
        world.app.ship_usage().await;
        let row = client
            .query_one(
                "SELECT pending_records, \
                 $1 - extract(epoch FROM coalesce(oldest_pending_at, reported_at))::float8 \
                 FROM usage_shippers",
                &[&now.get::<_, f64>(0)],
            )
            .await
            .expect("one report");
        (row.get::<_, i64>(0), row.get::<_, f64>(1))
    };
    let (pending, behind) = report().await;
    assert_eq!(pending, 0);
    assert!(behind < 1.0, "{behind} s");
    let metering = world.app.state.metering.clone();
    let tenant = world.account.tenant_id.parse().expect("an ID");
    let open = metering
        .reserve(tenant, "GET /slow", "open")
        .expect("there is space");
    tokio::time::sleep(Duration::from_secs(2)).await;
    // These records follow the open record, so they are not shipped.
    world.echoes(2).await;
    let (pending, behind) = report().await;
    assert_eq!(pending, 2);
    assert!(behind > 2.0, "complete up to {behind} s ago");
    drop(open);
    let (pending, behind) = report().await;
    assert_eq!(pending, 0);
    assert!(behind < 1.0, "{behind} s");
    assert_eq!(world.logged().await.len(), 3);
}

/// Usage that has been shipped does not count as missing even if its file remains.
#[tokio::test(flavor = "multi_thread")]
async fn a_segment_that_cannot_be_deleted_does_not_stop_reports() {
    let flag = "--usage-backlog-max=1048576";
    let world = World::start(|setup| setup.flag(flag)).await;
    world.echoes(1).await;
    let segments = || {
        let entries = std::fs::read_dir(world.usage_directory()).expect("a readable directory");
        let paths = entries.map(|entry| entry.expect("a readable entry").path());
        paths
            .filter(|path| path.extension().is_some_and(|it| it == "segment"))
            .collect::<BTreeSet<_>>()
    };
    let first = segments().pop_first().expect("a segment");
    while segments().len() < 2 {
        world.echoes(100).await;
    }
    // Deleting a directory as if it were a file fails, even for root.
    std::fs::remove_file(&first).expect("the file is deleted");
    std::fs::create_dir(&first).expect("there is space");
    assert!(world.app.state.metering.ship().await.is_err());
    let client = world.app.database.connect().await;
    let query = "SELECT pending_records FROM usage_shippers";
    let report = client.query_one(query, &[]).await.expect("one report");
    assert_eq!(report.get::<_, i64>(0), 0);
    std::fs::remove_dir(&first).expect("the file is deleted");
    world.app.ship_usage().await;
}

async fn wait_for<T>(what: &str, mut ask: impl AsyncFnMut() -> Result<T, String>) -> T {
    let began = Instant::now();
    loop {
        match ask().await {
            Ok(it) => return it,
            Err(now) => assert!(began.elapsed() < Duration::from_secs(60), "{what}: {now}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_takes_over_what_a_killed_one_left_in_a_shared_directory() {
    let database = database().await;
    let (data, http) = (data_dir(), Client::new());
    let settings = [
        ("DATABASE_URL", database.url()),
        // After startup, the first server does not ship anything during the test.
        ("QUOTA_USAGE_SHIP_EVERY", "60s"),
    ];
    let first = Quota::start_with(data.path(), &settings);
    let plan = json!({"name": "p", "default_rpm": 1_000_000, "burst": 100_000});
    let key = first.key_on(&http, plan).await;
    // The first server ships once at startup.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let url = format!("http://{}/v1/echo", first.addr);
    for n in 0..200 {
        let answer = http.get(&url).header("X-API-Key", &key);
        let answer = answer.header("X-Request-Id", format!("left-{n}")).send();
        assert_eq!(answer.await.expect("the server responds").status(), 200);
    }
    assert_eq!(logged(&database).await.len(), 0);
    first.kill();
    let settings = [("DATABASE_URL", database.url())];
    let second = Quota::start_with(data.path(), &settings);
    let rows = wait_for("the second server ships the records", async || {
        let rows = logged(&database).await;
        if rows.len() < 200 {
            return Err(format!("{} rows", rows.len()));
        }
        Ok(rows)
    });
    assert_eq!(rows.await.len(), 200);
    wait_for("the replayed records are counted", async || {
        let name = "quota_usage_records_replayed_total";
        match second.counter(&http, name).await {
            200 => Ok(()),
            other => Err(other.to_string()),
        }
    })
    .await;
    second.stop();
    let left = metering::directories(&data.path().join("usage")).expect("a readable directory");
    assert_eq!(left, Vec::<PathBuf>::new());
}

/// The real server is killed repeatedly under load. Every request that got a response is counted once, and any other
/// counted request was in flight when the server was killed.
#[tokio::test(flavor = "multi_thread")]
async fn killing_the_server_under_load_loses_nothing_and_counts_nothing_twice() {
    const KILLS: usize = 5;
    const CLIENTS: u64 = 16;
    let database = database().await;
    let (data, http) = (data_dir(), Client::new());
    let settings = [
        ("DATABASE_URL", database.url()),
        ("QUOTA_USAGE_SHIP_EVERY", "20ms"),
    ];
    let mut quota = Quota::start_with(data.path(), &settings);
    let plan = json!({"name": "p", "default_rpm": 60_000_000, "burst": 10_000_000});
    let key = quota.key_on(&http, plan).await;
    let (mut answered, mut in_flight) = (BTreeSet::new(), 0);
    for kill in 0..KILLS {
        let url = format!("http://{}/v1/echo", quota.addr);
        let sent = Arc::new(AtomicU64::new(0));
        let now_answered = Arc::new(AtomicU64::new(0));
        let clients = (0..CLIENTS).map(|client| {
            let (url, key, sent) = (url.clone(), key.clone(), sent.clone());
            let answered = now_answered.clone();
            let http = Client::new();
            tokio::spawn(async move {
                let mut ids = Vec::new();
                for n in 0.. {
                    let id = format!("{kill}-{client}-{n}");
                    let call = http.get(&url).header("X-API-Key", &key);
                    sent.fetch_add(1, Ordering::Relaxed);
                    match call.header("X-Request-Id", &id).send().await {
                        // On a busy machine, the first lookup of the key may take too long.
                        Ok(answer) if answer.status() == 503 && n < 10 => {
                            sent.fetch_sub(1, Ordering::Relaxed);
                        }
                        Ok(answer) => {
                            assert_eq!(answer.status(), 200);
                            answered.fetch_add(1, Ordering::Relaxed);
                            ids.push(id);
                        }
                        Err(_) => return ids,
                    }
                }
                ids
            })
        });
        let clients = clients.collect::<Vec<_>>();
        tokio::time::sleep(Duration::from_millis(700 + 97 * kill as u64)).await;
        wait_for("there are 250 responses", async || {
            let now = now_answered.load(Ordering::Relaxed);
            (now >= 250).then_some(()).ok_or(now.to_string())
        })
        .await;
        quota.kill();
        let before = answered.len() as u64;
        for client in clients {
            answered.extend(client.await.expect("the task ends"));
        }
        in_flight += sent.load(Ordering::Relaxed) - (answered.len() as u64 - before);
        quota = Quota::start_with(data.path(), &settings);
    }
    assert!(answered.len() > 1_000, "only {} responses", answered.len());
    assert!(
        in_flight > 0,
        "no request was in flight when the server was killed"
    );
    // The usage of killed servers is adopted.
    let url = format!("http://{}/v1/echo", quota.addr);
    let last = http.get(&url).header("X-API-Key", &key);
    let last = last.header("X-Request-Id", "last").send().await;
    assert_eq!(last.expect("the server responds").status(), 200);
    answered.insert("last".to_owned());
    let usage = data.path().join("usage");
    wait_for("everything is shipped", async || {
        let left = metering::directories(&usage).map_err(|error| error.to_string())?;
        let rows = logged(&database).await;
        if left.len() > 1 || !rows.contains_key("last") {
            return Err(format!("{left:?}, {} rows", rows.len()));
        }
        Ok(())
    })
    .await;
    quota.stop();
    let rows = logged(&database).await.into_keys().collect::<BTreeSet<_>>();
    let lost = answered.difference(&rows).collect::<Vec<_>>();
    let unanswered = rows.difference(&answered).count() as u64;
    println!(
        "{KILLS} kills, {} responses, {} rows, {in_flight} in flight, {unanswered} rows without a response",
        answered.len(),
        rows.len()
    );
    assert_eq!(lost, Vec::<&String>::new());
    assert!(unanswered <= in_flight, "{unanswered} of {in_flight}");
}

/// Sends requests one after another. Returns the server's reads, writes and `fdatasync` calls in order, or `None` if
/// strace is not available.
async fn traced(durability: &str, requests: usize) -> Option<Vec<String>> {
    let database = database().await;
    let (data, http) = (data_dir(), Client::new());
    let settings = [
        ("DATABASE_URL", database.url()),
        ("QUOTA_DURABILITY", durability),
    ];
    let quota = Quota::start_with(data.path(), &settings);
    let plan = json!({"name": "p", "default_rpm": 1_000_000, "burst": 1_000_000});
    let key = quota.key_on(&http, plan).await;
    let trace = data.path().join("trace");
    let strace = Command::new("strace")
        .args(["-f", "-q", "-s", "4096", "-e"])
        .arg("trace=fdatasync,read,recvfrom,write,writev,sendto")
        .args(["-p", &quota.pid().to_string(), "-o"])
        .arg(&trace)
        .stderr(std::process::Stdio::null())
        .spawn();
    let Ok(mut strace) = strace else {
        println!("skipped: there is no strace");
        return None;
    };
    wait_for("strace is attached", async || {
        let text = std::fs::read_to_string(&trace).unwrap_or_default();
        (!text.is_empty()).then_some(()).ok_or_else(String::new)
    })
    .await;
    let url = format!("http://{}/v1/echo", quota.addr);
    for n in 0..requests {
        let call = http.get(&url).header("X-API-Key", &key);
        let call = call.header("X-Request-Id", format!("traced-{n}-")).send();
        assert_eq!(call.await.expect("the server responds").status(), 200);
    }
    let last = format!("traced-{}-", requests - 1);
    wait_for("the trace is written", async || {
        let text = std::fs::read_to_string(&trace).unwrap_or_default();
        let lines = text.lines().filter(|line| line.contains(&last)).count();
        (lines >= 2).then_some(()).ok_or_else(String::new)
    })
    .await;
    strace.kill().expect("the program runs");
    strace.wait().expect("strace ends");
    quota.stop();
    let text = std::fs::read_to_string(&trace).expect("the trace was written");
    Some(text.lines().map(str::to_owned).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn with_machine_durability_each_response_waits_for_the_disk() {
    const REQUESTS: usize = 50;
    for (durability, expected) in [("machine", REQUESTS), ("process", 0)] {
        let Some(trace) = traced(durability, REQUESTS).await else {
            return;
        };
        let synced = (0..REQUESTS).filter(|n| {
            let id = format!("traced-{n}-");
            let at = |line: &String| line.contains(&id);
            let read = trace.iter().position(at).expect("the request was read");
            let written = trace.iter().rposition(at).expect("the trace was written");
            let between = &trace[read + 1..written];
            let begins = between.iter().position(|line| line.contains("fdatasync("));
            begins.is_some_and(|begins| {
                between[begins..]
                    .iter()
                    .any(|line| line.contains("fdatasync") && line.trim_end().ends_with("= 0"))
            })
        });
        assert_eq!(synced.count(), expected, "{durability}");
    }
}
