//! What is around a desktop app: a display, a session bus, a keychain that is unlocked, a home.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use quota_testkit::Process;
use tempfile::TempDir;

pub const WIDTH: u32 = 1280;
pub const HEIGHT: u32 = 900;

/// Ends with the value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub struct World {
    pub folder: TempDir,
    display: String,
    bus: String,
    /// Ended in this order.
    running: Vec<Running>,
}

impl World {
    pub fn new(with_keychain: bool) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("quota-desktop-")
            .tempdir()?;
        for name in ["data", "config", "cache", "runtime", "home"] {
            let path = folder.path().join(name);
            fs::create_dir(&path)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o700))?;
        }
        let screen = format!("{WIDTH}x{HEIGHT}x24");
        let mut command = Command::new("Xvfb");
        command.args([
            "-displayfd",
            "1",
            "-nolisten",
            "tcp",
            "-screen",
            "0",
            &screen,
        ]);
        let (display, number) = telling(&mut command).context("Xvfb")?;
        let mut command = Command::new("dbus-daemon");
        command.args(["--session", "--nofork", "--nopidfile", "--print-address=1"]);
        let address = format!(
            "--address=unix:path={}",
            folder.path().join("runtime/bus").display()
        );
        command.arg(address);
        surroundings(&mut command, folder.path());
        let (bus, bus_address) = telling(&mut command).context("dbus-daemon")?;
        let mut world = Self {
            folder,
            display: format!(":{number}"),
            bus: bus_address,
            running: vec![bus, display],
        };
        if with_keychain {
            let mut command = world.command(Path::new("gnome-keyring-daemon"));
            command.args(["--unlock", "--foreground", "--components=secrets"]);
            let mut child = command
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .context("gnome-keyring-daemon")?;
            let mut password = child.stdin.take().context("no pipe")?;
            password.write_all(b"a password\n")?;
            drop(password);
            world.running.insert(0, Running(child));
        }
        Ok(world)
    }

    /// A program in this world.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        surroundings(&mut command, self.folder.path());
        command
            .env("DISPLAY", &self.display)
            .env("DBUS_SESSION_BUS_ADDRESS", &self.bus)
            .env("GDK_BACKEND", "x11")
            .env("NO_AT_BRIDGE", "1");
        command
    }

    /// What another process of ours prints, in this world.
    pub fn ours(&self, arguments: &[&str]) -> Result<String> {
        let output = self
            .command(&std::env::current_exe()?)
            .args(arguments)
            .stdin(Stdio::null())
            .output()?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }

    /// The token in the keychain; none is an error.
    pub fn token(&self, server: &str) -> Result<String> {
        self.ours(&["token", server])
    }

    pub fn start(&self, command: &Command, log: &str) -> Result<Process> {
        Ok(Process::start(command, &self.folder.path().join(log))?)
    }

    /// Where the app keeps what is its own.
    pub fn data(&self) -> PathBuf {
        self.folder.path().join("data/rs.quota.desktop")
    }

    /// All lines of the app's log files.
    pub fn log(&self) -> String {
        let files = fs::read_dir(self.data().join("logs")).into_iter().flatten();
        files
            .flatten()
            .filter_map(|it| fs::read_to_string(it.path()).ok())
            .collect()
    }
}

fn surroundings(command: &mut Command, folder: &Path) {
    command
        .env_clear()
        .envs(
            ["PATH", "LANG", "XDG_DATA_DIRS"]
                .into_iter()
                .filter_map(variable),
        )
        .env("HOME", folder.join("home"))
        .env("XDG_DATA_HOME", folder.join("data"))
        .env("XDG_CONFIG_HOME", folder.join("config"))
        .env("XDG_CACHE_HOME", folder.join("cache"))
        .env("XDG_RUNTIME_DIR", folder.join("runtime"));
}

#[expect(clippy::disallowed_methods, reason = "handed on as it is")]
fn variable(name: &'static str) -> Option<(&'static str, std::ffi::OsString)> {
    Some((name, std::env::var_os(name)?))
}

/// A process whose first line tells where it is.
fn telling(command: &mut Command) -> Result<(Running, String)> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let told = child.stdout.take().context("no pipe")?;
    let running = Running(child);
    let mut line = String::new();
    BufReader::new(told).read_line(&mut line)?;
    if line.trim().is_empty() {
        bail!("it ended before it told where it is");
    }
    Ok((running, line.trim().to_owned()))
}

/// Asks until there is an answer.
pub async fn until<T>(
    what: &str,
    patience: Duration,
    mut ask: impl AsyncFnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + patience;
    let mut last = None;
    loop {
        match ask().await {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => {}
            Err(error) => last = Some(error),
        }
        if Instant::now() > deadline {
            return Err(last.unwrap_or_else(|| anyhow::anyhow!("it did not come in time")))
                .context(what.to_owned());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
