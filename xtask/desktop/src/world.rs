//! A private environment for the desktop app: display, session bus, unlocked keychain and home directory.

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

use crate::x11::Display;

pub const WIDTH: u32 = 1280;
pub const HEIGHT: u32 = 900;

/// A process that is killed on drop.
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
    /// The processes, in the order in which they are killed on drop.
    running: Vec<Running>,
}

impl World {
    pub fn new(with_keychain: bool) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("quota-desktop-")
            .tempdir()?;
        for name in ["data", "config", "cache", "runtime", "home", "bin"] {
            let path = folder.path().join(name);
            fs::create_dir(&path)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o700))?;
        }
        // The session bus must not start this machine's notification service.
        let services = folder.path().join("runtime/dbus-1/services");
        fs::create_dir_all(&services)?;
        fs::write(
            services.join("org.freedesktop.Notifications.service"),
            "[D-BUS Service]\nName=org.freedesktop.Notifications\nExec=/bin/false\n",
        )?;
        // This script stands in for the system's browser.
        let browser = folder.path().join("bin/xdg-open");
        fs::write(&browser, "#!/bin/sh\necho \"$1\" >>\"$HOME/opened\"\n")?;
        fs::set_permissions(&browser, fs::Permissions::from_mode(0o755))?;
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
        let (display, number) = start_with_address(&mut command).context("Xvfb")?;
        let mut command = Command::new("dbus-daemon");
        command.args(["--session", "--nofork", "--nopidfile", "--print-address=1"]);
        let address = format!(
            "--address=unix:path={}",
            folder.path().join("runtime/bus").display()
        );
        command.arg(address);
        set_environment(&mut command, folder.path());
        let (bus, bus_address) = start_with_address(&mut command).context("dbus-daemon")?;
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
            password.write_all(b"password\n")?;
            drop(password);
            world.running.insert(0, Running(child));
        }
        Ok(world)
    }

    /// Returns a command that runs a program in this environment.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        set_environment(&mut command, self.folder.path());
        command
            .env("DISPLAY", &self.display)
            .env("DBUS_SESSION_BUS_ADDRESS", &self.bus)
            .env("GDK_BACKEND", "x11")
            .env("NO_AT_BRIDGE", "1");
        command
    }

    /// Runs this program again in this environment and returns its output.
    pub fn run_self(&self, arguments: &[&str]) -> Result<String> {
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

    /// Returns the refresh token in the keychain, or an error if there is none.
    pub fn token(&self, server: &str) -> Result<String> {
        self.run_self(&["token", server])
    }

    pub fn start(&self, command: &Command, log: &str) -> Result<Process> {
        Ok(Process::start(command, &self.folder.path().join(log))?)
    }

    /// Returns the addresses that the app has opened in the system's browser.
    pub fn opened(&self) -> Vec<String> {
        let opened = fs::read_to_string(self.folder.path().join("home/opened"));
        opened
            .unwrap_or_default()
            .lines()
            .map(str::to_owned)
            .collect()
    }

    /// Returns the address of the session bus.
    pub fn bus(&self) -> &str {
        &self.bus
    }

    /// Returns the display, for input that does not come from the page.
    pub fn display(&self) -> Result<Display> {
        Display::connect(&self.display)
    }

    /// Returns the app's data directory.
    pub fn data(&self) -> PathBuf {
        self.folder.path().join("data/rs.quota.desktop")
    }

    /// Returns the content of the app's log files.
    pub fn log(&self) -> String {
        let files = fs::read_dir(self.data().join("logs")).into_iter().flatten();
        files
            .flatten()
            .filter_map(|it| fs::read_to_string(it.path()).ok())
            .collect()
    }
}

fn set_environment(command: &mut Command, folder: &Path) {
    command
        .env_clear()
        .envs(["LANG", "XDG_DATA_DIRS"].into_iter().filter_map(variable))
        .env("PATH", search_path(folder))
        .env("HOME", folder.join("home"))
        .env("XDG_DATA_HOME", folder.join("data"))
        .env("XDG_CONFIG_HOME", folder.join("config"))
        .env("XDG_CACHE_HOME", folder.join("cache"))
        .env("XDG_RUNTIME_DIR", folder.join("runtime"));
}

/// Returns the value of `PATH`, with the stand-ins first.
fn search_path(folder: &Path) -> std::ffi::OsString {
    let mut path = folder.join("bin").into_os_string();
    if let Some((_, rest)) = variable("PATH") {
        path.push(":");
        path.push(rest);
    }
    path
}

#[expect(clippy::disallowed_methods, reason = "passed through unchanged")]
fn variable(name: &'static str) -> Option<(&'static str, std::ffi::OsString)> {
    Some((name, std::env::var_os(name)?))
}

/// Starts a process whose first line of output is its address.
fn start_with_address(command: &mut Command) -> Result<(Running, String)> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let output = child.stdout.take().context("no pipe")?;
    let running = Running(child);
    let mut line = String::new();
    BufReader::new(output).read_line(&mut line)?;
    if line.trim().is_empty() {
        bail!("the program exited before it printed its address");
    }
    Ok((running, line.trim().to_owned()))
}

/// Polls until there is a value. Fails if there is none before the timeout.
pub async fn until<T>(
    what: &str,
    timeout: Duration,
    mut poll: impl AsyncFnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + timeout;
    let mut last = None;
    loop {
        match poll().await {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => {}
            Err(error) => last = Some(error),
        }
        if Instant::now() > deadline {
            return Err(last.unwrap_or_else(|| anyhow::anyhow!("timed out")))
                .context(what.to_owned());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
