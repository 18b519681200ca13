//! Servers for the end-to-end tests.

use std::{
    fs,
    io::Write as _,
    net::{TcpListener, TcpStream},
    os::unix::fs::DirBuilderExt as _,
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{cargo, console, read, succeed};

/// The time within which a server must start. The first startup creates a database.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs a function with the address of a new server.
pub(crate) fn on_server<T>(run: impl FnOnce(&str) -> Result<T>) -> Result<T> {
    build_server()?;
    let server = Server::start(&[])?;
    run(&server.address)
}

/// Builds the server and the stand-in for Stripe.
pub(crate) fn build_server() -> Result<()> {
    let packages = [
        "--package",
        "quota-server",
        "--package",
        "quota-fake-stripe",
    ];
    succeed(cargo().args(["build", "--quiet", "--bins"]).args(packages))
}

/// Creates a directory in /tmp that other users can access, because the user that PostgreSQL runs as must be able to
/// reach it.
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

/// A Redis server that stores nothing on disk. Dropping this value stops the server.
pub(crate) struct Redis {
    process: Child,
    port: u16,
}

impl Redis {
    pub(crate) fn start() -> Result<Self> {
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

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/0", self.port)
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A server with an empty database. Dropping this value stops the server.
pub(crate) struct Server {
    process: Child,
    pub(crate) address: String,
    data: PathBuf,
}

impl Server {
    /// Starts a server with additional settings. Without `DATABASE_URL`, the server has a private PostgreSQL.
    pub(crate) fn start(settings: &[(&str, String)]) -> Result<Self> {
        let data = new_directory()?;
        let port = free_port()?;
        let listen = format!("127.0.0.1:{port}");
        let log = fs::File::create(data.join("log"))?;
        let built = console::target_directory()?.join("debug");
        // The address must be local, so that the server's cookies work without TLS.
        let address = format!("http://localhost:{port}");
        let mut command = if settings.is_empty() {
            // Bill through a stand-in for Stripe.
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
