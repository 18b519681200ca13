//! Caddy with the repository's `Caddyfile`, on loopback addresses.

use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use quota_testkit::{Process, caddy, redis::free_port};
use reqwest::Client;
use tempfile::TempDir;

/// The maximum time that Caddy may take to start, even on a busy machine.
const STARTED_WITHIN: Duration = Duration::from_secs(60);

pub(crate) struct Caddy {
    pub(crate) https: u16,
    /// Trusts Caddy's certificate authority.
    pub(crate) client: Client,
    _process: Process,
    _dir: TempDir,
}

impl Caddy {
    /// Starts Caddy in front of the server on the port `upstream`, with additional environment variables.
    pub(crate) async fn start(upstream: u16, variables: &[(&str, &str)]) -> Self {
        let program =
            caddy::recent(Path::new(env!("CARGO_TARGET_TMPDIR"))).expect("there is a Caddy");
        let dir = tempfile::tempdir().expect("a directory");
        let https = free_port();
        let file = dir.path().join("Caddyfile");
        fs::write(&file, caddyfile(https)).expect("it is written");
        let mut command = Command::new(program);
        command
            .args(["run", "--adapter", "caddyfile", "--config"])
            .arg(&file)
            .env("QUOTA_UPSTREAM", "localhost")
            .env("QUOTA_PORT", upstream.to_string())
            .envs(variables.iter().copied())
            .env("HOME", dir.path())
            .env("XDG_DATA_HOME", dir.path())
            .env("XDG_CONFIG_HOME", dir.path());
        let output = dir.path().join("output");
        let process = Process::start(&command, &output).expect("it runs");
        let certificate = dir.path().join("caddy/pki/authorities/local/root.crt");
        let began = Instant::now();
        loop {
            if let Ok(pem) = fs::read(&certificate)
                && let Ok(certificate) = reqwest::Certificate::from_pem(&pem)
            {
                let client = || {
                    Client::builder()
                        .tls_certs_only([certificate.clone()])
                        .no_proxy()
                };
                // Caddy itself responds to requests for an unknown host, so this request does not need the server. Over
                // HTTP/2, the header would not replace the name in the URL.
                let stranger = client().http1_only().build().expect("a client");
                let stranger = stranger
                    .get(format!("https://localhost:{https}/"))
                    .header("host", "stranger.example");
                if stranger.send().await.is_ok_and(|it| it.status() == 421) {
                    return Self {
                        https,
                        client: client().build().expect("a client"),
                        _process: process,
                        _dir: dir,
                    };
                }
            }
            let log = || fs::read_to_string(&output).unwrap_or_default();
            assert!(began.elapsed() < STARTED_WITHIN, "{}", log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Returns the repository's Caddyfile with other ports, on loopback only.
fn caddyfile(https: u16) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Caddyfile");
    let mut text = fs::read_to_string(path).expect("it is there");
    let options = format!(
        "\tskip_install_trust\n\tadmin off\n\tdefault_bind 127.0.0.1\n\thttp_port {}\n\thttps_port {https}\n",
        free_port()
    );
    for (from, to) in [
        ("\tskip_install_trust\n", options),
        ("\n:443 {\n", format!("\n:{https} {{\n")),
    ] {
        assert_eq!(text.matches(from).count(), 1, "{from:?}");
        text = text.replace(from, &to);
    }
    text
}
