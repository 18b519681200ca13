//! Gateways with their configurations from `deploy/gateways`, and the same gateways as plain proxies for comparison.

mod checked;
mod plain;

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{Process, envoy, redis::free_port, traefik};

/// The time within which a gateway must start, even on a busy machine.
const STARTED_WITHIN: Duration = Duration::from_secs(120);

/// A gateway. nginx, HAProxy and Caddy must be installed; Envoy and Traefik are downloaded if they are missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    Caddy,
    Nginx,
    HaProxy,
    Envoy,
    /// Envoy, which calls Quota's rate limit service at [`Checked::quota_port`].
    EnvoyRateLimit,
    Traefik,
}

/// How a proxy treats malformed requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parsing {
    Strict,
    /// Malformed requests are forwarded where possible, and bodies are forwarded as they arrive.
    Lenient,
}

/// The values that a user would enter in a gateway's configuration, and a fault for tests.
pub struct Checked<'a> {
    pub quota_port: u16,
    /// The certificate of the authority that the gateway trusts. If `None`, the gateway calls Quota without TLS.
    pub root: Option<&'a Path>,
    pub token: &'a str,
    pub api: SocketAddr,
    /// A part of HAProxy's script, and the faulty code that replaces this part.
    pub script_fault: Option<(&'a str, &'a str)>,
}

/// A running gateway.
pub struct Gateway {
    pub addr: SocketAddr,
    pub process: Process,
    dir: TempDir,
}

impl Gateway {
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Returns the address at which the gateway receives requests from itself. Panics if there is none.
    #[must_use]
    pub fn inner(&self) -> String {
        fs::read_to_string(self.dir.path().join(INNER)).expect("the gateway has such an address")
    }
}

/// Returns the directory with the configurations.
#[must_use]
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/gateways")
}

impl Program {
    /// Starts the gateway with its configuration, and waits until it listens. Downloads go to `tools`.
    pub async fn start(self, checked: &Checked<'_>, tools: &Path) -> Gateway {
        let configure = |dir: &Path, port| self.checked(dir, checked, port);
        self.run(tools, configure).await
    }

    /// Starts the gateway as a plain proxy that checks nothing.
    pub async fn start_plain(self, api: SocketAddr, tools: &Path) -> Gateway {
        let configure = |dir: &Path, port| self.plain(dir, api, port);
        self.run(tools, configure).await
    }

    /// Starts the gateway as a plain proxy whose consumers share connections to the API.
    pub async fn start_shared(self, api: SocketAddr, parsing: Parsing, tools: &Path) -> Gateway {
        let configure = |dir: &Path, port| self.shared(dir, api, parsing, port);
        self.run(tools, configure).await
    }

    async fn run(self, tools: &Path, configure: impl Fn(&Path, u16) -> PathBuf) -> Gateway {
        let dir = tempfile::tempdir().expect("a directory");
        let output = dir.path().join("output");
        // Retry, because another process may have taken the port in the meantime.
        for _ in 0..5 {
            let port = free_port();
            let file = configure(dir.path(), port);
            let command = self.command(dir.path(), &file, port, tools);
            let mut process = Process::start(&command, &output).expect("the program is installed");
            let began = Instant::now();
            while process.ended().expect("a child process").is_none() {
                if self.is_ready(port).await {
                    return Gateway {
                        addr: SocketAddr::from(([127, 0, 0, 1], port)),
                        process,
                        dir,
                    };
                }
                assert!(
                    began.elapsed() < STARTED_WITHIN,
                    "the program does not listen"
                );
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        panic!("{}", fs::read_to_string(output).unwrap_or_default());
    }

    /// Returns whether the gateway listens and has read its configuration.
    async fn is_ready(self, port: u16) -> bool {
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)).await else {
            return false;
        };
        if self != Self::Traefik {
            return true;
        }
        // Traefik listens before it has read its configuration. Until Traefik has read it, every path is unknown.
        let request = format!("GET {READY} HTTP/1.1\r\nHost: q\r\nConnection: close\r\n\r\n");
        let mut response = Vec::new();
        let is_sent = stream.write_all(request.as_bytes()).await.is_ok();
        is_sent
            && stream.read_to_end(&mut response).await.is_ok()
            && response.starts_with(b"HTTP/1.1 503 ")
    }

    /// Returns the command that runs the gateway with a configuration file, as a single process.
    fn command(self, dir: &Path, file: &Path, port: u16, tools: &Path) -> Command {
        match self {
            Self::Caddy => {
                let mut caddy = Command::new("caddy");
                caddy
                    .args(["run", "--adapter", "caddyfile", "--config"])
                    .arg(file)
                    // The trusted roots with which the gateway verifies Quota's certificate.
                    .env("SSL_CERT_FILE", dir.join(ROOT))
                    .env("HOME", dir)
                    .env("XDG_DATA_HOME", dir)
                    .env("XDG_CONFIG_HOME", dir);
                caddy
            }
            Self::Nginx => {
                let mut nginx = system("nginx");
                nginx.arg("-p").arg(dir).arg("-c").arg(file);
                nginx
            }
            Self::HaProxy => {
                let mut haproxy = system("haproxy");
                haproxy.arg("-db").arg("-f").arg(file);
                haproxy
            }
            Self::Envoy | Self::EnvoyRateLimit => {
                let program = envoy::program(tools).expect("Envoy is installed");
                let mut envoy = Command::new(program);
                envoy
                    .args(["--disable-hot-restart", "--concurrency", "1"])
                    .args(["--log-level", "warn", "-c"])
                    .arg(file);
                envoy
            }
            Self::Traefik => {
                let program = traefik::program(tools).expect("Traefik is installed");
                let mut traefik = Command::new(program);
                traefik
                    .arg(format!("--entryPoints.web.address=127.0.0.1:{port}"))
                    .arg(format!("--providers.file.filename={}", file.display()))
                    .args(["--providers.file.watch=false", "--log.level=ERROR"])
                    .args([
                        "--global.checkNewVersion=false",
                        "--global.sendAnonymousUsage=false",
                    ])
                    // The trusted roots with which the gateway verifies Quota's certificate.
                    .env("SSL_CERT_FILE", dir.join(ROOT));
                if let Ok(inner) = fs::read_to_string(dir.join(INNER)) {
                    traefik
                        .arg(format!("--entryPoints.allowed.address={inner}"))
                        .arg("--entryPoints.allowed.forwardedHeaders.trustedIPs=127.0.0.1/32");
                }
                traefik
            }
        }
    }
}

/// A path without an upstream in Traefik's configuration, for which Traefik returns 503.
const READY: &str = "/gateway-is-ready";
/// The router for [`READY`].
const READY_ROUTER: &str = "  routers:
    ready:
      rule: \"Path(`/gateway-is-ready`)\"
      entryPoints: [\"web\"]
      service: unavailable
";
/// A file with the trusted certificate.
const ROOT: &str = "root.crt";
/// A file with the address at which a gateway receives requests from itself: Traefik's second entry point, to which the
/// first one forwards allowed requests, or HAProxy's frontend for its script.
const INNER: &str = "inner";

/// Returns a command that runs a server such as nginx, which Debian installs in a directory that is only in root's
/// path.
#[must_use]
pub fn system(name: &str) -> Command {
    let system = Path::new("/usr/sbin").join(name);
    Command::new(if system.exists() {
        system
    } else {
        PathBuf::from(name)
    })
}

/// Writes a file, and returns its path.
fn write(dir: &Path, name: &str, text: impl AsRef<str>) -> PathBuf {
    let file = dir.join(name);
    fs::write(&file, text.as_ref()).expect("the file is written");
    file
}

/// Returns an nginx configuration with these servers. nginx runs as a single process, so that nothing is left running
/// when it ends.
fn nginx(dir: &Path, servers: &str) -> String {
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|name| format!("{name}_temp_path {};\n", dir.join(name).display()))
        .concat();
    format!(
        "daemon off;\nmaster_process off;\npid {};\nerror_log stderr;\nevents {{}}\nhttp {{\n\
         access_log off;\nkeepalive_requests 1000000;\n{temporary}{servers}}}\n",
        dir.join("pid").display()
    )
}

/// Returns a Caddyfile with these sites, on loopback.
fn caddyfile(sites: &str) -> String {
    format!("{{\n\tadmin off\n\tauto_https off\n\tdefault_bind 127.0.0.1\n}}\n{sites}")
}
