//! The container engine: either an engine that is already running, or a private engine that stops with this program.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

const STARTED_WITHIN: Duration = Duration::from_secs(30);

/// A container engine and its client.
#[derive(Debug)]
pub struct Engine {
    client: PathBuf,
    compose: PathBuf,
    host: Option<String>,
    daemon: Option<Child>,
}

impl Engine {
    /// Returns the engine configured in the environment. If there is none, starts one with its data in `folder`, which
    /// keeps images for the next run.
    pub fn start(folder: &Path) -> Result<Self> {
        // Debian's client supports BuildKit by default; newer clients in `PATH` require a plugin for BuildKit.
        let client = ["/usr/bin/docker", "/usr/local/bin/docker"].map(PathBuf::from);
        let client = client.into_iter().find(|path| path.exists());
        let mut engine = Self {
            client: client.context("docker is not installed")?,
            compose: "docker-compose".into(),
            host: None,
            daemon: None,
        };
        if engine.responds() {
            return Ok(engine);
        }
        fs::create_dir_all(folder)?;
        let socket = folder.join("docker.sock");
        let log = fs::File::create(folder.join("docker.log"))?;
        let mut daemon = Command::new("dockerd");
        daemon
            .arg("--data-root")
            .arg(folder.join("data"))
            .arg("--exec-root")
            .arg(folder.join("exec"))
            .arg("--pidfile")
            .arg(folder.join("docker.pid"))
            .arg("--host")
            .arg(format!("unix://{}", socket.display()))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        engine.host = Some(format!("unix://{}", socket.display()));
        engine.daemon = Some(daemon.spawn().context("cannot run dockerd")?);
        let began = Instant::now();
        while !engine.responds() {
            ensure!(
                began.elapsed() < STARTED_WITHIN,
                "dockerd does not start; see {}",
                folder.join("docker.log").display()
            );
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(engine)
    }

    fn responds(&self) -> bool {
        let status = self
            .docker(&["version"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        status.is_ok_and(|status| status.success())
    }

    /// Returns a command that runs a program. The command's environment makes the client use this engine, and has the
    /// client's directory in `PATH`.
    fn with_host(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env("DOCKER_BUILDKIT", "1").stdin(Stdio::null());
        if let Some(host) = &self.host {
            command.env("DOCKER_HOST", host);
        }
        if let (Some(folder), Some(path)) = (self.client.parent(), std::env::var_os("PATH")) {
            let mut folders = vec![folder.to_owned()];
            folders.extend(std::env::split_paths(&path));
            if let Ok(path) = std::env::join_paths(folders) {
                command.env("PATH", path);
            }
        }
        command
    }

    /// Returns a command that runs the client.
    pub fn docker(&self, arguments: &[&str]) -> Command {
        let mut command = self.with_host(&self.client);
        command.args(arguments);
        command
    }

    /// Returns a command that runs Compose.
    pub fn compose(&self) -> Command {
        self.with_host(&self.compose)
    }

    /// Returns a command that runs a program, such as a script, that itself calls the client.
    pub fn script(&self, program: &Path) -> Command {
        self.with_host(program)
    }

    pub fn has_image(&self, name: &str) -> bool {
        let status = self
            .docker(&["image", "inspect", name])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        status.is_ok_and(|status| status.success())
    }

    /// Runs the client and returns its output.
    pub fn read(&self, arguments: &[&str]) -> Result<String> {
        read(&mut self.docker(arguments))
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let Some(daemon) = &mut self.daemon else {
            return;
        };
        if let Ok(pid) = i32::try_from(daemon.id()) {
            let pid = nix::unistd::Pid::from_raw(pid);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        }
        let _ = daemon.wait();
    }
}

/// Runs a command. If the command fails, the error contains the command's output.
pub fn succeed(command: &mut Command) -> Result<()> {
    read(command).map(drop)
}

/// Runs a command and returns its output.
pub fn read(command: &mut Command) -> Result<String> {
    let shown = format!("{command:?}");
    let Output {
        status,
        stdout,
        stderr,
    } = command
        .output()
        .with_context(|| format!("cannot run {shown}"))?;
    if !status.success() {
        bail!(
            "{shown} failed ({status}):\n{}{}",
            String::from_utf8_lossy(&stdout),
            String::from_utf8_lossy(&stderr)
        );
    }
    Ok(String::from_utf8_lossy(&stdout).into_owned())
}
