//! A private Redis that can be frozen, killed and restarted. Listens on a free loopback port, stores nothing on disk,
//! and exits when the process that started it exits, even if that process is killed.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use nix::{sys::signal::Signal, unistd::Pid};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{sleep, timeout},
};

use crate::Process;

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// How long a running server may take to reply. A busy machine may pause it for seconds.
const REPLY_TIMEOUT: Duration = Duration::from_secs(30);
/// How long to wait for a server that may never reply, because it is starting or frozen.
const SHORT_REPLY_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub struct RedisServer {
    pub(crate) port: u16,
    running: Option<Process>,
    pub(crate) options: Vec<String>,
    dir: tempfile::TempDir,
}

impl RedisServer {
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// Starts a server with additional options of `redis-server`, such as `--replicaof`. `{free}` is replaced by
    /// another free port. `--sentinel` must come first, followed by the sentinel's file.
    pub async fn start_with(options: &[&str]) -> Self {
        // Retry, because another process may take the port before Redis binds it.
        for _ in 0..10 {
            let mut redis = Self {
                port: free_port(),
                running: None,
                options: options
                    .iter()
                    .map(|it| it.replace("{free}", &free_port().to_string()))
                    .collect(),
                dir: tempfile::tempdir().expect("a directory"),
            };
            if redis.launch().await {
                return redis;
            }
        }
        panic!("redis-server does not start; is it installed?");
    }

    pub fn url(&self) -> String {
        let password = self.password().map(|it| format!(":{it}@"));
        format!("redis://{}{}/0", password.unwrap_or_default(), self.addr())
    }

    pub fn addr(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// Returns the password, if the server's options require one.
    fn password(&self) -> Option<&str> {
        let at = self.options.iter().position(|it| it == "--requirepass")?;
        self.options.get(at + 1).map(String::as_str)
    }

    /// Sends one line and returns the reply. Panics if there is none.
    pub async fn command(&self, line: &str) -> String {
        self.answer(line)
            .await
            .unwrap_or_else(|| panic!("no reply to {line}"))
    }

    /// Sends one line and returns the reply, if there is one.
    pub(crate) async fn answer(&self, line: &str) -> Option<String> {
        command(self.addr(), self.password(), line, REPLY_TIMEOUT).await
    }

    pub fn pid(&self) -> Option<Pid> {
        self.running.as_ref().map(Process::pid)
    }

    pub fn is_running(&mut self) -> bool {
        match &mut self.running {
            Some(process) => process.ended().expect("a child process").is_none(),
            None => false,
        }
    }

    /// Kills the server, as in a crash. All data is lost.
    pub async fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        let mut running = self.running.take().expect("the server is running");
        let ended = running
            .ends_within(PATIENCE)
            .await
            .expect("a child process");
        ended.expect("the server ends in time");
    }

    /// Restarts the server after [`kill`](Self::kill), without data, on the same port.
    pub async fn restart(&mut self) {
        assert!(self.running.is_none(), "the server is still running");
        assert!(
            self.launch().await,
            "redis-server does not start again on port {}",
            self.port
        );
    }

    /// Freezes the server: connections remain open but get no replies.
    pub fn stop(&mut self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Resumes the server after [`stop`](Self::stop).
    pub fn cont(&mut self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&mut self, signal: Signal) {
        let running = self.running.as_mut().expect("the server is running");
        running.signal(signal).expect("the process is running");
    }

    /// Starts the process. Returns whether the server then accepts commands on its port.
    async fn launch(&mut self) -> bool {
        let mut command = Command::new("redis-server");
        let port = self.port.to_string();
        let place = ["--port", &port, "--bind", "127.0.0.1", "--daemonize", "no"];
        match &*self.options {
            // A sentinel's file must come first, and a sentinel has no data options.
            [sentinel, file] if sentinel == "--sentinel" => {
                command.args([file, sentinel]).args(place);
            }
            options => {
                command
                    .args(place)
                    .args(["--save", "", "--appendonly", "no"])
                    .args(options);
            }
        }
        command.arg("--dir").arg(self.dir.path());
        let mut process =
            Process::start(&command, Path::new("/dev/null")).expect("there is a shell");
        let deadline = Instant::now() + PATIENCE;
        loop {
            // The reply must come from this process, not from another process on the same port.
            let pid = process_id(self.addr(), self.password(), SHORT_REPLY_TIMEOUT).await;
            if pid == Some(process.pid()) {
                self.running = Some(process);
                return true;
            }
            let ended = process.ended().expect("a child process").is_some();
            if ended || Instant::now() > deadline {
                return false;
            }
            sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Returns the PID that the Redis at `addr` reports.
async fn process_id(addr: SocketAddr, password: Option<&str>, limit: Duration) -> Option<Pid> {
    let answer = command(addr, password, "INFO server", limit).await?;
    let pid = answer
        .lines()
        .find_map(|line| line.strip_prefix("process_id:"))?;
    Some(Pid::from_raw(pid.trim().parse().ok()?))
}

/// Sends one line to the Redis at `addr` and returns the reply, or `None` if the call fails or takes longer than
/// `limit`.
async fn command(
    addr: SocketAddr,
    password: Option<&str>,
    line: &str,
    limit: Duration,
) -> Option<String> {
    let asked = async {
        let mut stream = TcpStream::connect(addr).await.ok()?;
        let login = password.map(|it| format!("AUTH {it}\r\n"));
        let lines = format!("{}{line}\r\n", login.unwrap_or_default());
        stream.write_all(lines.as_bytes()).await.ok()?;
        // A sentinel does not support QUIT, but every server closes a connection after the client has closed its side.
        stream.shutdown().await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        Some(answer)
    };
    timeout(limit, asked).await.ok()?
}

/// Returns a port that was free a moment ago.
pub fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|listener| listener.local_addr())
        .expect("a free port")
        .port()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_frozen_redis_does_not_respond_and_a_killed_one_can_be_restarted() {
        let mut redis = RedisServer::start().await;
        assert!(redis.url().starts_with("redis://127.0.0.1:"));
        redis.stop();
        let frozen = process_id(redis.addr(), None, SHORT_REPLY_TIMEOUT).await;
        assert_eq!(frozen, None);
        redis.cont();
        let first = process_id(redis.addr(), None, REPLY_TIMEOUT)
            .await
            .expect("Redis responds again");
        redis.kill().await;
        assert!(TcpStream::connect(redis.addr()).await.is_err());
        redis.restart().await;
        assert_ne!(
            process_id(redis.addr(), None, REPLY_TIMEOUT)
                .await
                .expect("Redis is running again"),
            first
        );
    }
}
