//! Tests of the scripts for backups and for rotating the secret, with real servers and databases.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use quota_server::{
    clock::{Clock as _, SystemClock},
    db::{self, embedded::EmbeddedPostgres},
};
use reqwest::{Client, StatusCode};
use secrecy::SecretString;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::support::{
    app::PASSWORD,
    postgres::TestDatabase,
    quota::{Quota, data_dir},
};

const QUOTA: u64 = 5000;
/// The maximum number of decisions for each of four clients. Together, the clients do not use up the quota.
const REQUESTS: usize = 1000;
/// A time limit that is long enough for a busy machine.
const AT_MOST: Duration = Duration::from_secs(60);

pub(crate) fn script(name: &str) -> Command {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../deploy")
        .join(name);
    let mut command = Command::new("bash");
    command
        .arg(path)
        .env_remove("DATABASE_URL_FILE")
        .env_remove("QUOTA_DATA_DIR")
        .env_remove("KEEP");
    command
}

pub(crate) fn text(output: &Output) -> String {
    let all = [&output.stdout[..], &output.stderr].concat();
    String::from_utf8_lossy(&all).into_owned()
}

/// Writes a backup, and returns its folder.
pub(crate) fn back_up(url: &str, data: &Path, into: &Path) -> PathBuf {
    let output = script("backup.sh")
        .arg(into)
        .env("DATABASE_URL", url)
        .env("QUOTA_DATA_DIR", data)
        .output()
        .expect("bash runs");
    assert!(output.status.success(), "{}", text(&output));
    let folder = String::from_utf8(output.stdout).expect("a path");
    PathBuf::from(folder.trim())
}

pub(crate) fn restore(backup: &Path, url: &str, data: &Path) -> Output {
    let mut command = script("restore.sh");
    command
        .arg(backup)
        .env("DATABASE_URL", url)
        .env("QUOTA_DATA_DIR", data);
    command.output().expect("bash runs")
}

pub(crate) async fn migrated() -> TestDatabase {
    TestDatabase::create(|url| async move { db::migrate(&SecretString::from(url)).await.map(drop) })
        .await
}

/// A request that was sent around the time of the backup.
#[derive(Debug, Clone, Copy)]
struct Sent {
    began: Instant,
    ended: Instant,
    allowed: bool,
}

/// Sends requests until [`REQUESTS`] of them have got a decision, `running` is cleared, or the server stops. Adds the
/// number of allowed requests to `total`. Returns the requests that got a decision, by ID.
async fn load(
    http: Client,
    url: String,
    key: String,
    running: Arc<AtomicBool>,
    total: Arc<AtomicU64>,
) -> BTreeMap<String, Sent> {
    let (mut sent, mut unavailable) = (BTreeMap::new(), 0);
    while running.load(Ordering::Relaxed) && sent.len() < REQUESTS {
        let began = Instant::now();
        let request = http.get(&url).header("X-API-Key", &key);
        let Ok(answer) = request.send().await else {
            break;
        };
        let allowed = match answer.status().as_u16() {
            200 => true,
            429 => false,
            // If PostgreSQL is paused, a request may not get its quota tokens in time.
            503 if unavailable < 20 => {
                unavailable += 1;
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
            status => panic!("{status}: {:?}", answer.text().await),
        };
        let id = answer.headers()["x-request-id"].to_str().expect("text");
        let request = Sent {
            began,
            ended: Instant::now(),
            allowed,
        };
        assert!(sent.insert(id.to_owned(), request).is_none(), "{id} twice");
        total.fetch_add(u64::from(allowed), Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(4)).await;
    }
    sent
}

/// Sends requests until a request is denied. Returns the number of allowed requests.
async fn spend(http: &Client, url: &str, key: &str) -> u64 {
    let (mut allowed, mut unavailable) = (0, 0);
    while allowed <= 2 * QUOTA {
        let answer = http.get(url).header("X-API-Key", key).send().await;
        match answer.expect("the server responds").status().as_u16() {
            200 => allowed += 1,
            429 => return allowed,
            503 if unavailable < 20 => {
                unavailable += 1;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            status => panic!("{status}"),
        }
    }
    panic!("more than twice the quota was allowed");
}

pub(crate) async fn count(database: &tokio_postgres::Client, query: &str) -> i64 {
    let row = database.query_one(query, &[]).await;
    row.expect("a row").get(0)
}

/// Takes a backup under load, and restores it on another machine, as if the first machine were lost. `ship_every` is
/// the interval at which usage is shipped.
async fn back_up_and_restore(ship_every: &str) {
    let (source, data, http) = (migrated().await, data_dir(), Client::new());
    let settings = [
        ("DATABASE_URL", source.url()),
        ("QUOTA_USAGE_SHIP_EVERY", ship_every),
    ];
    let quota = Quota::start_with(data.path(), &settings);
    let plan = json!({"name": "daily", "default_rpm": 60_000_000, "daily_quota": QUOTA});
    let key = quota.key_on(&http, plan).await;

    let (running, total) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicU64::new(0)));
    let mut clients = JoinSet::new();
    for _ in 0..4 {
        let url = format!("http://{}/v1/echo", quota.addr);
        clients.spawn(load(
            http.clone(),
            url,
            key.clone(),
            Arc::clone(&running),
            Arc::clone(&total),
        ));
    }
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let patience = Instant::now() + AT_MOST;
    while total.load(Ordering::Relaxed) < 200 {
        assert!(Instant::now() < patience, "too few requests are allowed");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let backups = data_dir();
    let started = Instant::now();
    let backup = tokio::task::block_in_place(|| back_up(source.url(), data.path(), backups.path()));
    let finished = Instant::now();
    tokio::time::sleep(Duration::from_millis(500)).await;
    running.store(false, Ordering::Relaxed);
    let mut sent = BTreeMap::new();
    while let Some(client) = clients.join_next().await {
        sent.extend(client.expect("no panic"));
    }
    quota.kill();
    drop(data);
    let meanwhile = sent.values().filter(|it| it.began > started);
    assert!(meanwhile.filter(|it| it.ended < finished).count() > 0);

    // Simulates another machine: the new cluster has neither the roles nor the tables.
    let (cluster_dir, data) = (data_dir(), data_dir());
    let cluster = EmbeddedPostgres::start(cluster_dir.path()).await;
    let cluster = cluster.expect("a second PostgreSQL");
    let url = cluster.database_url();
    let restored = restore(&backup, &url, data.path());
    assert!(restored.status.success(), "{}", text(&restored));
    let again = restore(&backup, &url, data.path());
    assert!(!again.status.success());
    assert!(text(&again).contains("is not empty"), "{}", text(&again));

    let quota = Quota::start_with(data.path(), &[("DATABASE_URL", &url)]);
    let (database, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls)
        .await
        .expect("PostgreSQL accepts connections");
    tokio::spawn(connection);

    // All usage recorded before the backup started is restored, either from the dump or from the segments.
    let before = |at: Instant| sent.values().filter(move |it| it.ended <= at).count();
    let rows = "SELECT count(*) FROM usage_log";
    let patience = Instant::now() + AT_MOST;
    while count(&database, rows).await < i64::try_from(before(started)).expect("few") {
        assert!(
            Instant::now() < patience,
            "{} rows of {} requests before the backup",
            count(&database, rows).await,
            before(started)
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // The server may still be shipping usage, so the log and the rollups are read from the same snapshot.
    let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ";
    database.batch_execute(begin).await.expect("a transaction");
    let log = database
        .query("SELECT request_id, was_rejected FROM usage_log", &[])
        .await
        .expect("rows");
    let log = log
        .iter()
        .map(|row| (row.get::<_, String>(0), row.get::<_, bool>(1)))
        .collect::<Vec<_>>();
    let by_id = log.iter().cloned().collect::<BTreeMap<_, _>>();
    assert_eq!(by_id.len(), log.len(), "a request is counted twice");
    for (id, request) in &sent {
        match by_id.get(id) {
            Some(was_rejected) => {
                assert_eq!(*was_rejected, !request.allowed, "{id}");
                assert!(request.began <= finished, "{id} was sent after the backup");
            }
            None => assert!(request.ended > started, "{id} is missing"),
        }
    }
    assert!(
        by_id.keys().all(|id| sent.contains_key(id)),
        "an unknown request is in the log"
    );
    let total = "SELECT coalesce(sum(requests), 0)::bigint FROM usage_days \
        WHERE key_id <> '00000000-0000-0000-0000-000000000000' AND endpoint = E'\\x01' \
        AND plan_id <> '00000000-0000-0000-0000-000000000000'";
    assert_eq!(
        count(&database, total).await,
        i64::try_from(log.len()).expect("few")
    );
    database.batch_execute("COMMIT").await.expect("it ends");

    // The key works, and quota that was used before the backup remains used.
    let echo = format!("http://{}/v1/echo", quota.addr);
    let after = spend(&http, &echo, &key).await;
    let admitted = |is_counted: &dyn Fn(&Sent) -> bool| {
        let admitted = sent.values().filter(|it| it.allowed && is_counted(it));
        u64::try_from(admitted.count()).expect("few")
    };
    let (least, most) = (
        admitted(&|it| it.ended <= started),
        admitted(&|it| it.began <= finished),
    );
    assert!(least >= 100, "only {least} requests before the backup");
    assert!(most < QUOTA, "the quota was used up before the backup");
    assert!(
        least + after <= QUOTA,
        "{least} before the backup and {after} after it"
    );
    assert!(
        most + after >= QUOTA * 99 / 100,
        "{most} before the end of the backup and {after} after it"
    );
    quota.stop();
    cluster.stop().await;
}

/// Runs `test`. If midnight is less than two minutes away, waits until it has passed: with the quota of a new day, the
/// test would prove nothing.
async fn within_a_day<F: Future<Output = ()>>(test: impl Fn() -> F) {
    let clock = SystemClock::new();
    loop {
        let until_midnight = 86_400 - clock.now().secs() % 86_400;
        if until_midnight > 120 {
            return test().await;
        }
        tokio::time::sleep(Duration::from_secs(until_midnight)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn restored_backup_has_all_keys_and_usage_and_no_quota_is_granted_twice() {
    within_a_day(|| back_up_and_restore("250ms")).await;
}

/// Usage is shipped so rarely that the database does not contain it at the time of the backup.
#[tokio::test(flavor = "multi_thread")]
async fn backup_contains_usage_that_was_not_in_the_database() {
    within_a_day(|| back_up_and_restore("60s")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_backup_or_one_of_another_database_is_rejected() {
    let (source, folder, data) = (migrated().await, data_dir(), data_dir());
    let backup = back_up(source.url(), data.path(), folder.path());
    let empty = TestDatabase::create_empty().await;

    let dump = backup.join("quota.dump");
    let bytes = fs::read(&dump).expect("a dump");
    let mut damaged = bytes.clone();
    *damaged.last_mut().expect("the file is not empty") ^= 1;
    fs::write(&dump, damaged).expect("written");
    let output = restore(&backup, empty.url(), data.path());
    assert!(!output.status.success());
    assert!(text(&output).contains("is damaged"), "{}", text(&output));

    fs::write(&dump, bytes).expect("written");
    // Another session is using the database.
    let session = empty.connect().await;
    let output = restore(&backup, empty.url(), data.path());
    assert!(!output.status.success());
    assert!(
        text(&output).contains("stop all servers"),
        "{}",
        text(&output)
    );
    let tables = "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace";
    assert_eq!(count(&session, tables).await, 0, "nothing was restored");

    let output = script("backup.sh")
        .arg(folder.path())
        .env("DATABASE_URL", empty.url())
        .output()
        .expect("bash runs");
    assert!(!output.status.success());
    assert!(
        text(&output).contains("not a Quota database"),
        "{}",
        text(&output)
    );
    assert_eq!(
        backups_in(folder.path()).len(),
        1,
        "a failed backup leaves nothing behind"
    );
}

/// Returns the names of all complete and partial backups in a folder, oldest first.
fn backups_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("a folder");
    let names = entries.map(|it| it.expect("an entry").file_name().into_string());
    let names = names.map(|it| it.expect("UTF-8"));
    let mut names: Vec<_> = names.filter(|it| it.starts_with("quota-")).collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn backup_deletes_old_backups_and_what_killed_runs_left_behind() {
    let (source, folder, data) = (migrated().await, data_dir(), data_dir());
    let create = |name: &str| fs::create_dir(folder.path().join(name)).expect("created");
    let back_up = |keep: &str| {
        let mut command = script("backup.sh");
        command.arg(folder.path()).env("KEEP", keep);
        command.env("DATABASE_URL", source.url());
        let output = command.env("QUOTA_DATA_DIR", data.path()).output();
        output.expect("bash runs")
    };
    let old = ["01", "02", "03"].map(|day| format!("quota-2026-01-{day}T03-00-00"));
    for name in &old {
        create(name);
    }
    create("quota-2026-01-04T03-00-00.partial");
    // The clock has been set back since this backup.
    let late = "quota-2999-01-01T03-00-00";
    create(late);

    let lock = fs::File::create(folder.path().join(".backup.lock")).expect("a file");
    lock.lock().expect("the file is not locked");
    let output = back_up("1");
    assert!(!output.status.success());
    assert!(
        text(&output).contains("another backup"),
        "{}",
        text(&output)
    );
    assert_eq!(backups_in(folder.path()).len(), 5, "nothing was deleted");
    lock.unlock().expect("the file is locked");
    for invalid in ["0", "-1", "all"] {
        assert!(!back_up(invalid).status.success(), "{invalid}");
    }

    let output = back_up("3");
    assert!(output.status.success(), "{}", text(&output));
    let new = String::from_utf8(output.stdout).expect("a path");
    let new = Path::new(new.trim()).file_name().expect("a name");
    let new = new.to_str().expect("UTF-8");
    assert_eq!(backups_in(folder.path()), [old[2].as_str(), new, late]);
}

// Rotation --------------------------------------------------------------------------------------------

/// Runs a step of the rotation. Returns whether it succeeded, and its output.
fn rotate(secrets: &Path, step: &str) -> (bool, String) {
    let mut command = script("rotate-secret.sh");
    let output = command.arg(step).env("SECRETS", secrets).output();
    let output = output.expect("bash runs");
    (output.status.success(), text(&output))
}

/// Starts a server with the secrets in a folder.
fn with_secrets(data: &Path, secrets: &Path, url: &str) -> Quota {
    let file = |name: &str| secrets.join(name).to_str().expect("UTF-8").to_owned();
    let settings = [
        ("DATABASE_URL", url),
        ("QUOTA_SECRET_FILE", &file("quota_secret")),
        ("QUOTA_SECRET_PREVIOUS_FILE", &file("quota_secret_previous")),
    ];
    Quota::start_with(data, &settings)
}

async fn post(http: &Client, url: String, token: &str, body: Value) -> Value {
    let answer = http.post(url).bearer_auth(token).json(&body).send().await;
    let answer = answer.expect("the server responds");
    let (status, text) = (answer.status(), answer.text().await.expect("text"));
    assert!(status.is_success(), "{status}: {text}");
    serde_json::from_str(&text).expect("JSON")
}

async fn accepts(quota: &Quota, http: &Client, token: &str) -> bool {
    let url = format!("http://{}/admin/plans", quota.addr);
    let answer = http.get(url).bearer_auth(token).send().await;
    match answer.expect("the server responds").status() {
        StatusCode::OK => true,
        StatusCode::UNAUTHORIZED => false,
        status => panic!("{status}"),
    }
}

async fn sign_in(quota: &Quota, http: &Client) -> String {
    let url = format!("http://{}/auth/login", quota.addr);
    let account = json!({"email": "owner@example.com", "password": PASSWORD});
    let signed_in = post(http, url, "", account).await;
    signed_in["access_token"]
        .as_str()
        .expect("a token")
        .to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn rotating_the_secret_signs_no_one_out_and_replacing_it_signs_everyone_out() {
    let (database, data, secrets, http) = (migrated().await, data_dir(), data_dir(), Client::new());
    let created = script("secrets.sh").arg(secrets.path()).output();
    assert!(created.expect("bash runs").status.success());
    let read = |name: &str| fs::read_to_string(secrets.path().join(name)).expect("a secret");
    let first = read("quota_secret");
    assert_eq!(read("quota_secret_previous"), first);
    let start = || with_secrets(data.path(), secrets.path(), database.url());
    let step = |name: &str| {
        let (passed, text) = rotate(secrets.path(), name);
        assert!(passed, "{name}: {text}");
    };

    let quota = start();
    let key = quota
        .key_on(&http, json!({"name": "x", "default_rpm": 600}))
        .await;
    let old = sign_in(&quota, &http).await;
    let hook = json!({"name": "Hook", "url": "https://8.8.8.8/hook"});
    let url = format!("http://{}/admin/webhooks", quota.addr);
    post(&http, url, &old, hook).await;
    quota.stop();
    let session = database.connect().await;
    let stored = async || {
        let row = session.query_one("SELECT secret FROM webhooks", &[]).await;
        row.expect("one webhook").get::<_, Vec<u8>>(0)
    };
    let encrypted = stored().await;

    // Steps cannot be skipped.
    assert!(!rotate(secrets.path(), "switch").0);
    step("prepare");
    assert!(!rotate(secrets.path(), "finish").0);
    let second = read("quota_secret_previous");
    assert_eq!(read("quota_secret"), first);
    assert_ne!(second, first);
    let quota = start();
    assert!(accepts(&quota, &http, &old).await);
    quota.stop();

    step("switch");
    assert_eq!(
        (read("quota_secret"), read("quota_secret_previous")),
        (second.clone(), first.clone())
    );
    let quota = start();
    assert!(accepts(&quota, &http, &old).await);
    let new = sign_in(&quota, &http).await;
    // The secrets of webhooks are re-encrypted soon after startup.
    let patience = Instant::now() + Duration::from_secs(20);
    while stored().await == encrypted {
        assert!(Instant::now() < patience, "not encrypted again");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    quota.stop();

    let (passed, printed) = rotate(secrets.path(), "finish");
    assert!(passed && printed.contains("keep a copy"), "{printed}");
    assert_eq!(
        (read("quota_secret"), read("quota_secret_previous")),
        (second.clone(), second.clone())
    );
    let quota = start();
    assert!(accepts(&quota, &http, &new).await);
    assert!(
        !accepts(&quota, &http, &old).await,
        "a token signed with the old secret was accepted"
    );
    let unreadable = async |quota: &Quota| {
        quota
            .counter(&http, "quota_webhook_secrets_unreadable")
            .await
    };
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(unreadable(&quota).await, 0);
    quota.stop();

    step("leaked");
    assert_ne!(read("quota_secret"), second);
    assert_eq!(read("quota_secret_previous"), read("quota_secret"));
    let quota = start();
    assert!(!accepts(&quota, &http, &new).await);
    let patience = Instant::now() + Duration::from_secs(20);
    while unreadable(&quota).await != 1 {
        assert!(
            Instant::now() < patience,
            "the webhook's secret is still readable"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // API keys do not depend on the secret.
    let echo = http.get(format!("http://{}/v1/echo", quota.addr));
    let echo = echo.header("X-API-Key", &key).send().await;
    assert_eq!(echo.expect("the server responds").status(), StatusCode::OK);
    quota.stop();
    drop(session);
}

/// In the first run, the script cannot write, as on a full disk. Earlier versions then left empty files, which must not
/// be used: with an empty redis.conf, Redis has no password.
#[test]
fn interrupted_creation_of_secrets_leaves_no_empty_secret() {
    const EMPTY: [&str; 4] = [
        "postgres_password",
        "redis.conf",
        "quota_secret",
        "quota_secret_previous",
    ];
    let secrets = data_dir();
    let path = |name: &str| secrets.path().join(name);
    let create = |limit: &str| {
        let output = Command::new("bash")
            .args(["-c", &format!("{limit} exec bash \"$@\""), "secrets.sh"])
            .args(script("secrets.sh").get_args())
            .arg(secrets.path())
            .output();
        output.expect("bash runs")
    };
    let assert_complete = || {
        let read = |name: &str| fs::read_to_string(path(name)).expect("a file");
        let (postgres, redis) = (read("postgres_password"), read("redis.conf"));
        let redis = redis
            .trim()
            .strip_prefix("requirepass ")
            .expect("a password");
        assert!(postgres.len() >= 40 && redis.len() >= 40);
        assert_eq!(
            read("database_url"),
            format!("postgres://quota:{postgres}@postgres/quota")
        );
        assert_eq!(read("redis_url"), format!("redis://:{redis}@redis"));
        assert!(read("quota_secret").len() >= 40);
        assert_eq!(read("quota_secret_previous"), read("quota_secret"));
        postgres
    };

    assert!(!create("ulimit -f 0;").status.success());
    for name in EMPTY {
        assert!(!path(name).exists(), "{name}");
    }
    assert!(create("").status.success());
    assert_complete();

    for name in EMPTY {
        fs::write(path(name), "").expect("written");
    }
    fs::write(path("database_url"), "postgres://quota:@postgres/quota").expect("written");
    fs::write(path("redis_url"), "redis://:@redis").expect("written");
    assert!(create("").status.success());
    let password = assert_complete();
    assert!(create("").status.success());
    assert_eq!(assert_complete(), password, "existing secrets are kept");
}

/// An interrupted switch loses neither secret.
#[test]
fn switch_can_be_repeated_after_an_interruption() {
    let secrets = data_dir();
    let write = |name: &str, text: &str| {
        fs::write(secrets.path().join(name), text).expect("written");
    };
    let read = |name: &str| fs::read_to_string(secrets.path().join(name)).expect("a secret");
    // The possible contents of the two secret files if the switch is interrupted.
    for files in [("old", "new"), ("new", "new"), ("new", "old")] {
        write("quota_secret", files.0);
        write("quota_secret_previous", files.1);
        write(".quota_secret.old", "old");
        write(".rotation", "prepare");
        let (passed, text) = rotate(secrets.path(), "switch");
        assert!(passed, "{text}");
        assert_eq!(
            (read("quota_secret"), read("quota_secret_previous")),
            ("new".into(), "old".into())
        );
        assert!(!secrets.path().join(".quota_secret.old").exists());
    }
    let id = Uuid::now_v7().to_string();
    assert!(
        !rotate(&secrets.path().join(id), "status").0,
        "no such folder"
    );
}

/// A secret that leaked while a switch was interrupted is never used again.
#[test]
fn leaked_secret_does_not_return_with_a_later_rotation() {
    let secrets = data_dir();
    let write = |name: &str, text: &str| {
        fs::write(secrets.path().join(name), text).expect("written");
    };
    let read = |name: &str| fs::read_to_string(secrets.path().join(name)).expect("a secret");
    write("quota_secret", "old");
    write("quota_secret_previous", "new");
    write(".quota_secret.old", "old");
    write(".rotation", "prepare");
    for step in ["leaked", "prepare", "switch"] {
        let (passed, text) = rotate(secrets.path(), step);
        assert!(passed, "{text}");
        assert_eq!(text.contains("at once"), step == "leaked", "{text}");
        assert_ne!(read("quota_secret"), "old");
        if step != "prepare" {
            assert_ne!(read("quota_secret_previous"), "old", "after {step}");
        }
    }
    // Both secrets are new, and they differ.
    assert_ne!(read("quota_secret"), read("quota_secret_previous"));
}

/// With the URLs below, the password would be visible to all users of the machine. With the data directory below, usage
/// would be missing from the backup.
#[test]
fn backup_refuses_settings_that_it_would_misread() {
    let folder = data_dir();
    let backup = |url: &str, data: &str| {
        let mut command = script("backup.sh");
        command.arg(folder.path());
        command.env("DATABASE_URL", url).env("QUOTA_DATA_DIR", data);
        let output = command.output().expect("bash runs");
        (output.status.success(), text(&output))
    };
    for url in [
        "postgres://localhost/quota?user=u&password=p",
        "postgres://:p@localhost/quota",
        "host=localhost user=u password=p",
    ] {
        let (passed, text) = backup(url, "");
        assert!(
            !passed && text.contains("postgres://user:password@host"),
            "{url}: {text}"
        );
    }
    let (passed, text) = backup("postgres://u@localhost/quota", "/no/such/directory");
    assert!(!passed && text.contains("QUOTA_DATA_DIR"), "{text}");
}
