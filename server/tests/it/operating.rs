//! Tests how the `quota` binary behaves for service managers, container engines and load balancers: when it listens,
//! what its health checks return, and which of their failures it logs.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt as _,
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use quota_testkit::proxy::Fault;

use crate::{outage::through_proxy, support::postgres::TestDatabase};

/// A server process and its log. Killed on drop.
struct Process {
    child: Child,
    addr: SocketAddr,
    log: Arc<Mutex<Vec<String>>>,
}

impl Process {
    fn start(database_url: &str, flags: &[&str]) -> Self {
        let addr = free_address();
        let mut child = quota(addr)
            .arg("serve")
            .args(flags)
            .env("QUOTA_METRICS_LISTEN", "off")
            .env("DATABASE_URL", database_url)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let log = Arc::new(Mutex::new(Vec::new()));
        let lines = BufReader::new(child.stdout.take().expect("the server's output is piped"));
        let written = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                written.lock().expect("no panic").push(line);
            }
        });
        Self { child, addr, log }
    }

    fn logged(&self, text: &str) -> bool {
        let log = self.log.lock().expect("no panic");
        log.iter().any(|line| line.contains(text))
    }

    async fn until_logged(&self, text: &str) {
        for _ in 0..600 {
            if self.logged(text) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("{text:?} is not in the log: {:#?}", self.log);
    }

    fn health(&self, flags: &[&str]) -> Output {
        let output = quota(self.addr).arg("health").args(flags).output();
        output.expect("the binary runs")
    }

    async fn stop(&mut self) -> ExitStatus {
        let pid = i32::try_from(self.child.id()).expect("a process ID");
        kill(Pid::from_raw(pid), Signal::SIGTERM).expect("the process is running");
        let told = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a child process") {
                return status;
            }
            assert!(
                told.elapsed() < Duration::from_secs(30),
                "the server does not exit"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn quota(addr: SocketAddr) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quota"));
    command
        .env_clear()
        .env("QUOTA_LISTEN", addr.to_string())
        .stdin(Stdio::null());
    command
}

fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    listener.local_addr().expect("the socket is bound")
}

#[tokio::test(flavor = "multi_thread")]
async fn starting_server_refuses_connections_and_stops_on_request() {
    let (unused, grpc) = (free_address(), free_address());
    let mut process = Process::start(
        &format!("postgres://quota@{unused}/quota"),
        &[&format!("--grpc-listen={grpc}")],
    );
    process
        .until_logged("cannot reach PostgreSQL, retrying")
        .await;

    for addr in [process.addr, grpc] {
        let refused = TcpStream::connect(addr).expect_err("the server does not listen yet");
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    }
    for flags in [&[][..], &["--live"], &["--serving"]] {
        let health = process.health(flags);
        assert_eq!(health.status.code(), Some(1), "{flags:?}");
        let message = String::from_utf8_lossy(&health.stderr);
        assert!(message.contains("cannot connect to"), "{message}");
    }
    assert_eq!(process.stop().await.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn health_checks_distinguish_ready_serving_and_live() {
    let database = TestDatabase::create_empty().await;
    let (proxy, url) = through_proxy(&database).await;
    let mut process = Process::start(&url, &["--drain-delay=10s", "--drain-timeout=5s"]);
    process.until_logged("\"ready\"").await;
    let codes = |process: &Process| {
        [&[][..], &["--serving"], &["--live"]].map(|flags| process.health(flags).status.code())
    };
    assert_eq!(codes(&process), [Some(0), Some(0), Some(0)]);

    // Without PostgreSQL, the server still serves requests with keys that are in memory.
    proxy.set(Fault::Refuse);
    proxy.cut();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(codes(&process), [Some(1), Some(0), Some(0)]);
    process.until_logged("/health/ready").await;
    proxy.set(Fault::Pass);

    // While the server is stopping, only the liveness probe succeeds. The log does not report the failure of the other
    // probes.
    let errors = || {
        let log = process.log.lock().expect("no panic");
        log.iter().filter(|line| line.contains("/health/")).count()
    };
    let before = errors();
    let pid = i32::try_from(process.child.id()).expect("a process ID");
    kill(Pid::from_raw(pid), Signal::SIGTERM).expect("the process is running");
    process.until_logged("stopping").await;
    assert_eq!(codes(&process), [Some(1), Some(1), Some(0)]);
    assert_eq!(errors(), before);
    assert!(!process.logged("the server is stopping"));
    assert_eq!(process.stop().await.code(), Some(0));
}

/// How long a response and the end of its connection may take. Much shorter than the drain delay, because the server
/// closes all connections at the end of this delay.
const CLOSED_WITHIN: Duration = Duration::from_secs(8);

/// Sends a request. Returns the response, and whether the server then closes the connection. If `closes` is set, waits
/// up to [`CLOSED_WITHIN`] for the connection to close. Otherwise, waits only half a second after the response.
fn exchange(connection: &mut TcpStream, closes: bool) -> (String, bool) {
    connection
        .write_all(b"GET /v1/echo HTTP/1.1\r\nHost: quota\r\n\r\n")
        .expect("an open connection");
    let mut response = Vec::new();
    let mut part = [0; 4096];
    loop {
        // The body of the response is a JSON object.
        let is_complete = response.ends_with(b"}");
        let limit = if is_complete && !closes {
            Duration::from_millis(500)
        } else {
            CLOSED_WITHIN
        };
        connection
            .set_read_timeout(Some(limit))
            .expect("an open connection");
        match connection.read(&mut part) {
            Ok(0) => break (String::from_utf8(response).expect("text"), true),
            Ok(length) => response.extend(&part[..length]),
            Err(_) => break (String::from_utf8(response).expect("text"), false),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_close_after_a_response_while_the_server_is_stopping() {
    let database = TestDatabase::create_empty().await;
    for direct in ["--direct-responses=on", "--direct-responses=off"] {
        let flags = ["--drain-delay=20s", "--drain-timeout=5s", direct];
        let process = Process::start(database.url(), &flags);
        process.until_logged("\"ready\"").await;
        let mut kept = TcpStream::connect(process.addr).expect("the server listens");
        for _ in 0..2 {
            let (response, is_closed) = exchange(&mut kept, false);
            assert!(response.starts_with("HTTP/1.1 401 "), "{response}");
            assert!(!response.contains("connection: close"), "{response}");
            assert!(!is_closed, "{direct}");
        }

        let pid = i32::try_from(process.child.id()).expect("a process ID");
        kill(Pid::from_raw(pid), Signal::SIGTERM).expect("the process is running");
        process.until_logged("stopping").await;
        let mut new = TcpStream::connect(process.addr).expect("the server listens");
        for connection in [&mut kept, &mut new] {
            let (response, is_closed) = exchange(connection, true);
            assert!(response.starts_with("HTTP/1.1 401 "), "{response}");
            assert!(
                response.contains("connection: close\r\n"),
                "{direct}: {response}"
            );
            assert!(is_closed, "{direct}");
        }
        // The process is killed instead of waiting for the end of the drain delay.
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn routine_probes_are_not_in_the_access_log() {
    let database = TestDatabase::create_empty().await;
    let mut process = Process::start(database.url(), &[]);
    process.until_logged("\"ready\"").await;
    for _ in 0..3 {
        assert!(process.health(&[]).status.success());
    }
    let other = reqwest::get(format!("http://{}/v1/echo", process.addr)).await;
    assert_eq!(other.expect("the server responds").status(), 401);
    assert_eq!(process.stop().await.code(), Some(0));
    assert!(process.logged("/v1/echo"));
    assert!(!process.logged("/health/"));
}

#[tokio::test(flavor = "multi_thread")]
async fn error_of_a_data_directory_that_cannot_be_created_names_both_settings() {
    // With a file in place of the parent directory, even root cannot create the data directory, as on a read-only file
    // system.
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).expect("ours");
    let file = dir.path().join("file");
    std::fs::write(&file, "").expect("written");
    let output = quota(free_address())
        .arg("serve")
        .env("QUOTA_METRICS_LISTEN", "off")
        .env("QUOTA_DATA_DIR", file.join("data"))
        .output()
        .expect("the binary runs");
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(
        message.contains("DATABASE_URL") && message.contains("QUOTA_DATA_DIR"),
        "{message}"
    );
}
