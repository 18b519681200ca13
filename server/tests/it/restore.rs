//! Tests `restore.sh` on a machine where older data remains, after an interruption, and with a data directory whose
//! owner is hostile. Also tests the encrypted connections of the backup script.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
    time::{Duration, Instant},
};

use quota_testkit::proxy::Fault;
use reqwest::Client;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::TlsAcceptor;

use crate::{
    backup::{back_up, count, migrated, restore, script, text},
    outage::through_proxy,
    support::{
        authority::Authority,
        postgres::TestDatabase,
        quota::{Quota, data_dir},
    },
};

const PATIENCE: Duration = Duration::from_secs(30);

/// Files that this version and earlier versions set aside for the operator, relative to the data directory.
const REJECTED: [&str; 3] = [
    "usage/rejected/01a21968-4ea1-7052-b7e7-a828c3c9daa2-2.segment",
    "usage/refused/01a21968-4ea1-7052-b7e7-a828c3c9daa2-1.segment",
    "usage/01a21968-4ea1-7052-b7e7-a828c3c9daa2/2.refused",
];

/// The number of requests while the server cannot reach PostgreSQL: enough to fill more than one segment of 128 KiB.
const REQUESTS: usize = 2500;

/// Returns the paths of the segments in a data directory, relative to this directory.
fn segments(data: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for directory in fs::read_dir(data.join("usage")).into_iter().flatten() {
        let directory = directory.expect("an entry").path();
        for file in fs::read_dir(directory).into_iter().flatten() {
            let path = file.expect("an entry").path();
            if path.extension().is_some_and(|it| it == "segment") {
                found.push(
                    path.strip_prefix(data)
                        .expect("the file is in the directory")
                        .to_owned(),
                );
            }
        }
    }
    // The names are UUIDv7, which sort by time.
    found.sort();
    found
}

/// Takes a backup while the server cannot reach PostgreSQL, so that some usage is only in the server's files. Then
/// calls `after`, and kills the server. Returns the backup and the IDs of the requests that were sent before the
/// backup.
async fn backlog_in_a_backup(
    data: &Path,
    backups: &Path,
    after: impl AsyncFnOnce(&dyn Fn()),
) -> (PathBuf, Vec<String>) {
    let source = migrated().await;
    let (proxy, url) = through_proxy(&source).await;
    let settings = [
        ("DATABASE_URL", url.as_str()),
        // The minimum, which results in the smallest segments.
        ("QUOTA_USAGE_BACKLOG_MAX", "1048576"),
    ];
    let (quota, http) = (Quota::start_with(data, &settings), Client::new());
    let plan = json!({"name": "fast", "default_rpm": 60_000_000});
    let key = quota.key_on(&http, plan).await;
    let mut ids = Vec::new();
    let echo = format!("http://{}/v1/echo", quota.addr);
    let send = async || {
        let answer = http.get(&echo).header("X-API-Key", &key).send().await;
        let answer = answer.expect("the server responds");
        assert_eq!(answer.status(), 200);
        let id = answer.headers()["x-request-id"].to_str().expect("text");
        id.to_owned()
    };
    ids.push(send().await);
    proxy.set(Fault::Refuse);
    proxy.cut();
    for _ in 0..REQUESTS {
        ids.push(send().await);
    }
    for rejected in REJECTED.map(|it| data.join(it)) {
        fs::create_dir_all(rejected.parent().expect("a folder")).expect("created");
        fs::write(rejected, "rejected").expect("written");
    }
    let backup = tokio::task::block_in_place(|| back_up(source.url(), data, backups));
    let recover = || proxy.set(Fault::Pass);
    after(&recover).await;
    quota.kill();
    (backup, ids)
}

/// Starts a server on the restored database, and waits until the database contains all requests in `ids`.
async fn assert_complete(database: &TestDatabase, data: &Path, ids: &[String]) {
    let quota = Quota::start_with(data, &[("DATABASE_URL", database.url())]);
    let client = database.connect().await;
    let patience = Instant::now() + PATIENCE;
    loop {
        let found = client
            .query_one(
                "SELECT count(*), count(DISTINCT request_id) FROM usage_log WHERE request_id = ANY($1)",
                &[&ids],
            )
            .await
            .expect("a row");
        let (rows, requests): (i64, i64) = (found.get(0), found.get(1));
        assert_eq!(rows, requests, "a request is counted twice");
        if usize::try_from(requests).expect("a few") == ids.len() {
            break;
        }
        let missing = ids.len() - usize::try_from(requests).expect("a few");
        assert!(Instant::now() < patience, "{missing} requests are missing");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    quota.stop();
}

/// After the backup, a segment is shipped and deleted, and then the database is lost. The server's directory
/// remains, and contains a segment that is newer than the backup.
#[tokio::test(flavor = "multi_thread")]
async fn restore_on_the_same_machine_adds_what_was_shipped_after_the_backup() {
    let (data, backups) = (data_dir(), data_dir());
    let ship = async |recover: &dyn Fn()| {
        // One segment is full, one is in use, and one is prepared.
        let before = segments(data.path());
        assert!(before.len() > 2, "only {before:?}");
        recover();
        let patience = Instant::now() + PATIENCE;
        while segments(data.path()).contains(&before[0]) {
            assert!(
                Instant::now() < patience,
                "the first segment is not shipped"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(!segments(data.path()).is_empty(), "the directory remains");
    };
    let (backup, ids) = backlog_in_a_backup(data.path(), backups.path(), ship).await;

    let empty = TestDatabase::create_empty().await;
    let restored = restore(&backup, empty.url(), data.path());
    assert!(restored.status.success(), "{}", text(&restored));
    assert_complete(&empty, data.path(), &ids).await;
}

/// The script cannot write large files, as on a full disk, so it fails while it restores usage.
#[tokio::test(flavor = "multi_thread")]
async fn interrupted_restore_can_be_repeated() {
    let (first, data, backups) = (data_dir(), data_dir(), data_dir());
    let nothing = async |_: &dyn Fn()| {};
    let (backup, ids) = backlog_in_a_backup(first.path(), backups.path(), nothing).await;

    let empty = TestDatabase::create_empty().await;
    let restore_sh = script("restore.sh");
    let interrupted = Command::new("bash")
        .args(["-c", "ulimit -f 32; exec bash \"$@\"", "restore.sh"])
        .args(restore_sh.get_args())
        .arg(&backup)
        .env("DATABASE_URL", empty.url())
        .env("QUOTA_DATA_DIR", data.path())
        .env_remove("DATABASE_URL_FILE")
        .output()
        .expect("bash runs");
    assert!(!interrupted.status.success(), "{}", text(&interrupted));
    let partial = segments(data.path());
    for segment in &partial {
        let size = |root: &Path| fs::metadata(root.join(segment)).expect("a file").len();
        assert_eq!(size(data.path()), size(first.path()), "{segment:?}");
    }
    let tables = "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace";
    let client = empty.connect().await;
    assert_eq!(count(&client, tables).await, 0, "{}", text(&interrupted));
    drop(client);

    let repeated = restore(&backup, empty.url(), data.path());
    assert!(repeated.status.success(), "{}", text(&repeated));
    let left = fs::read_dir(data.path()).expect("a directory").count();
    assert_eq!(left, 1, "only `usage`");
    for rejected in REJECTED {
        let restored = fs::read_to_string(data.path().join(rejected));
        assert_eq!(restored.expect("the backup is restored"), "rejected");
    }
    assert_complete(&empty, data.path(), &ids).await;
}

/// Sets the time at which a backup was started.
fn set_started_at(backup: &Path, age: Duration) {
    let date = Command::new("date")
        .args(["--utc", "--iso-8601=seconds", "--date"])
        .arg(format!("{} seconds ago", age.as_secs()))
        .output()
        .expect("date runs");
    fs::write(backup.join("started_at"), date.stdout).expect("written");
    let checksums = Command::new("sha256sum")
        .args(["started_at", "usage.tar", "quota.dump"])
        .current_dir(backup)
        .output()
        .expect("sha256sum runs");
    fs::write(backup.join("SHA256SUMS"), checksums.stdout).expect("written");
}

/// Stripe recognizes repeated reports for only a day.
#[tokio::test(flavor = "multi_thread")]
async fn restoring_an_old_backup_warns_that_usage_would_be_charged_again() {
    const HOUR: Duration = Duration::from_hours(1);
    let (source, data) = (migrated().await, data_dir());
    let warns = async |backup: &Path, age: Duration| {
        set_started_at(backup, age);
        let empty = TestDatabase::create_empty().await;
        let restored = restore(backup, empty.url(), data.path());
        assert!(restored.status.success(), "{}", text(&restored));
        text(&restored).contains("turn billing off")
    };

    let backups = data_dir();
    let backup = back_up(source.url(), data.path(), backups.path());
    assert!(!warns(&backup, 21 * HOUR).await, "no usage is charged");

    let client = source.connect().await;
    let usage = "INSERT INTO billing_usage (tenant_id, start, cost) \
        VALUES (gen_random_uuid(), date_trunc('hour', now()), 1)";
    client.batch_execute(usage).await.expect("inserted");
    let backups = data_dir();
    let backup = back_up(source.url(), data.path(), backups.path());
    assert!(warns(&backup, 21 * HOUR).await);
    assert!(!warns(&backup, 19 * HOUR).await);
}

/// The ID of an unprivileged user.
const NOBODY: u32 = 65_534;

/// Restores as root into another user's data directory, with a `tar` that simulates a race with this user's processes:
/// after `tar` has extracted the archive, `usage` is a link to root's directory.
fn restore_against_a_hostile_user(backup: &Path, url: &str, data: &Path, to: &Path) -> Output {
    let bin = data_dir();
    let tar = bin.path().join("tar");
    let hostile = "#!/bin/bash\n\
        PATH=${PATH#*:} tar \"$@\" || exit\n\
        case $* in *--extract*) rm -rf \"$QUOTA_DATA_DIR/usage\"; ln -s \"$TARGET\" \"$QUOTA_DATA_DIR/usage\" ;; esac\n";
    fs::write(&tar, hostile).expect("written");
    fs::set_permissions(&tar, fs::Permissions::from_mode(0o755)).expect("ours");
    Command::new("bash")
        .args(["-c", "PATH=$BIN:$PATH exec bash \"$@\"", "restore.sh"])
        .args(script("restore.sh").get_args())
        .arg(backup)
        .env("DATABASE_URL", url)
        .env("QUOTA_DATA_DIR", data)
        .env_remove("DATABASE_URL_FILE")
        .env("TARGET", to)
        .env("BIN", bin.path())
        .output()
        .expect("bash runs")
}

#[tokio::test(flavor = "multi_thread")]
async fn restore_as_root_writes_only_what_the_server_user_may_write() {
    if !nix::unistd::geteuid().is_root() {
        // Without root, the script cannot write anything that its user may not write.
        return;
    }
    let (first, backups) = (data_dir(), data_dir());
    let nothing = async |_: &dyn Fn()| {};
    let (backup, _) = backlog_in_a_backup(first.path(), backups.path(), nothing).await;
    let of_nobody = || {
        let data = data_dir();
        chown(data.path(), Some(NOBODY), Some(NOBODY)).expect("root may");
        data
    };

    let (data, roots) = (of_nobody(), data_dir());
    let empty = TestDatabase::create_empty().await;
    restore_against_a_hostile_user(&backup, empty.url(), data.path(), roots.path());
    let written = fs::read_dir(roots.path()).expect("a directory").count();
    assert_eq!(written, 0, "root's directory was written to");

    let (data, empty) = (of_nobody(), TestDatabase::create_empty().await);
    let restored = restore(&backup, empty.url(), data.path());
    assert!(restored.status.success(), "{}", text(&restored));
    let restored = segments(data.path());
    assert!(restored.len() > 1, "{restored:?}");
    for segment in restored {
        let path = data.path().join(segment);
        let directory = path.parent().expect("a directory");
        for path in [&path, directory] {
            assert_eq!(fs::metadata(path).expect("the file exists").uid(), NOBODY);
        }
    }
}

/// Puts TLS in front of PostgreSQL: accepts the client's request for encryption, and forwards what it decrypts. Returns
/// the port.
async fn encrypted(database: &TestDatabase, authority: &Authority) -> u16 {
    let acceptor = TlsAcceptor::from(Arc::clone(&authority.config));

    let (proxy, _) = through_proxy(database).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = listener.local_addr().expect("the socket is bound").port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let (acceptor, upstream) = (acceptor.clone(), proxy.addr());
            tokio::spawn(async move {
                // https://www.postgresql.org/docs/current/protocol-message-formats.html
                const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];
                let mut request = [0; 8];
                while stream.read_exact(&mut request).await.is_ok() {
                    let accepted = request == SSL_REQUEST;
                    // Any other message is a request for GSSAPI encryption.
                    let answer = if accepted { b"S" } else { b"N" };
                    if stream.write_all(answer).await.is_err() || accepted {
                        break;
                    }
                }
                // A client that does not trust the certificate disconnects here.
                let Ok(mut stream) = acceptor.accept(stream).await else {
                    return;
                };
                let mut postgres = TcpStream::connect(upstream)
                    .await
                    .expect("the server listens");
                let _ = copy_bidirectional(&mut stream, &mut postgres).await;
            });
        }
    });
    port
}

/// With `sslmode=require`, the server verifies the certificate. PostgreSQL's own programs do not verify it by default.
#[tokio::test(flavor = "multi_thread")]
async fn backup_verifies_the_certificate_if_the_server_does() {
    let (source, certificates, backups) = (migrated().await, data_dir(), data_dir());
    let file = |name: &str| certificates.path().join(name);
    let trusted = Authority::new(certificates.path(), "trusted");
    let port = encrypted(&source, &trusted).await;
    // The authority in `other` has not issued the certificate.
    Authority::new(certificates.path(), "other");
    let config: tokio_postgres::Config = source.url().parse().expect("a URL");
    let (user, name) = (
        config.get_user().unwrap_or("postgres"),
        config.get_dbname().expect("a database"),
    );
    let backup = |url: &str, trusted: Option<&str>| {
        let mut command = script("backup.sh");
        command.arg(backups.path()).env("DATABASE_URL", url);
        command
            .env_remove("SSL_CERT_FILE")
            .env_remove("SSL_CERT_DIR");
        if let Some(trusted) = trusted {
            command.env("SSL_CERT_FILE", file(trusted));
        }
        let output = tokio::task::block_in_place(|| command.output().expect("bash runs"));
        (output.status.success(), text(&output))
    };
    let url = |host: &str, more: &str| format!("postgres://{user}@{host}:{port}/{name}?{more}");
    for (url, trusted) in [
        (url("localhost", "sslmode=require"), None),
        (
            url("localhost", "connect_timeout=9&sslmode=require"),
            Some("other.pem"),
        ),
        // The certificate is for `localhost`, not for this address.
        (url("127.0.0.1", "sslmode=require"), Some("trusted.pem")),
        (
            format!("host=localhost port={port} user={user} dbname={name} sslmode = 'require'"),
            Some("other.pem"),
        ),
        (url("localhost", "sslmode=require"), Some("missing.pem")),
    ] {
        let (passed, text) = backup(&url, trusted);
        assert!(!passed, "{url} {trusted:?}: {text}");
        assert!(
            text.to_lowercase().contains("cert"),
            "{url} {trusted:?}: {text}"
        );
    }
    for url in [
        url("localhost", "sslmode=require"),
        url("localhost", "sslmode=require&connect_timeout=9"),
        format!("host=localhost port={port} sslmode=require user={user} dbname={name}"),
    ] {
        let (passed, text) = backup(&url, Some("trusted.pem"));
        assert!(passed, "{url}: {text}");
        // The name of a backup contains its time in whole seconds, so wait for the next second.
        tokio::time::sleep(Duration::from_millis(1100)).await;
    }
}
