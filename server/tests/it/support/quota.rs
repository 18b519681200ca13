//! The real `quota` binary in its own process, with its private PostgreSQL or as one of several replicas.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use reqwest::Client;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::app::PASSWORD;

/// The maximum time until the server is ready. The first startup creates a database, and the machine may be busy.
const STARTED_WITHIN: Duration = Duration::from_secs(120);
/// How long stopping after SIGTERM may take.
const STOPPED_WITHIN: Duration = Duration::from_secs(30);

/// Returns a data directory that PostgreSQL can access even if root runs the tests.
pub(crate) fn data_dir() -> TempDir {
    tempfile::Builder::new()
        .prefix("quota-it-")
        .permissions(fs::Permissions::from_mode(0o711))
        .tempdir_in("/tmp")
        .expect("a directory")
}

/// A running server, which is killed when the test ends.
pub(crate) struct Quota {
    child: Child,
    pub(crate) addr: SocketAddr,
    pub(crate) metrics_addr: SocketAddr,
    /// The address of the gRPC listener, if the settings turn it on.
    pub(crate) grpc_addr: Option<SocketAddr>,
}

impl Quota {
    /// Starts a server and waits until it logs that it is ready.
    pub(crate) fn start(data_dir: &Path) -> Self {
        Self::start_with(data_dir, &[])
    }

    /// Like [`start`](Self::start), with additional settings.
    pub(crate) fn start_with(data_dir: &Path, settings: &[(&str, &str)]) -> Self {
        let (quota, out) = Self::start_unread(data_dir, settings);
        // Read the output to the end, so that the server never blocks when it writes its log.
        std::thread::spawn(move || out.bytes().map_while(Result::ok).for_each(drop));
        quota
    }

    /// Like [`start_with`](Self::start_with), but stops reading the output once the server is ready, and also returns a
    /// reader for the rest of the output.
    pub(crate) fn start_unread(
        data_dir: &Path,
        settings: &[(&str, &str)],
    ) -> (Self, BufReader<ChildStdout>) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quota"));
        for (name, _) in std::env::vars_os() {
            if name.to_str().is_some_and(|it| it.starts_with("QUOTA_")) {
                command.env_remove(name);
            }
        }
        let mut child = command
            .arg("serve")
            .args(["--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0"])
            .env_remove("DATABASE_URL")
            .env_remove("REDIS_URL")
            .env("QUOTA_DATA_DIR", data_dir)
            .env("RUST_LOG", "info,quota_server::access=off")
            .envs(settings.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the binary runs");
        let mut out = BufReader::new(child.stdout.take().expect("the server's output is piped"));
        let (found, ready) = mpsc::channel();
        std::thread::spawn(move || {
            loop {
                let mut line = String::new();
                if out.read_line(&mut line).is_ok_and(|length| length == 0) {
                    return;
                }
                if let Ok(line) = serde_json::from_str::<Value>(&line)
                    && line["message"] == "ready"
                {
                    let _ = found.send((line, out));
                    return;
                }
            }
        });
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut quota = Self {
            child,
            addr: nowhere,
            metrics_addr: nowhere,
            grpc_addr: None,
        };
        let (line, out) = ready
            .recv_timeout(STARTED_WITHIN)
            .expect("a log line that reports readiness");
        let address = |name: &str| {
            let text = line[name].as_str().expect("the line names the address");
            text.parse().expect("an address")
        };
        (quota.addr, quota.metrics_addr) = (address("listen"), address("metrics_listen"));
        quota.grpc_addr = line["grpc_listen"]
            .is_string()
            .then(|| address("grpc_listen"));
        (quota, out)
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("a process id");
        kill(Pid::from_raw(pid), signal).expect("the process exists");
    }

    /// Stops the server with SIGTERM.
    pub(crate) fn stop(mut self) {
        self.signal(Signal::SIGTERM);
        let deadline = Instant::now() + STOPPED_WITHIN;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child process") {
                assert!(
                    status.success(),
                    "the server stops without an error: {status}"
                );
                return;
            }
            assert!(
                Instant::now() < deadline,
                "the server has not stopped within {STOPPED_WITHIN:?}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Kills the server with SIGKILL.
    pub(crate) fn kill(mut self) {
        self.signal(Signal::SIGKILL);
        self.child.wait().expect("the process ends");
    }

    /// Registers an account, and creates a plan with a key. Returns the key.
    pub(crate) async fn key_on(&self, http: &Client, plan: Value) -> String {
        let account = json!({"email": "owner@example.com", "password": PASSWORD});
        let account = self.post(http, "/auth/register", "", account).await;
        let token = account["access_token"].as_str().expect("a token");
        let plan = self.post(http, "/admin/plans", token, plan).await;
        let key = json!({"name": "it", "plan_id": plan["id"]});
        let key = self.post(http, "/admin/api-keys", token, key).await;
        key["key"].as_str().expect("the key's secret").to_owned()
    }

    async fn post(&self, http: &Client, path: &str, token: &str, body: Value) -> Value {
        let url = format!("http://{}{path}", self.addr);
        let answer = http
            .post(url)
            .bearer_auth(token)
            .json(&body)
            .send()
            .await
            .expect("the server responds");
        let status = answer.status();
        let body: Value = answer.json().await.expect("JSON");
        assert_eq!(status, 201, "{path}: {body}");
        body
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns the resident memory in bytes.
    pub(crate) fn memory(&self) -> u64 {
        let status = format!("/proc/{}/status", self.child.id());
        let status = fs::read_to_string(status).expect("the process is running");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line
            .expect("Linux reports the memory")
            .trim()
            .trim_end_matches(" kB");
        kib.parse::<u64>().expect("a number") * 1024
    }

    /// Returns the value of a metric from `/metrics`.
    pub(crate) async fn counter(&self, http: &Client, name: &str) -> u64 {
        let url = format!("http://{}/metrics", self.metrics_addr);
        let text = http.get(url).send().await.expect("the server responds");
        let text = text.text().await.expect("text");
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let value = value.unwrap_or_else(|| panic!("{name} is not in\n{text}"));
        value.parse().expect("a whole number")
    }
}

impl Drop for Quota {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
