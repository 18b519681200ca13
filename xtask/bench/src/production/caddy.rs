//! Caddy with the repository's Caddyfile, on loopback, and with certificates from its own certificate authority.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{sys::signal::Signal, unistd::Pid};
use quota_testkit::{Process, redis::free_port};
use reqwest::{Certificate, Client};

const STARTED_WITHIN: Duration = Duration::from_secs(30);

pub(super) struct Caddy {
    command: Command,
    dir: PathBuf,
    pub(super) port: u16,
    running: Option<Process>,
}

pub(super) struct Settings<'a> {
    pub(super) program: &'a Path,
    /// The directory for Caddy's certificate authority and its log.
    pub(super) dir: &'a Path,
    /// The port for HTTPS.
    pub(super) port: u16,
    /// The port of the replicas.
    pub(super) upstream_port: u16,
    pub(super) names: SocketAddr,
}

impl Caddy {
    /// Starts Caddy, and waits until a replica responds through it.
    pub(super) async fn start(settings: &Settings<'_>) -> Result<Self> {
        let Settings { dir, port, .. } = settings;
        fs::create_dir_all(dir)?;
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../Caddyfile");
        let source = fs::read_to_string(&source)
            .with_context(|| format!("cannot read {}", source.display()))?;
        let file = dir.join("Caddyfile");
        fs::write(
            &file,
            on_loopback(&source, *port, free_port(), settings.names)?,
        )?;
        let mut command = Command::new(settings.program);
        command
            .args(["run", "--adapter", "caddyfile", "--config"])
            .arg(&file)
            // The IP address is for clients that send no server name.
            .env("QUOTA_SITE", "localhost, 127.0.0.1")
            // The final period prevents the use of the machine's search domains.
            .env("QUOTA_UPSTREAM", "quota.internal.")
            .env("QUOTA_PORT", settings.upstream_port.to_string())
            .env("HOME", dir)
            .env("XDG_DATA_HOME", dir)
            .env("XDG_CONFIG_HOME", dir);
        let mut caddy = Self {
            command,
            dir: dir.to_path_buf(),
            port: *port,
            running: None,
        };
        caddy.spawn()?;
        caddy.ready().await?;
        Ok(caddy)
    }

    pub(super) fn spawn(&mut self) -> Result<()> {
        let process = Process::start(&self.command, &self.log()).context("cannot run Caddy")?;
        self.running = Some(process);
        Ok(())
    }

    async fn ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + STARTED_WITHIN;
        let url = format!("{}/health/serving", self.base());
        loop {
            if let Ok(client) = self.client()
                && let Ok(response) = client.get(&url).send().await
                && response.status().is_success()
            {
                return Ok(());
            }
            let log_file = self.log();
            let log = || crate::replica::tail(&fs::read_to_string(&log_file).unwrap_or_default());
            if !self.is_running()? {
                bail!("Caddy does not start:\n{}", log());
            }
            ensure!(
                Instant::now() < deadline,
                "Quota does not respond through Caddy:\n{}",
                log()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub(super) fn is_running(&mut self) -> Result<bool> {
        Ok(match &mut self.running {
            Some(process) => process.ended()?.is_none(),
            None => false,
        })
    }

    pub(super) fn pid(&self) -> Option<Pid> {
        self.running.as_ref().map(Process::pid)
    }

    pub(super) async fn stop(&mut self) -> Result<()> {
        if let Some(mut process) = self.running.take() {
            process.signal(Signal::SIGTERM)?;
            let ended = process.ends_within(Duration::from_secs(10)).await?;
            ended.context("Caddy did not stop in time")?;
        }
        Ok(())
    }

    pub(super) fn base(&self) -> String {
        format!("https://localhost:{}", self.port)
    }

    /// Returns the certificate of Caddy's certificate authority.
    pub(super) fn certificate(&self) -> PathBuf {
        self.dir.join("caddy/pki/authorities/local/root.crt")
    }

    /// Returns a client that trusts only Caddy's certificate authority.
    pub(super) fn client(&self) -> Result<Client> {
        let certificate = Certificate::from_pem(&fs::read(self.certificate())?)?;
        Ok(Client::builder()
            .tls_certs_only([certificate])
            .no_proxy()
            .timeout(Duration::from_secs(15))
            .build()?)
    }

    fn log(&self) -> PathBuf {
        self.dir.join("log")
    }
}

/// Returns the Caddyfile with different ports, on loopback only, with a different name server, and without the admin
/// endpoint. Everything else is as in production.
fn on_loopback(text: &str, https: u16, http: u16, names: SocketAddr) -> Result<String> {
    let mut text = text.to_owned();
    for (line, replacement) in [
        (
            "\tskip_install_trust\n",
            format!(
                "\tskip_install_trust\n\tadmin off\n\tdefault_bind 127.0.0.1\n\thttp_port {http}\n\thttps_port {https}\n"
            ),
        ),
        (
            "\t\t\trefresh 1s\n",
            format!("\t\t\trefresh 1s\n\t\t\tresolvers {names}\n"),
        ),
        ("\n:443 {\n", format!("\n:{https} {{\n")),
    ] {
        ensure!(
            text.matches(line).count() == 1,
            "the Caddyfile must contain {line:?} once"
        );
        text = text.replace(line, &replacement);
    }
    Ok(text)
}
