//! A private Redis that a test may freeze, kill and start again. On a port of its own on loopback; keeps
//! nothing on disk; ends with the test, also when that is killed.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    process::Stdio,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    process::{Child, ChildStdin, Command},
    time::{sleep, timeout},
};

const PATIENCE: Duration = Duration::from_secs(10);

/// Tells the process id of "$@", and ends it when standard input ends, which it does with the test. A frozen
/// process takes SIGKILL alone.
const GUARD: &str = r#"
exec 3<&0 </dev/null
"$@" 3<&- >/dev/null &
child=$!
echo "$child"
{ read -r _ <&3; kill -KILL "$child"; } 2>/dev/null >/dev/null &
reader=$!
exec 3<&-
wait "$child"
{ kill "$reader"; wait "$reader"; } 2>/dev/null
"#;

#[derive(Debug)]
pub(crate) struct RedisServer {
    port: u16,
    running: Option<Running>,
    dir: tempfile::TempDir,
}

#[derive(Debug)]
struct Running {
    guard: Child,
    _pipe: ChildStdin,
    pid: Pid,
}

impl RedisServer {
    pub(crate) async fn start() -> Self {
        // Another process may take the port between our look and Redis's own.
        for _ in 0..10 {
            let mut redis = Self {
                port: free_port(),
                running: None,
                dir: tempfile::tempdir().expect("a directory"),
            };
            if redis.launch().await {
                return redis;
            }
        }
        panic!("redis-server does not start; is it installed?");
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://{}/0", self.addr())
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// As a crash: nothing is said to its clients, nothing is kept.
    pub(crate) async fn kill(&mut self) {
        let mut running = self.running.take().expect("it runs");
        kill(running.pid, Signal::SIGKILL).expect("it was alive");
        timeout(PATIENCE, running.guard.wait())
            .await
            .expect("it ends")
            .expect("it is our child");
    }

    /// Starts a killed one again, empty, on the same port.
    pub(crate) async fn restart(&mut self) {
        assert!(self.running.is_none(), "it still runs");
        assert!(
            self.launch().await,
            "redis-server does not start again on port {}",
            self.port
        );
    }

    /// Freezes it: connections stay and answer nothing.
    pub(crate) fn stop(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Lets a frozen one go on.
    pub(crate) fn cont(&self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&self, signal: Signal) {
        let running = self.running.as_ref().expect("it runs");
        kill(running.pid, signal).expect("it is alive");
    }

    /// Whether it takes commands on our port.
    async fn launch(&mut self) -> bool {
        let mut guard = Command::new("/bin/sh")
            .args(["-c", GUARD, "quota-test-redis", "redis-server"])
            .args([
                "--port",
                &self.port.to_string(),
                "--bind",
                "127.0.0.1",
                "--save",
                "",
            ])
            .args(["--appendonly", "no", "--daemonize", "no"])
            .arg("--dir")
            .arg(self.dir.path())
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("there is a shell");
        let pipe = guard.stdin.take().expect("piped");
        let mut pid = String::new();
        BufReader::new(guard.stdout.take().expect("piped"))
            .read_line(&mut pid)
            .await
            .expect("the guard tells the process id");
        let pid = Pid::from_raw(pid.trim().parse().expect("a process id"));
        let deadline = Instant::now() + PATIENCE;
        loop {
            // The port's answer must be this process's: a stranger's is not.
            if process_id(self.addr()).await == Some(pid) {
                self.running = Some(Running {
                    guard,
                    _pipe: pipe,
                    pid,
                });
                return true;
            }
            let ended = guard.try_wait().expect("it is our child").is_some();
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

fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|listener| listener.local_addr())
        .expect("a free port")
        .port()
}

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
