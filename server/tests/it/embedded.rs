//! Tests of the private PostgreSQL: it starts in an empty directory, keeps its data, recovers from crashes, and stops
//! when the server exits or is killed.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use quota_server::db::embedded::{EmbeddedError, EmbeddedPostgres};
use tokio_postgres::{Client, NoTls};

const PATIENCE: Duration = Duration::from_secs(20);

/// Returns a data directory that PostgreSQL can access even if root runs the tests, unlike a directory in `/root`.
fn data_dir() -> tempfile::TempDir {
    let dir = tempfile::Builder::new()
        .prefix("quota-embedded-")
        .tempdir_in("/tmp")
        .expect("a directory");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711))
        .expect("the directory's mode is set");
    dir
}

async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls)
        .await
        .expect("PostgreSQL accepts connections");
    tokio::spawn(connection);
    client
}

/// Returns the processes whose working directory is the cluster's directory: all processes of its PostgreSQL.
fn processes_of(data_dir: &Path) -> Vec<i32> {
    let cluster = fs::canonicalize(data_dir)
        .expect("the path exists")
        .join("postgres");
    fs::read_dir("/proc")
        .expect("there is a /proc")
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            (fs::read_link(entry.path().join("cwd")).ok()? == cluster).then_some(pid)
        })
        .collect()
}

fn postmaster(data_dir: &Path) -> i32 {
    let text = fs::read_to_string(data_dir.join("postgres/postmaster.pid"))
        .expect("the process is running");
    text.lines()
        .next()
        .and_then(|line| line.parse().ok())
        .expect("a process id")
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn second_start_keeps_the_data_of_the_first() {
    let dir = data_dir();
    let postgres = EmbeddedPostgres::start(dir.path())
        .await
        .expect("PostgreSQL starts in an empty directory");
    let client = connect(&postgres.database_url()).await;
    client
        .batch_execute("CREATE TABLE kept (n int); INSERT INTO kept VALUES (42)")
        .await
        .expect("a table");
    postgres.stop().await;
    assert_eq!(processes_of(dir.path()), Vec::<i32>::new());

    let postgres = EmbeddedPostgres::start(dir.path())
        .await
        .expect("PostgreSQL starts again");
    let client = connect(&postgres.database_url()).await;
    let row = client
        .query_one("SELECT n FROM kept", &[])
        .await
        .expect("the row is there");
    assert_eq!(row.get::<_, i32>(0), 42);
    postgres.stop().await;
}

#[tokio::test]
async fn listens_only_on_a_private_socket_and_loses_nothing_in_a_power_failure() {
    let dir = data_dir();
    let postgres = EmbeddedPostgres::start(dir.path())
        .await
        .expect("PostgreSQL starts");
    let client = connect(&postgres.database_url()).await;
    for (name, wanted) in [
        ("listen_addresses", ""),
        ("fsync", "on"),
        ("data_checksums", "on"),
    ] {
        let row = client
            .query_one("SELECT current_setting($1)", &[&name])
            .await
            .expect("a setting");
        assert_eq!(row.get::<_, &str>(0), wanted, "{name}");
    }
    let row = client
        .query_one("SELECT current_database()::text", &[])
        .await
        .expect("a name");
    assert_eq!(row.get::<_, &str>(0), "quota");
    let row = client
        .query_one("SELECT current_setting('unix_socket_directories')", &[])
        .await
        .expect("a setting");
    let mode = fs::metadata(row.get::<_, &str>(0))
        .expect("the path exists")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o700);
    postgres.stop().await;
}

#[tokio::test]
async fn dropping_the_handle_stops_postgres() {
    let dir = data_dir();
    let postgres = EmbeddedPostgres::start(dir.path())
        .await
        .expect("PostgreSQL starts");
    assert_ne!(processes_of(dir.path()), Vec::<i32>::new());
    drop(postgres);
    eventually("PostgreSQL ends", || processes_of(dir.path()).is_empty()).await;
}

#[tokio::test]
async fn second_server_on_the_same_data_directory_is_rejected() {
    let dir = data_dir();
    let postgres = EmbeddedPostgres::start(dir.path())
        .await
        .expect("PostgreSQL starts");
    let error = EmbeddedPostgres::start(dir.path())
        .await
        .expect_err("the data directory is in use");
    assert!(matches!(error, EmbeddedError::InUse(_)), "{error}");
    assert!(
        error
            .to_string()
            .contains("another server is using the data directory"),
        "{error}"
    );
    connect(&postgres.database_url()).await;
    postgres.stop().await;
}

#[tokio::test]
async fn postgres_is_restarted_when_it_crashes() {
    let dir = data_dir();
    let postgres = EmbeddedPostgres::start(dir.path())
        .await
        .expect("PostgreSQL starts");
    let url = postgres.database_url();
    connect(&url)
        .await
        .batch_execute("CREATE TABLE kept (n int); INSERT INTO kept VALUES (42)")
        .await
        .expect("a table");
    for _ in 0..2 {
        let first = postmaster(dir.path());
        kill(Pid::from_raw(first), Signal::SIGKILL).expect("the process was running");
        let deadline = Instant::now() + PATIENCE;
        let client = loop {
            if let Ok((client, connection)) = tokio_postgres::connect(&url, NoTls).await {
                tokio::spawn(connection);
                break client;
            }
            assert!(Instant::now() < deadline, "PostgreSQL did not restart");
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        assert_ne!(postmaster(dir.path()), first);
        let row = client
            .query_one("SELECT n FROM kept", &[])
            .await
            .expect("the row is there");
        assert_eq!(row.get::<_, i32>(0), 42);
    }
    postgres.stop().await;
    assert_eq!(processes_of(dir.path()), Vec::<i32>::new());
}

/// The supervisor may be at any point of a restart when it is asked to stop.
#[tokio::test]
async fn stopping_during_a_restart_stops_postgres() {
    let dir = data_dir();
    for wait in [0, 100, 120, 140, 160, 200] {
        let postgres = EmbeddedPostgres::start(dir.path())
            .await
            .expect("PostgreSQL starts");
        kill(Pid::from_raw(postmaster(dir.path())), Signal::SIGKILL)
            .expect("the process was running");
        tokio::time::sleep(Duration::from_millis(wait)).await;
        postgres.stop().await;
        // The processes of the killed postmaster take a while to exit, so check only the postmaster that started last.
        let guarded = fs::read_to_string(dir.path().join("postgres/postmaster.pid"))
            .ok()
            .and_then(|text| text.lines().next()?.parse::<i32>().ok())
            .is_some_and(|pid| processes_of(dir.path()).contains(&pid));
        assert!(
            !guarded,
            "PostgreSQL still runs after it was stopped {wait} ms after the kill"
        );
    }
}

#[tokio::test]
async fn killing_the_server_stops_its_postgres() {
    let dir = data_dir();
    let (mut owner, url) = start_owner(dir.path());
    connect(&url).await;
    kill_and_reap(&mut owner);
    eventually("PostgreSQL ends", || processes_of(dir.path()).is_empty()).await;
    // PostgreSQL was shut down cleanly, so there is nothing to recover.
    assert!(!dir.path().join("postgres/postmaster.pid").exists());
}

#[tokio::test]
async fn server_started_right_after_a_kill_takes_over() {
    let dir = data_dir();
    let (mut owner, url) = start_owner(dir.path());
    let orphan = postmaster(dir.path());
    // Without its guard, PostgreSQL keeps running, which is the worst state that a crash can leave behind. The process
    // that started PostgreSQL is frozen first, because it would otherwise stop PostgreSQL.
    let owner_pid = Pid::from_raw(owner.id().cast_signed());
    kill(owner_pid, Signal::SIGSTOP).expect("the owner was alive");
    let guard = parent_of(orphan);
    for part in [vec![guard], children_of(guard)].concat() {
        if part != orphan {
            kill(Pid::from_raw(part), Signal::SIGKILL).expect("the guard was alive");
        }
    }
    kill_and_reap(&mut owner);
    connect(&url).await;

    let postgres = EmbeddedPostgres::start(dir.path())
        .await
        .expect("the second server takes over");
    assert_ne!(postmaster(dir.path()), orphan);
    connect(&postgres.database_url()).await;
    postgres.stop().await;
    assert_eq!(processes_of(dir.path()), Vec::<i32>::new());
}

#[tokio::test]
async fn stale_pid_file_with_the_pid_of_another_process_does_no_harm() {
    let dir = data_dir();
    EmbeddedPostgres::start(dir.path())
        .await
        .expect("PostgreSQL starts")
        .stop()
        .await;
    let mut stranger = Command::new("sleep").arg("600").spawn().expect("a process");
    fs::write(
        dir.path().join("postgres/postmaster.pid"),
        format!(
            "{}\n{}\n1\n5432\n",
            stranger.id(),
            dir.path().join("postgres").display()
        ),
    )
    .expect("written");

    let started = EmbeddedPostgres::start(dir.path()).await;
    let alive = stranger.try_wait().expect("a child process").is_none();
    stranger.kill().expect("the process was running");
    stranger.wait().expect("a child process");
    assert!(alive, "the other process was killed");
    started.expect("PostgreSQL starts anyway").stop().await;
}

#[tokio::test]
async fn crash_while_creating_the_cluster_leaves_nothing_behind() {
    let dir = data_dir();
    let leftover = dir.path().join("postgres.new-1");
    fs::create_dir(&leftover).expect("created");
    fs::write(leftover.join("PG_VERSION"), "15\n").expect("written");

    let postgres = EmbeddedPostgres::start(dir.path())
        .await
        .expect("PostgreSQL starts");
    connect(&postgres.database_url()).await;
    assert!(!leftover.exists());
    postgres.stop().await;
}

#[tokio::test]
async fn data_directory_with_a_long_or_unusual_path_works() {
    let dir = data_dir();
    let deep = dir.path().join("ä b%".repeat(20)).join("x".repeat(80));
    let postgres = EmbeddedPostgres::start(&deep)
        .await
        .expect("PostgreSQL starts");
    let socket_dir = {
        let client = connect(&postgres.database_url()).await;
        let row = client
            .query_one("SELECT current_setting('unix_socket_directories')", &[])
            .await
            .expect("a setting");
        PathBuf::from(row.get::<_, &str>(0))
    };
    assert!(socket_dir.starts_with("/tmp"), "{}", socket_dir.display());
    let mode = fs::metadata(&socket_dir)
        .expect("the path exists")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o700);
    postgres.stop().await;
    fs::remove_dir_all(socket_dir).expect("removed");
}

#[tokio::test]
async fn cluster_of_a_version_that_is_not_installed_is_reported() {
    let dir = data_dir();
    EmbeddedPostgres::start(dir.path())
        .await
        .expect("PostgreSQL starts")
        .stop()
        .await;
    fs::write(dir.path().join("postgres/PG_VERSION"), "8\n").expect("written");
    let error = EmbeddedPostgres::start(dir.path())
        .await
        .expect_err("no PostgreSQL supports version 8");
    assert!(error.to_string().contains("postgresql-8"), "{error}");
}

#[tokio::test]
async fn error_contains_the_output_of_a_postgres_that_does_not_start() {
    let dir = data_dir();
    EmbeddedPostgres::start(dir.path())
        .await
        .expect("PostgreSQL starts")
        .stop()
        .await;
    fs::remove_file(dir.path().join("postgres/global/pg_control")).expect("removed");
    let error = EmbeddedPostgres::start(dir.path())
        .await
        .expect_err("PostgreSQL cannot start");
    assert!(error.to_string().contains("pg_control"), "{error}");
}

/// Not a test, but the process that the tests above start and kill.
#[tokio::test]
#[ignore = "run by other tests, in a separate process"]
#[expect(
    clippy::disallowed_methods,
    reason = "set by the test that starts this process"
)]
async fn owner() {
    let Some(dir) = std::env::var_os("QUOTA_TEST_EMBEDDED_DIR") else {
        return;
    };
    let postgres = EmbeddedPostgres::start(Path::new(&dir))
        .await
        .expect("PostgreSQL starts");
    println!("\nurl={}", postgres.database_url());
    // The time is limited, in case the test that started this process has exited.
    tokio::time::sleep(Duration::from_mins(2)).await;
}

fn start_owner(data_dir: &Path) -> (Child, String) {
    let (_, module) = module_path!()
        .split_once("::")
        .expect("the path of a module in a crate");
    let mut child = Command::new(std::env::current_exe().expect("a path"))
        .args([
            &format!("{module}::owner"),
            "--exact",
            "--ignored",
            "--nocapture",
        ])
        .env("QUOTA_TEST_EMBEDDED_DIR", data_dir)
        .stdout(Stdio::piped())
        .spawn()
        .expect("PostgreSQL starts");
    let url = BufReader::new(child.stdout.take().expect("piped"))
        .lines()
        .map_while(Result::ok)
        .find_map(|line| line.strip_prefix("url=").map(str::to_owned))
        .expect("the program prints its URL");
    (child, url)
}

fn kill_and_reap(child: &mut Child) {
    child.kill().expect("the process was running");
    child.wait().expect("a child process");
}

fn parent_of(pid: i32) -> i32 {
    parent(pid).expect("the process is running")
}

fn parent(pid: i32) -> Option<i32> {
    // The first fields after the name in parentheses are the state and the parent's PID.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(1)?.parse().ok()
}

fn children_of(pid: i32) -> Vec<i32> {
    fs::read_dir("/proc")
        .expect("there is a /proc")
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|&child| parent(child) == Some(pid))
        .collect()
}

/// Root's checkouts are often in `/root`, which other users cannot enter. This test applies only to root.
#[tokio::test]
async fn root_moves_the_database_if_its_user_cannot_enter_the_directory() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let closed = data_dir();
    fs::set_permissions(closed.path(), fs::Permissions::from_mode(0o700))
        .expect("the directory's mode is set");
    let dir = closed.path().join("data");
    let mut clusters = Vec::new();
    for _ in 0..2 {
        let postgres = EmbeddedPostgres::start(&dir)
            .await
            .expect("PostgreSQL starts");
        let client = connect(&postgres.database_url()).await;
        let row = client
            .query_one("SELECT current_setting('data_directory')", &[])
            .await
            .expect("a setting");
        clusters.push(PathBuf::from(row.get::<_, &str>(0)));
        // Even if the directory has become accessible, the data remains where it is.
        fs::set_permissions(closed.path(), fs::Permissions::from_mode(0o755))
            .expect("the directory's mode is set");
        postgres.stop().await;
    }
    let home = clusters[0].parent().expect("a parent directory").to_owned();
    assert!(home.starts_with("/var/lib/quota"), "{}", home.display());
    fs::remove_dir_all(home).expect("removed");
    assert_eq!(clusters[0], clusters[1]);
    assert!(!dir.join("postgres").exists());
}
