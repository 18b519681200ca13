//! The PostgreSQL process: starts it under the guard script, and supervises, restarts and stops it.

use std::{
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    io::{Read as _, Seek as _, SeekFrom},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    process::{Child, ChildStdin},
    sync::watch,
    time::{Instant, sleep, timeout},
};

use super::{
    address::{connect, url},
    error::EmbeddedError,
    place::Place,
};

/// The maximum duration of a startup, including recovery after a crash. Recovery replays at most about one
/// `max_wal_size` of WAL.
const START_LIMIT: Duration = Duration::from_mins(2);
/// The maximum duration of a fast shutdown, which ends sessions and writes a checkpoint.
const FAST_STOP_LIMIT: Duration = Duration::from_secs(20);
/// The maximum duration of an immediate shutdown.
const HARD_STOP_LIMIT: Duration = Duration::from_secs(5);

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A crash after this uptime resets the backoff.
const SETTLED: Duration = Duration::from_mins(1);

/// If the log is longer than this size, it is rotated at startup.
const LOG_LIMIT: u64 = 10 * 1024 * 1024;

/// The guard script, which runs PostgreSQL, and the other end of the pipe that it reads from. The pipe is separate
/// because waiting for a [`Child`] closes its standard input, which would make the guard stop PostgreSQL.
#[derive(Debug)]
pub(super) struct Guarded {
    pub(super) child: Child,
    pub(super) pipe: Option<ChildStdin>,
    /// Where this PostgreSQL instance's output begins in the log.
    pub(super) log_begin: u64,
}

#[derive(Debug)]
pub(super) struct Cluster {
    pub(super) program: PathBuf,
    pub(super) arguments: Vec<String>,
    pub(super) place: Place,
    pub(super) socket_dir: PathBuf,
    pub(super) log: PathBuf,
    /// Locked until PostgreSQL has exited, so that the next server does not find PostgreSQL still shutting down. If
    /// this process is killed, the lock is released earlier, and the next server waits for the
    /// [orphan](Self::stop_orphan).
    pub(super) _lock: File,
}

impl Cluster {
    /// Stops an [orphan](Self::stop_orphan) if there is one, and starts PostgreSQL, which then takes a while to become
    /// [`ready`](Self::ready).
    pub(super) async fn launch(&self) -> Result<Guarded, EmbeddedError> {
        self.stop_orphan().await?;
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&self.log)
            .map_err(EmbeddedError::file("cannot open", &self.log))?;
        let log_begin = log
            .metadata()
            .map_err(EmbeddedError::file("cannot inspect", &self.log))?
            .len();
        let stdout = log
            .try_clone()
            .map_err(EmbeddedError::file("cannot open", &self.log))?;
        let mut child = self
            .place
            .guarded(&self.program)
            .args(&self.arguments)
            .current_dir(&self.place.cluster)
            .stdout(stdout)
            .stderr(log)
            .spawn()
            .map_err(|source| EmbeddedError::Run {
                program: self.program.clone(),
                source,
            })?;
        Ok(Guarded {
            pipe: child.stdin.take(),
            child,
            log_begin,
        })
    }

    /// Waits until PostgreSQL accepts connections.
    pub(super) async fn ready(&self, postgres: &mut Guarded) -> Result<(), EmbeddedError> {
        let url = url(&self.socket_dir, "postgres");
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let Err(refused) = connect(&url).await else {
                return Ok(());
            };
            if let Ok(Some(status)) = postgres.child.try_wait() {
                return Err(EmbeddedError::Ended {
                    status,
                    tail: tail(&self.log, postgres.log_begin),
                    log: self.log.clone(),
                });
            }
            if Instant::now() > deadline {
                return Err(EmbeddedError::Slow {
                    limit: START_LIMIT,
                    log: self.log.clone(),
                    source: refused,
                });
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Stops a PostgreSQL instance that an earlier server left running on this cluster, and waits until that instance
    /// has exited.
    ///
    /// This process holds the lock of the data directory, so any PostgreSQL instance running there is an orphan. An
    /// orphan is recognized by its working directory, because PostgreSQL changes to the directory of its cluster. The
    /// PID in PostgreSQL's PID file would not be sufficient, because by now it may belong to a different process. If
    /// `/proc` does not exist, only PostgreSQL's own check of its PID file protects the cluster.
    pub(super) async fn stop_orphan(&self) -> Result<(), EmbeddedError> {
        let cluster = fs::canonicalize(&self.place.cluster)
            .map_err(EmbeddedError::file("cannot inspect", &self.place.cluster))?;
        let pid_file = cluster.join("postmaster.pid");
        if !running_in(&cluster).is_empty() {
            tracing::info!(cluster = %cluster.display(), "stopping an orphaned PostgreSQL");
        }
        if !end_running(&cluster, Signal::SIGINT, FAST_STOP_LIMIT).await {
            end_running(&cluster, Signal::SIGQUIT, HARD_STOP_LIMIT).await;
        }
        if let Some(&pid) = running_in(&cluster).first() {
            return Err(EmbeddedError::Orphan { pid, cluster });
        }
        // PostgreSQL does not start if the PID in its file belongs to a running process of the same user. No process of
        // this cluster is running, so the file is stale.
        if Path::new("/proc/self/cwd").exists() && pid_file.exists() {
            fs::remove_file(&pid_file).map_err(EmbeddedError::file("cannot remove", &pid_file))?;
        }
        Ok(())
    }

    /// Keeps PostgreSQL running until `stopped` changes or its sender is dropped, and then stops PostgreSQL.
    pub(super) async fn keep(self, mut postgres: Guarded, mut stopped: watch::Receiver<bool>) {
        let mut pause = FIRST_PAUSE;
        loop {
            let since = Instant::now();
            let status = tokio::select! {
                status = postgres.child.wait() => status,
                _ = stopped.changed() => {
                    self.stop(postgres).await;
                    return;
                }
            };
            if since.elapsed() > SETTLED {
                pause = FIRST_PAUSE;
            }
            let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
            tracing::error!(
                status,
                log = %self.log.display(),
                "the private PostgreSQL exited; restarting it"
            );
            postgres = loop {
                let paused = async {
                    sleep(pause).await;
                    self.launch().await
                };
                let launched = tokio::select! {
                    launched = paused => launched,
                    _ = stopped.changed() => return,
                };
                pause = (pause * 2).min(LONGEST_PAUSE);
                let error = match launched {
                    Ok(mut postgres) => {
                        let ready = tokio::select! {
                            ready = self.ready(&mut postgres) => ready,
                            _ = stopped.changed() => {
                                self.stop(postgres).await;
                                return;
                            }
                        };
                        match ready {
                            Ok(()) => break postgres,
                            Err(error) => {
                                self.stop(postgres).await;
                                error
                            }
                        }
                    }
                    Err(error) => error,
                };
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "cannot start the private PostgreSQL, retrying"
                );
            };
            tracing::info!("the private PostgreSQL is running again");
        }
    }

    /// Requests a fast shutdown, and then an immediate shutdown if the fast shutdown takes too long.
    pub(super) async fn stop(
        &self,
        Guarded {
            mut child, pipe, ..
        }: Guarded,
    ) {
        drop(pipe);
        if timeout(FAST_STOP_LIMIT, child.wait()).await.is_ok() {
            return;
        }
        tracing::warn!(
            "the private PostgreSQL is taking too long to stop; requesting an immediate shutdown"
        );
        if let Ok(cluster) = fs::canonicalize(&self.place.cluster) {
            end_running(&cluster, Signal::SIGQUIT, HARD_STOP_LIMIT).await;
        }
        if timeout(HARD_STOP_LIMIT, child.wait()).await.is_err() {
            tracing::error!("the private PostgreSQL did not stop");
        }
    }
}

/// Rotates a long log, overwriting the previously rotated one.
pub(super) fn rotate(log: &Path) -> Result<(), EmbeddedError> {
    if fs::metadata(log).is_ok_and(|metadata| metadata.len() > LOG_LIMIT) {
        fs::rename(log, log.with_extension("log.1"))
            .map_err(EmbeddedError::file("cannot rename", log))?;
    }
    Ok(())
}

/// Returns the last lines of the log after `begin`. Reads at most the last MiB.
fn tail(log: &Path, begin: u64) -> String {
    const LINES: usize = 10;
    const MAX: u64 = 1024 * 1024;
    let mut text = Vec::new();
    let read = File::open(log).and_then(|mut file| {
        let end = file.metadata()?.len();
        file.seek(SeekFrom::Start(begin.max(end.saturating_sub(MAX))))?;
        file.take(MAX).read_to_end(&mut text)
    });
    if let Err(error) = read {
        return format!("(unreadable: {error})");
    }
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

/// Returns the PostgreSQL processes whose working directory is `dir`, except zombies. Returns an empty list if `/proc`
/// does not exist.
fn running_in(dir: &Path) -> Vec<i32> {
    let own = std::process::id().cast_signed();
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let cwd = fs::read_link(entry.path().join("cwd")).ok()?;
            (pid != own && cwd == dir && is_postgres(&entry.path())).then_some(pid)
        })
        .collect()
}

/// Signals the cluster's postmaster, and waits until all of the cluster's processes have exited. Returns `false` if any
/// are still running after `limit`. Only the postmaster is signaled, because sessions notice on their own when their
/// postmaster has exited.
async fn end_running(cluster: &Path, signal: Signal, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    let mut signalled = None;
    loop {
        let running = running_in(cluster);
        if running.is_empty() {
            return true;
        }
        // A postmaster that is starting may not have written its PID file yet, so the file is read in each round.
        let postmaster = fs::read_to_string(cluster.join("postmaster.pid"))
            .ok()
            .and_then(|text| text.lines().next()?.trim().parse::<i32>().ok())
            .filter(|pid| running.contains(pid));
        if let Some(pid) = postmaster.filter(|_| postmaster != signalled) {
            let _ = kill(Pid::from_raw(pid), signal);
            signalled = postmaster;
        }
        if Instant::now() > deadline {
            return false;
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// Returns whether a process is PostgreSQL and not, for example, an operator's shell in the same working directory.
fn is_postgres(process: &Path) -> bool {
    fs::read_link(process.join("exe"))
        .is_ok_and(|exe| exe.file_name() == Some(OsStr::new("postgres")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tail_is_the_end_of_a_log_of_any_length() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("postgres.log");
        let earlier = "earlier\n";
        for lines in [3_usize, 10, 200_000] {
            let text = (0..lines).map(|n| format!("line {n}")).collect::<Vec<_>>();
            fs::write(&log, format!("{earlier}{}\n", text.join("\n"))).unwrap();
            let last = &text[lines.saturating_sub(10)..];
            assert_eq!(tail(&log, earlier.len() as u64), last.join("\n"));
        }
    }
}
