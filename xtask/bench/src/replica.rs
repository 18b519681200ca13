//! A `quota` server that always listens on the same address, and can be stopped, killed and restarted.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{sys::signal::Signal, unistd::Pid};
use quota_testkit::Process;
use serde_json::Value;

use crate::process::{ready_line, without_settings};

const STARTED_WITHIN: Duration = Duration::from_secs(60);
const STOPPED_WITHIN: Duration = Duration::from_secs(30);

pub(crate) struct Replica {
    /// The binary to use at the next start.
    pub(crate) quota: PathBuf,
    pub(crate) addr: SocketAddr,
    log: PathBuf,
    /// The length of the log before the last start.
    log_before: u64,
    settings: Vec<(&'static str, String)>,
    with_demo: bool,
    process: Option<Process>,
}

impl Replica {
    /// Creates a replica without starting the server. `settings` are environment variables.
    pub(crate) fn new(
        quota: &Path,
        addr: SocketAddr,
        log: PathBuf,
        settings: Vec<(&'static str, String)>,
    ) -> Self {
        Self {
            quota: quota.to_owned(),
            addr,
            log,
            log_before: 0,
            settings,
            with_demo: false,
            process: None,
        }
    }

    /// Makes the server create demo data at startup.
    pub(crate) fn with_demo(mut self) -> Self {
        self.with_demo = true;
        self
    }

    /// Starts the server, and waits until it is ready.
    pub(crate) async fn start(&mut self) -> Result<()> {
        self.spawn()?;
        self.ready().await
    }

    /// Starts the server without waiting for it.
    pub(crate) fn spawn(&mut self) -> Result<()> {
        let mut command = Command::new(&self.quota);
        without_settings(&mut command);
        command
            .arg("serve")
            .args(self.with_demo.then_some("--demo"))
            .env("QUOTA_LISTEN", self.addr.to_string())
            .envs(self.settings.iter().map(|(name, value)| (name, value)));
        self.log_before = fs::metadata(&self.log).map_or(0, |it| it.len());
        let process = Process::start(&command, &self.log)
            .with_context(|| format!("cannot run {}", self.quota.display()))?;
        self.process = Some(process);
        Ok(())
    }

    pub(crate) async fn ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + STARTED_WITHIN;
        loop {
            let text = self.log_since_start();
            if ready_line(&text).is_some() {
                return Ok(());
            }
            if let Some(status) = self.ended()? {
                bail!("quota exited with {status} instead of starting:\n{text}");
            }
            ensure!(Instant::now() < deadline, "quota is not ready:\n{text}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn log_since_start(&self) -> String {
        // The log file does not exist until shortly after the server starts.
        let bytes = fs::read(&self.log).unwrap_or_default();
        let start = usize::try_from(self.log_before).unwrap_or(0);
        String::from_utf8_lossy(bytes.get(start..).unwrap_or_default()).into_owned()
    }

    pub(crate) fn pid(&self) -> Option<Pid> {
        self.process.as_ref().map(Process::pid)
    }

    /// Returns the status with which the server exited, if it has exited.
    pub(crate) fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(match &mut self.process {
            Some(process) => process.ended()?,
            None => None,
        })
    }

    /// Returns the warnings and errors in the log.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        log.lines()
            .filter(|line| {
                serde_json::from_str::<Value>(line)
                    .is_ok_and(|it| it["level"] == "WARN" || it["level"] == "ERROR")
            })
            .map(str::to_owned)
            .collect()
    }

    /// Sends a signal, and returns how long the server took to exit.
    pub(crate) async fn end(&mut self, signal: Signal) -> Result<Duration> {
        let began = Instant::now();
        if let Some(mut process) = self.process.take() {
            process.signal(signal)?;
            let ended = process.ends_within(STOPPED_WITHIN).await?;
            let status = ended.context("a replica did not stop in time")?;
            ensure!(
                signal == Signal::SIGKILL || status.success(),
                "a replica exited with {status}:\n{}",
                tail(&self.log_since_start())
            );
        }
        Ok(began.elapsed())
    }
}

/// Returns the last lines of a log.
pub(crate) fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}
