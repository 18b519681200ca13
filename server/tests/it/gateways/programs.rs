//! The gateways as packaged by Debian, and Envoy, each with its configuration from `deploy/gateways`.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use quota_testkit::{Process, envoy};
use tempfile::TempDir;
use tokio::net::TcpStream;

/// Long enough for a busy machine.
const STARTED_WITHIN: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Program {
    Caddy,
    Nginx,
    HaProxy,
    Envoy,
    /// Envoy with its rate limit filter, which calls the gRPC listener at [`Filled::quota_port`].
    EnvoyRateLimit,
}

/// The values that a user fills in.
pub(super) struct Filled<'a> {
    pub(super) quota_port: u16,
    pub(super) root: &'a Path,
    pub(super) token: &'a str,
    pub(super) api: String,
    /// A part of HAProxy's script, and the bug that replaces it.
    pub(super) script_fault: Option<(&'a str, &'a str)>,
}

/// A running gateway.
pub(super) struct Gateway {
    pub(super) url: String,
    _process: Process,
    _dir: TempDir,
}

pub(super) fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/gateways")
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    listener.local_addr().expect("the socket is bound").port()
}

/// Returns a command that runs a server. Debian installs servers in directories that are only in root's `PATH`.
fn command(name: &str) -> Command {
    let system = Path::new("/usr/sbin").join(name);
    Command::new(if system.exists() {
        system
    } else {
        PathBuf::from(name)
    })
}

/// Replaces a string that must be present.
fn put(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "{from:?} is not in\n{text}");
    text.replace(from, to)
}

impl Filled<'_> {
    fn read(&self, file: &str) -> String {
        let text = fs::read_to_string(folder().join(file)).expect("the file is there");
        let text = put(&text, "qs_YOUR_SERVICE_TOKEN", self.token);
        let text = put(&text, "127.0.0.1:3000", &self.api);
        let address = format!("localhost:{}", self.quota_port);
        text.replace("quota.example.com:443", &address)
            .replace("https://quota.example.com", &format!("https://{address}"))
            .replace("quota.example.com", "localhost")
            .replace(
                "/etc/ssl/certs/ca-certificates.crt",
                &self.root.display().to_string(),
            )
    }
}

impl Program {
    /// Starts the gateway and waits until it listens.
    pub(super) async fn start(self, filled: &Filled<'_>) -> Gateway {
        let dir = tempfile::tempdir().expect("a directory");
        let output = dir.path().join("output");
        // Retry, because another process may take the port in the meantime.
        for _ in 0..5 {
            let port = free_port();
            let command = self.command(dir.path(), filled, port);
            let mut process = Process::start(&command, &output).expect("the program is installed");
            let began = Instant::now();
            while process.ended().expect("a child process").is_none() {
                if TcpStream::connect(("127.0.0.1", port)).await.is_ok() {
                    return Gateway {
                        url: format!("http://127.0.0.1:{port}"),
                        _process: process,
                        _dir: dir,
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

    fn command(self, dir: &Path, filled: &Filled<'_>, port: u16) -> Command {
        match self {
            Self::Caddy => {
                let site = put(
                    &filled.read("Caddyfile"),
                    "api.example.com",
                    &format!("http://127.0.0.1:{port}"),
                );
                let file = dir.join("Caddyfile");
                fs::write(
                    &file,
                    format!(
                        "{{\n\tadmin off\n\tauto_https off\n\tdefault_bind 127.0.0.1\n}}\n{site}"
                    ),
                )
                .expect("the file is written");
                let mut caddy = Command::new("caddy");
                caddy
                    .args(["run", "--adapter", "caddyfile", "--config"])
                    .arg(file)
                    // The trusted roots with which Caddy verifies Quota's certificate.
                    .env("SSL_CERT_FILE", filled.root)
                    .env("HOME", dir)
                    .env("XDG_DATA_HOME", dir)
                    .env("XDG_CONFIG_HOME", dir);
                caddy
            }
            Self::Nginx => {
                let server = put(
                    &filled.read("nginx.conf"),
                    "listen 80;",
                    &format!("listen 127.0.0.1:{port};"),
                );
                let server = put(&server, "api.example.com", "127.0.0.1");
                let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
                    .map(|name| format!("{name}_temp_path {};\n", dir.join(name).display()))
                    .concat();
                // nginx runs as a single process, so that no other process is left running when nginx is killed.
                let text = format!(
                    "daemon off;\nmaster_process off;\npid {};\nerror_log stderr;\nevents {{}}\nhttp {{\n\
                     access_log off;\n{temporary}{server}}}\n",
                    dir.join("pid").display()
                );
                let file = dir.join("nginx.conf");
                fs::write(&file, text).expect("the file is written");
                let mut nginx = command("nginx");
                nginx.arg("-p").arg(dir).arg("-c").arg(file);
                nginx
            }
            Self::HaProxy => {
                let inner = format!("127.0.0.1:{}", free_port());
                let script =
                    fs::read_to_string(folder().join("quota.lua")).expect("the script exists");
                let lua = dir.join("quota.lua");
                let mut script = put(&script, "127.0.0.1:8404", &inner);
                if let Some((from, to)) = filled.script_fault {
                    script = put(&script, from, to);
                }
                fs::write(&lua, script).expect("the file is written");
                let text = filled.read("haproxy.cfg");
                let text = put(&text, "127.0.0.1:8404", &inner);
                let text = put(&text, "/etc/haproxy/quota.lua", &lua.display().to_string());
                let text = put(&text, "bind :80", &format!("bind 127.0.0.1:{port}"));
                let text = put(&text, "api.example.com", "127.0.0.1");
                let file = dir.join("haproxy.cfg");
                fs::write(&file, text).expect("the file is written");
                let mut haproxy = command("haproxy");
                haproxy.arg("-db").arg("-f").arg(file);
                haproxy
            }
            Self::Envoy | Self::EnvoyRateLimit => {
                let (file, quota) = if self == Self::Envoy {
                    ("envoy.yaml", 443)
                } else {
                    ("envoy-ratelimit.yaml", 8081)
                };
                let socket =
                    |host: &str, port: &str| format!("address: {host}, port_value: {port}");
                let (api_host, api_port) = filled.api.split_once(':').expect("an address");
                let text = filled.read(file);
                let text = put(
                    &text,
                    &socket("0.0.0.0", "80"),
                    &socket("127.0.0.1", &port.to_string()),
                );
                let text = put(
                    &text,
                    &socket("127.0.0.1", "3000"),
                    &socket(api_host, api_port),
                );
                let text = put(
                    &text,
                    &socket("localhost", &quota.to_string()),
                    &socket("localhost", &filled.quota_port.to_string()),
                );
                let text = put(&text, "api.example.com", "127.0.0.1");
                let file = dir.join("envoy.yaml");
                fs::write(&file, text).expect("the file is written");
                let tools = Path::new(env!("CARGO_TARGET_TMPDIR"));
                let program = envoy::program(tools).expect("Envoy is installed");
                let mut envoy = Command::new(program);
                envoy
                    .args(["--disable-hot-restart", "--concurrency", "1"])
                    .args(["--log-level", "warn", "-c"])
                    .arg(file);
                envoy
            }
        }
    }
}
