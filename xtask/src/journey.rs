//! End-to-end tests of the console, in a browser and in the desktop app, against the real server with its embedded
//! database.

use std::{
    ffi::OsStr,
    fs,
    io::Write as _,
    net::{TcpListener, TcpStream},
    os::unix::fs::DirBuilderExt as _,
    path::PathBuf,
    process::{Child, Command, ExitCode, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    cargo, console, desktop, machine, postgres::Throwaway, read, root, say, succeed, system,
};

/// The first startup creates a database.
const PATIENCE: Duration = Duration::from_secs(60);

/// Returns the programs that the tests require in addition to the server's programs.
pub(crate) fn needs() -> Vec<machine::Need> {
    let browser = [
        machine::CHROMIUM,
        machine::NODE,
        machine::NPM,
        machine::REDIS,
    ];
    [&browser[..], &desktop::JOURNEY_NEEDS].concat()
}

/// `cargo xtask journey`: builds the console and the server and runs only the end-to-end tests, or parts of those in
/// the browser.
pub(crate) fn alone(parts: &[String]) -> Result<ExitCode> {
    machine::install(&[&[machine::POSTGRES], &needs()[..]].concat())?;
    console::build()?;
    let has_passed = if parts.is_empty() {
        run()?
    } else {
        install_packages()?;
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        // The folder comes before the parts.
        let screenshots = std::env::var_os("QUOTA_SCREENSHOTS").unwrap_or_default();
        on_server(|address| browse(address, None, Some(&screenshots), &parts))?.success()
    };
    Ok(if has_passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// `cargo xtask pictures`: takes new pictures for desktop/pictures.
pub(crate) fn pictures() -> Result<ExitCode> {
    let needs = [
        machine::POSTGRES,
        machine::CHROMIUM,
        machine::NODE,
        machine::NPM,
    ];
    machine::install(&needs)?;
    console::build()?;
    install_packages()?;
    let folder = root().join("desktop/pictures");
    let status =
        on_server(|address| browse(address, None, Some(folder.as_os_str()), &["pictures"]))?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Runs the tests. Returns `false` if they failed and have reported why.
pub(crate) fn run() -> Result<bool> {
    install_packages()?;
    build_server()?;
    let server = Server::start(&[])?;
    say("running the end-to-end tests in Chromium");
    let screenshots = std::env::var_os("QUOTA_SCREENSHOTS");
    let screenshots = screenshots.as_deref();
    let status = browse(&server.address, None, screenshots, &[])?;
    // Runs all of them, even if the first fails.
    let counted = recount(screenshots)?;
    let in_app = desktop::journey(&server.address)?;
    Ok(status.success() && counted && in_app)
}

/// Compares what the console shows with the client's log of requests to two replicas.
fn recount(screenshots: Option<&OsStr>) -> Result<bool> {
    let database = Throwaway::start()?;
    let redis = Redis::start()?;
    let shared = [
        ("DATABASE_URL", database.url()),
        ("REDIS_URL", redis.url()),
        (
            "QUOTA_SECRET",
            "only for the end-to-end tests, on loopback".into(),
        ),
    ];
    let first = Server::start(&shared)?;
    let second = Server::start(&shared)?;
    let status = browse(
        &first.address,
        Some(&second.address),
        screenshots,
        &["recount"],
    )?;
    Ok(status.success())
}

/// Runs parts of the journey, or all of it, against a server.
fn browse(
    address: &str,
    second: Option<&str>,
    screenshots: Option<&OsStr>,
    parts: &[&str],
) -> Result<ExitStatus> {
    let chromium = system::on_path("chromium").context("Chromium is not installed")?;
    Command::new("node")
        .current_dir(root().join("desktop/e2e"))
        .envs(second.map(|it| ("SECOND_REPLICA", it)))
        .arg("journey.mjs")
        .arg(chromium)
        .arg(address)
        // The parts follow the folder for screenshots, so it may be empty but not missing.
        .arg(screenshots.unwrap_or_default())
        .args(parts)
        .status()
        .context("cannot run node")
}

/// Installs the packages that the tests in the browser need, if they are missing or have changed.
fn install_packages() -> Result<()> {
    let folder = root().join("desktop/e2e");
    let lock = folder.join("package-lock.json");
    let installed = folder.join("node_modules/.package-lock.json");
    let modified = |path: &PathBuf| fs::metadata(path).and_then(|it| it.modified()).ok();
    if modified(&installed).is_none_or(|at| Some(at) < modified(&lock)) {
        succeed(Command::new("npm").current_dir(&folder).args([
            "ci",
            "--no-audit",
            "--no-fund",
            "--loglevel=error",
        ]))
        .context("the browser tests need two npm packages")?;
    }
    Ok(())
}

/// Runs a function with an empty server.
pub(crate) fn on_server<T>(run: impl FnOnce(&str) -> Result<T>) -> Result<T> {
    build_server()?;
    let server = Server::start(&[])?;
    run(&server.address)
}

fn build_server() -> Result<()> {
    let packages = [
        "--package",
        "quota-server",
        "--package",
        "quota-fake-stripe",
    ];
    succeed(cargo().args(["build", "--quiet", "--bins"]).args(packages))
}

/// Creates a directory in /tmp that other users can access, because the database's user has to reach it.
fn new_directory() -> Result<PathBuf> {
    let stamp = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
    let path = PathBuf::from(format!(
        "/tmp/quota-journey-{}-{}",
        std::process::id(),
        stamp.subsec_nanos()
    ));
    fs::DirBuilder::new()
        .mode(0o711)
        .create(&path)
        .with_context(|| format!("cannot create {}", path.display()))?;
    Ok(path)
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// A Redis server that stores nothing on disk and ends when dropped.
struct Redis {
    process: Child,
    port: u16,
}

impl Redis {
    fn start() -> Result<Self> {
        let port = free_port()?;
        let process = Command::new("redis-server")
            .args(["--bind", "127.0.0.1", "--port", &port.to_string()])
            .args(["--save", "", "--appendonly", "no"])
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot run redis-server")?;
        Ok(Self { process, port })
    }

    fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/0", self.port)
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// An empty server, which ends when dropped.
struct Server {
    process: Child,
    address: String,
    data: PathBuf,
}

impl Server {
    /// Starts a server with additional settings. Without `DATABASE_URL`, it has an embedded database.
    fn start(settings: &[(&str, String)]) -> Result<Self> {
        let data = new_directory()?;
        let port = free_port()?;
        let listen = format!("127.0.0.1:{port}");
        let log = fs::File::create(data.join("log"))?;
        let built = console::target_directory()?.join("debug");
        // The server is addressed by name, because browsers accept cookies from a local server only under a local
        // name.
        let address = format!("http://localhost:{port}");
        let mut command = if settings.is_empty() {
            // It bills through a stand-in for Stripe.
            let mut command = Command::new(built.join("fake-stripe"));
            command
                .args(["--listen", "127.0.0.1:0"])
                .arg(built.join("quota"));
            command
        } else {
            Command::new(built.join("quota"))
        };
        let process = command
            // Settings in the environment must not affect the tests.
            .env_clear()
            .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
            .env("QUOTA_PUBLIC_URL", &address)
            .envs(settings.iter().map(|(name, value)| (name, value)))
            .args(["serve", "--metrics-listen=off", "--log-format=text"])
            // All requests come from the same address, so turn off the limits.
            .args(["--auth-rpm=0", "--admin-rpm=0", "--registrations-per-day=0"])
            // Webhooks are sent to a receiver on this machine.
            .arg("--webhook-private-networks=127.0.0.0/8")
            .arg(format!("--listen={listen}"))
            .arg("--data-dir")
            .arg(data.join("data"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot run the server")?;
        let mut server = Self {
            process,
            address,
            data,
        };
        server.wait(&listen)?;
        Ok(server)
    }

    fn wait(&mut self, listen: &str) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        while !is_ready(listen) {
            if let Some(status) = self.process.try_wait()? {
                bail!("the server exited ({status}): {}", self.log());
            }
            if Instant::now() > until {
                bail!("the server was not ready in time: {}", self.log());
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    fn log(&self) -> String {
        fs::read_to_string(self.data.join("log")).unwrap_or_default()
    }
}

fn is_ready(listen: &str) -> bool {
    let ask = || {
        let mut stream = TcpStream::connect(listen)?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        stream.write_all(b"GET /health/ready HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
        std::io::read_to_string(stream)
    };
    ask().is_ok_and(|answer| {
        answer.starts_with("HTTP/1.0 200") || answer.starts_with("HTTP/1.1 200")
    })
}

impl Drop for Server {
    fn drop(&mut self) {
        // Uses SIGTERM, so that the database stops too.
        let _ = read(Command::new("kill").arg(self.process.id().to_string()));
        let until = Instant::now() + Duration::from_secs(30);
        while matches!(self.process.try_wait(), Ok(None)) && Instant::now() < until {
            thread::sleep(Duration::from_millis(50));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.data);
    }
}
