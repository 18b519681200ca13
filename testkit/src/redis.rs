//! A private Redis that may be frozen, killed and started again. On a port of its own on loopback; keeps
//! nothing on disk; ends with its owner, also when that is killed.

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

const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub struct RedisServer {
    port: u16,
    running: Option<Process>,
    options: Vec<String>,
    dir: tempfile::TempDir,
}

impl RedisServer {
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// With more of `redis-server`'s options, such as `--replicaof`.
    pub async fn start_with(options: &[&str]) -> Self {
        // Another process may take the port between our look and Redis's own.
        for _ in 0..10 {
            let mut redis = Self {
                port: free_port(),
                running: None,
                options: options.iter().map(|&it| it.to_owned()).collect(),
                dir: tempfile::tempdir().expect("a directory"),
            };
            if redis.launch().await {
                return redis;
            }
        }
        panic!("redis-server does not start; is it installed?");
    }

    pub fn url(&self) -> String {
        format!("redis://{}/0", self.addr())
    }

    pub fn addr(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    pub fn pid(&self) -> Option<Pid> {
        self.running.as_ref().map(Process::pid)
    }

    /// As a crash: nothing is said to its clients, nothing is kept.
    pub async fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        let mut running = self.running.take().expect("it runs");
        let ended = running.ends_within(PATIENCE).await.expect("it is ours");
        ended.expect("it ends");
    }

    /// Starts a killed one again, empty, on the same port.
    pub async fn restart(&mut self) {
        assert!(self.running.is_none(), "it still runs");
        assert!(
            self.launch().await,
            "redis-server does not start again on port {}",
            self.port
        );
    }

    /// Freezes it: connections stay and answer nothing.
    pub fn stop(&mut self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Lets a frozen one go on.
    pub fn cont(&mut self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&mut self, signal: Signal) {
        let running = self.running.as_mut().expect("it runs");
        running.signal(signal).expect("it is alive");
    }

    /// Whether it takes commands on our port.
    async fn launch(&mut self) -> bool {
        let mut command = Command::new("redis-server");
        command
            .args(["--port", &self.port.to_string(), "--bind", "127.0.0.1"])
            .args(["--save", "", "--appendonly", "no", "--daemonize", "no"])
            .arg("--dir")
            .arg(self.dir.path())
            .args(&self.options);
        let mut process =
            Process::start(&command, Path::new("/dev/null")).expect("there is a shell");
        let deadline = Instant::now() + PATIENCE;
        loop {
            // The port's answer must be this process's: a stranger's is not.
            if process_id(self.addr()).await == Some(process.pid()) {
                self.running = Some(process);
                return true;
            }
            let ended = process.ended().expect("it is our child").is_some();
            if ended || Instant::now() > deadline {
                return false;
            }
            sleep(Duration::from_millis(20)).await;
        }
    }
}

/// What the Redis at `addr` says its process id is.
async fn process_id(addr: SocketAddr) -> Option<Pid> {
    let mut stream = TcpStream::connect(addr).await.ok()?;
    stream.write_all(b"INFO server\r\nQUIT\r\n").await.ok()?;
    let mut answer = String::new();
    timeout(Duration::from_secs(1), stream.read_to_string(&mut answer))
        .await
        .ok()?
        .ok()?;
    let pid = answer
        .lines()
        .find_map(|line| line.strip_prefix("process_id:"))?;
    Some(Pid::from_raw(pid.trim().parse().ok()?))
}

/// A port that nobody had a moment ago.
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
    async fn a_frozen_one_answers_nothing_and_a_killed_one_comes_back() {
        let mut redis = RedisServer::start().await;
        assert!(redis.url().starts_with("redis://127.0.0.1:"));
        redis.stop();
        assert_eq!(process_id(redis.addr()).await, None);
        redis.cont();
        let first = process_id(redis.addr()).await.expect("it goes on");
        redis.kill().await;
        assert!(TcpStream::connect(redis.addr()).await.is_err());
        redis.restart().await;
        assert_ne!(process_id(redis.addr()).await.expect("it is back"), first);
    }
}
