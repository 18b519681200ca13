//! The servers under test. Each server is pinned to the given core, if any, and is stopped when its [`Server`] is
//! dropped.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    sys::signal::{SigSet, SigmaskHow, Signal, kill},
    time::clock_getcpuclockid,
    unistd::{Pid, SysconfVar, sysconf},
};
use quota_server::config::variables;
use serde_json::Value;
use tempfile::TempDir;
use tokio::runtime::Builder;

use crate::replicas::tenant::counted;

/// The time within which a server must be ready. The first startup creates a database.
const STARTED_WITHIN: Duration = Duration::from_secs(120);
const ENDED_WITHIN: Duration = Duration::from_secs(30);
/// How long a server must have been idle before its CPU time is read. Longer than the intervals at which usage is stored
/// and spans are sent.
const IDLE_FOR: Duration = Duration::from_millis(600);
/// The CPU time that an idle server and its PostgreSQL may use in this time.
const IDLE_CPU_MAX: Duration = Duration::from_millis(30);
/// How long to measure the CPU time of an idle server.
const IDLE_MEASURED_FOR: Duration = Duration::from_secs(3);
const IDLE_WITHIN: Duration = Duration::from_secs(60);
const SUSPENDED_WITHIN: Duration = Duration::from_secs(10);

/// The cores for the servers and for the load.
#[derive(Clone, Copy)]
pub(crate) struct Cores {
    pub(crate) servers: usize,
    pub(crate) load: usize,
}

impl Cores {
    /// Selects two cores. Returns `None` if there are fewer than two, or if the cores cannot be determined.
    pub(crate) fn pick() -> Option<Self> {
        let usable = sched_getaffinity(Pid::from_raw(0)).ok()?;
        let mut usable = (0..CpuSet::count()).filter(|core| usable.is_set(*core).unwrap_or(false));
        let load = usable.next()?;
        Some(Self {
            servers: usable.next_back()?,
            load,
        })
    }

    /// Runs `start` on the servers' core, which child processes inherit.
    pub(crate) fn starting<T>(it: Option<Self>, start: impl FnOnce() -> Result<T>) -> Result<T> {
        if let Some(cores) = it {
            stay_on(cores.servers)?;
        }
        let started = start();
        if let Some(cores) = it {
            stay_on(cores.load)?;
        }
        started
    }
}

/// Pins the calling thread to this core.
pub(crate) fn stay_on(core: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(core)?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("cannot stay on core {core}"))
}

pub(crate) struct Server {
    child: Child,
    pub(crate) addr: SocketAddr,
    /// The address of the listener for metrics. `None` for a bare server.
    pub(crate) metrics_addr: Option<SocketAddr>,
    /// The address of the gRPC listener, if the settings turn it on.
    pub(crate) grpc_addr: Option<SocketAddr>,
    /// The log file of the `quota` process. `None` for a bare server.
    log: Option<File>,
    /// The server's data directory, which is removed at the end.
    data: Option<TempDir>,
    /// The share of a core that the server uses while it is idle, once measured.
    idle_share: OnceLock<f64>,
}

impl Server {
    /// Starts the plain server of this name, which is a part of this program.
    pub(crate) fn bare(name: &str, cores: Option<Cores>) -> Result<Self> {
        let mut child = Cores::starting(cores, || {
            let mut command = Command::new(std::env::current_exe()?);
            command.arg(name).stdout(Stdio::piped());
            Ok(command.spawn()?)
        })?;
        let mut line = String::new();
        let out = child.stdout.take().context("no pipe")?;
        let read = BufReader::new(out).read_line(&mut line);
        let addr = line.trim().strip_prefix("listening on ").map(str::parse);
        let mut server = Self {
            child,
            addr: SocketAddr::from(([127, 0, 0, 1], 0)),
            metrics_addr: None,
            grpc_addr: None,
            log: None,
            data: None,
            idle_share: OnceLock::new(),
        };
        read?;
        server.addr = addr.with_context(|| format!("the plain {name} server did not start"))??;
        Ok(server)
    }

    /// Starts `quota serve` with default settings: a private PostgreSQL in a temporary directory, with the log in the
    /// same directory. `settings` are additional environment variables.
    pub(crate) fn quota(
        binary: &Path,
        directives: &str,
        cores: Option<Cores>,
        settings: &[(&str, String)],
    ) -> Result<Self> {
        let (mut command, data) = serve(binary)?;
        let path = data.path().join("log");
        let log = File::options().create(true).append(true).open(&path)?;
        command
            .env("RUST_LOG", directives)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?);
        for (name, value) in settings {
            command.env(name, value);
        }
        let child = Cores::starting(cores, || {
            command
                .spawn()
                .with_context(|| format!("cannot run {}", binary.display()))
        })?;
        let mut server = Self {
            child,
            addr: SocketAddr::from(([127, 0, 0, 1], 0)),
            metrics_addr: None,
            grpc_addr: None,
            log: Some(log),
            data: Some(data),
            idle_share: OnceLock::new(),
        };
        let line = server.ready(&path)?;
        let address = |name: &str| line[name].as_str().map(str::parse).transpose();
        server.addr = address("listen")?.context("there is no address in the log")?;
        server.metrics_addr = address("metrics_listen")?;
        server.grpc_addr = address("grpc_listen")?;
        Ok(server)
    }

    /// Returns the log line that reports readiness. The line contains the addresses.
    fn ready(&mut self, log: &Path) -> Result<Value> {
        let deadline = Instant::now() + STARTED_WITHIN;
        loop {
            let text = fs::read_to_string(log)?;
            if let Some(line) = ready_line(&text) {
                return Ok(line);
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("quota exited with {status} instead of starting:\n{text}");
            }
            if Instant::now() > deadline {
                bail!("quota was not ready within {STARTED_WITHIN:?}:\n{text}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Returns the size of the log, and truncates it.
    pub(crate) fn empty_log(&self) -> Result<u64> {
        let Some(log) = &self.log else { return Ok(0) };
        let bytes = log.metadata()?.len();
        log.set_len(0)?;
        Ok(bytes)
    }

    /// Returns whether the server has a private PostgreSQL.
    pub(crate) const fn has_database(&self) -> bool {
        self.data.is_some()
    }

    /// Turns autovacuum off in the server's private PostgreSQL. If the kernel uses autogroups, each of its workers
    /// would otherwise start with normal priority.
    pub(crate) fn turn_off_autovacuum(&self) -> Result<()> {
        let file = self.database_folder()?.join("postgresql.auto.conf");
        File::options()
            .append(true)
            .open(&file)
            .and_then(|mut it| it.write_all(b"autovacuum = off\n"))
            .with_context(|| format!("cannot write {}", file.display()))?;
        kill(self.database()?.0, Signal::SIGHUP).context("cannot signal PostgreSQL")
    }

    /// Gives the processes of the server's private PostgreSQL the lowest priority, to approximate a
    /// deployment in which PostgreSQL runs on other cores.
    pub(crate) fn give_database_lowest_priority(&self) -> Result<()> {
        let (main, _) = self.database()?;
        make_idle(main)?;
        // If there are no autogroups, processes that PostgreSQL starts from now on inherit the priority.
        for pid in self.database()?.1 {
            let result = make_idle(pid);
            let has_ended = !Path::new(&format!("/proc/{pid}")).exists();
            if !has_ended {
                result?;
            }
        }
        Ok(())
    }

    /// Suspends the server and its private PostgreSQL, if it has one, until the result is dropped.
    pub(crate) fn suspend(&self) -> Result<Suspended> {
        let mut suspended = Suspended::begin()?;
        suspended.add(&[self.pid()?])?;
        if self.has_database() {
            // PostgreSQL's main process is suspended before its children are listed, so that it cannot start others or
            // reap those that have ended.
            suspended.add(&[self.database()?.0])?;
            suspended.add(&self.database()?.1)?;
        }
        Ok(suspended)
    }

    /// Returns the user and system time of all processes of the server's private PostgreSQL so far, including processes
    /// that have ended.
    pub(crate) fn database_cpu(&self) -> Result<Duration> {
        let (main, children) = self.database()?;
        let stat = fs::read_to_string(format!("/proc/{main}/stat"))?;
        let ended = ticks_of_ended_children(&stat).context("/proc has another format")?;
        let per_second =
            sysconf(SysconfVar::CLK_TCK)?.context("the length of a tick is unknown")?;
        let ended = Duration::from_secs(ended) / u32::try_from(per_second)?;
        // A process that ends at this moment is not counted.
        let running = children.into_iter().filter_map(|pid| cpu(pid).ok());
        Ok(cpu(main)? + ended + running.sum::<Duration>())
    }

    fn database_folder(&self) -> Result<PathBuf> {
        let data = self.data.as_ref();
        let data = data.context("a bare server has no database")?;
        Ok(data.path().join("postgres"))
    }

    /// Returns the processes of the server's private PostgreSQL: the main process, and its children.
    fn database(&self) -> Result<(Pid, Vec<Pid>)> {
        let file = self.database_folder()?.join("postmaster.pid");
        let text =
            fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let main = text.lines().next().unwrap_or_default();
        let children = fs::read_to_string(format!("/proc/{main}/task/{main}/children"))?;
        let pid = |text: &str| Ok(Pid::from_raw(text.parse()?));
        let children = children
            .split_whitespace()
            .map(pid)
            .collect::<Result<_>>()?;
        Ok((pid(main)?, children))
    }

    pub(crate) fn pid(&self) -> Result<Pid> {
        Ok(Pid::from_raw(i32::try_from(self.child.id())?))
    }

    /// Returns the user and system time of all threads of the process so far.
    pub(crate) fn cpu(&self) -> Result<Duration> {
        cpu(self.pid()?)
    }

    /// Waits until the server and its private PostgreSQL have done almost all work that earlier requests caused, such as
    /// storing usage. Then returns the same as [`Self::cpu`], but without the time that an idle server would have used
    /// while this function waited.
    pub(crate) fn cpu_when_idle(&self) -> Result<Duration> {
        self.cpu_when_stored(0)
    }

    /// Works like [`Self::cpu_when_idle`], but also waits until [`Self::decisions_accounted_for`] is at least
    /// `decisions`, unless that is 0. The reported backlog is updated only when the server tries to store usage, so it can
    /// be 0 although newer usage has not been stored.
    pub(crate) fn cpu_when_stored(&self, decisions: u64) -> Result<Duration> {
        let began = Instant::now();
        loop {
            let all = self.cpu_with_database()?;
            std::thread::sleep(IDLE_FOR);
            // If a process of PostgreSQL has ended in between, less time can be measured than before.
            let used = self.cpu_with_database()?.checked_sub(all);
            if used.is_some_and(|it| it <= IDLE_CPU_MAX) {
                let (own, waited) = (self.cpu()?, began.elapsed());
                // A server whose commit waits for the disk uses no CPU time either.
                if self.metric("quota_usage_backlog_records")? == 0
                    && (decisions == 0 || self.decisions_accounted_for()? >= decisions)
                {
                    return Ok(own.saturating_sub(waited.mul_f64(self.idle_share()?)));
                }
            }
            ensure!(
                began.elapsed() < IDLE_WITHIN,
                "the server was not idle, or had not stored all usage, within {IDLE_WITHIN:?}"
            );
        }
    }

    /// Returns the share of a core that the server uses while it is idle. The first call measures it, and the server must
    /// be idle then.
    fn idle_share(&self) -> Result<f64> {
        if let Some(share) = self.idle_share.get() {
            return Ok(*share);
        }
        let (began, cpu) = (Instant::now(), self.cpu()?);
        std::thread::sleep(IDLE_MEASURED_FOR);
        let cpu = self.cpu()?.saturating_sub(cpu);
        let share = cpu.div_duration_f64(began.elapsed());
        Ok(*self.idle_share.get_or_init(|| share))
    }

    /// Returns the value of one of the server's metrics, or 0 for a bare server.
    pub(crate) fn metric(&self, name: &str) -> Result<u64> {
        let Some(metrics) = self.metrics_addr else {
            return Ok(0);
        };
        let runtime = Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(counted(metrics, name))
    }

    /// Returns the number of decisions so far whose usage has been stored in PostgreSQL or will not be recorded. Always 0
    /// for a bare server.
    pub(crate) fn decisions_accounted_for(&self) -> Result<u64> {
        let stored = self.metric("quota_usage_records_shipped_total")?;
        // While the backlog is large, some denials are counted but not recorded.
        Ok(stored + self.metric("quota_usage_denials_unrecorded_total")?)
    }

    fn cpu_with_database(&self) -> Result<Duration> {
        let database = match self.data {
            Some(_) => self.database_cpu()?,
            None => Duration::ZERO,
        };
        Ok(self.cpu()? + database)
    }
}

/// Processes that are suspended until this value is dropped.
///
/// Until then, SIGINT, SIGTERM, SIGHUP and SIGQUIT are blocked on the current thread. If they ended this program,
/// PostgreSQL would remain suspended, and could not shut down. Drop this value on the thread that created it, because the
/// signal mask belongs to the thread.
#[must_use]
pub(crate) struct Suspended {
    pids: Vec<Pid>,
    /// The thread's signal mask before processes were suspended.
    previous_mask: SigSet,
}

/// The signals that are blocked while processes are suspended.
const BLOCKED_SIGNALS: [Signal; 4] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
];

impl Suspended {
    fn begin() -> Result<Self> {
        let blocked: SigSet = BLOCKED_SIGNALS.into_iter().collect();
        Ok(Self {
            pids: Vec::new(),
            previous_mask: blocked.thread_swap_mask(SigmaskHow::SIG_BLOCK)?,
        })
    }

    /// Suspends processes, and waits until their threads have stopped. Does not wait for threads in uninterruptible sleep,
    /// such as disk I/O, because that can take long. These threads stop before they return from the kernel.
    fn add(&mut self, pids: &[Pid]) -> Result<()> {
        for pid in pids {
            kill(*pid, Signal::SIGSTOP).context("cannot suspend a process")?;
            self.pids.push(*pid);
        }
        let began = Instant::now();
        for pid in pids {
            while has_active_thread(*pid) {
                ensure!(
                    began.elapsed() < SUSPENDED_WITHIN,
                    "a process was not suspended within {SUSPENDED_WITHIN:?}"
                );
            }
        }
        Ok(())
    }
}

impl Drop for Suspended {
    fn drop(&mut self) {
        for pid in self.pids.iter().rev() {
            let _ = kill(*pid, Signal::SIGCONT);
        }
        let _ = self.previous_mask.thread_set_mask();
    }
}

/// Returns whether a process has a thread that is runnable or in interruptible sleep, and so has not stopped.
fn has_active_thread(pid: Pid) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return false;
    };
    threads.flatten().any(|thread| {
        let stat = fs::read_to_string(thread.path().join("stat"));
        stat.is_ok_and(|stat| is_active(&stat))
    })
}

/// Returns whether a thread is runnable or in interruptible sleep, from its file `stat` in `/proc`.
fn is_active(stat: &str) -> bool {
    // The name of the thread may contain spaces and parentheses.
    let fields = stat.rsplit_once(')').map_or("", |it| it.1);
    fields.trim_start().starts_with(['R', 'S'])
}

/// Returns the user and system time of all threads of a process so far.
pub(crate) fn cpu(pid: Pid) -> Result<Duration> {
    Ok(clock_getcpuclockid(pid)?.now()?.into())
}

/// Gives a process the lowest priority, even if the kernel shares CPU time among sessions (autogroups). An autogroup's
/// priority applies to all of its processes. It is not changed for this program's own autogroup, which contains the
/// servers and PostgreSQL's main process. PostgreSQL's other processes have sessions of their own, so with autogroups,
/// those that start later have normal priority.
fn make_idle(pid: Pid) -> Result<()> {
    let file = format!("/proc/{pid}/autogroup");
    if let (Ok(own), Ok(its)) = (
        fs::read_to_string("/proc/self/autogroup"),
        fs::read_to_string(&file),
    ) && autogroup(&its).is_some_and(|it| Some(it) != autogroup(&own))
    {
        // Linux lets a user without privileges change only one autogroup per 100 ms.
        while let Err(error) = fs::write(&file, "19") {
            ensure!(error.kind() == std::io::ErrorKind::WouldBlock, error);
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    let output = Command::new("chrt")
        .args(["--idle", "--pid", "0", &pid.to_string()])
        .output()
        .context("cannot run chrt (from util-linux)")?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "chrt failed: {error}");
    Ok(())
}

/// Returns the autogroup's name from the content of `/proc/<pid>/autogroup`, such as `/autogroup-7 nice 0`.
fn autogroup(text: &str) -> Option<&str> {
    text.split_whitespace().next()
}

/// Returns the user and system time of a process's children that have ended, from its file `stat` in `/proc`.
fn ticks_of_ended_children(stat: &str) -> Option<u64> {
    // The name of the program may contain spaces and parentheses.
    let (_, fields) = stat.rsplit_once(')')?;
    let times = fields.split_whitespace().skip(13).take(2);
    let times = times
        .map(str::parse)
        .collect::<Result<Vec<u64>, _>>()
        .ok()?;
    (times.len() == 2).then(|| times.iter().sum())
}

/// Returns the command `quota serve`, with default settings and on free ports, and its new data directory.
pub(crate) fn serve(binary: &Path) -> Result<(Command, TempDir)> {
    let data = tempfile::Builder::new()
        .prefix("quota-bench-")
        .permissions(fs::Permissions::from_mode(0o711))
        .tempdir()?;
    let mut command = Command::new(binary);
    without_settings(&mut command);
    command
        .arg("serve")
        .env("QUOTA_LISTEN", "127.0.0.1:0")
        .env("QUOTA_METRICS_LISTEN", "127.0.0.1:0")
        .env("QUOTA_DATA_DIR", data.path());
    Ok((command, data))
}

/// Removes Quota's settings from the environment of a command, so that they do not affect the measured servers. Also
/// removes other variables that begin with `QUOTA_`, with which a server does not start.
pub(crate) fn without_settings(command: &mut Command) {
    for name in variables() {
        command.env_remove(name);
    }
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|it| it.starts_with("QUOTA_")) {
            command.env_remove(name);
        }
    }
}

/// Finds the log line with the addresses on which `quota` listens.
pub(crate) fn ready_line(log: &str) -> Option<Value> {
    log.lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find(|line| line["message"] == "ready")
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let deadline = Instant::now() + ENDED_WITHIN;
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_ended_children_follow_its_own_times() {
        let stat = "7 (a) S b) S 1 7 7 0 -1 4194560 10 20 0 0 31 32 41 42 20 0 1 0 99 1000 50";
        assert_eq!(ticks_of_ended_children(stat), Some(83));
        assert_eq!(ticks_of_ended_children("7 (a) S 1 7 7"), None);
    }

    #[test]
    fn processes_are_suspended_and_signals_blocked_until_the_drop() {
        let mut child = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut answer = || {
            let mut line = String::new();
            output.read_line(&mut line).unwrap();
            line
        };
        input.write_all(b"one\n").unwrap();
        assert_eq!(answer(), "one\n");
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        let before = SigSet::thread_get_mask().unwrap();
        let mut suspended = Suspended::begin().unwrap();
        suspended.add(&[pid]).unwrap();
        assert!(!has_active_thread(pid));
        let blocked = SigSet::thread_get_mask().unwrap();
        assert!(BLOCKED_SIGNALS.into_iter().all(|it| blocked.contains(it)));
        // Input does not wake the process.
        input.write_all(b"two\n").unwrap();
        assert!(!has_active_thread(pid));
        drop(suspended);
        assert_eq!(answer(), "two\n");
        assert_eq!(SigSet::thread_get_mask().unwrap(), before);
        drop(input);
        assert!(child.wait().unwrap().success());
    }

    #[test]
    fn thread_state_is_read_after_a_name_with_parentheses() {
        for (state, expected) in [("S", true), ("R", true), ("T", false), ("Z", false)] {
            let stat = format!("7 (a) R b) {state} 1 7 7 0");
            assert_eq!(is_active(&stat), expected, "{stat}");
        }
    }

    #[test]
    fn the_name_of_an_autogroup_does_not_include_its_priority() {
        assert_eq!(autogroup("/autogroup-7 nice 0\n"), Some("/autogroup-7"));
        assert_eq!(autogroup("/autogroup-7 nice 19\n"), Some("/autogroup-7"));
        assert_eq!(autogroup(""), None);
    }

    #[test]
    fn measured_server_gets_no_settings_from_the_environment() {
        let mut command = Command::new("quota");
        without_settings(&mut command);
        let removed: Vec<_> = command
            .get_envs()
            .filter(|(_, value)| value.is_none())
            .filter_map(|(name, _)| name.to_str())
            .collect();
        for name in [
            "DATABASE_URL",
            "REDIS_URL_FILE",
            "STRIPE_SECRET_KEY",
            "STRIPE_WEBHOOK_SECRET_FILE",
            "SMTP_URL",
            "ALLOWED_ORIGINS",
            "OTEL_EXPORTER_OTLP_ENDPOINT",
            "QUOTA_LEASE_TTL",
        ] {
            assert!(removed.contains(&name), "{name}: {removed:?}");
        }
        assert!(!removed.contains(&"PATH"));
    }
}
