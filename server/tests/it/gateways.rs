//! The configurations in `deploy/gateways`, as they are there, within the gateways that they are for: real ones, of
//! Debian's packages.

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use quota_testkit::Process;
use reqwest::{Client, Response};
use serde_json::json;
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
};

use crate::support::app::TestApp;

/// The busy machine of a test.
const STARTED_WITHIN: Duration = Duration::from_secs(30);
/// What is told of limits with each answer.
const FIELDS: [&str; 5] = [
    "x-ratelimit-limit",
    "x-ratelimit-remaining",
    "x-ratelimit-reset",
    "ratelimit-policy",
    "ratelimit",
];

/// The API behind a gateway: it answers with the body that it got, and `/forbidden` with 403.
struct Backend {
    addr: SocketAddr,
    requests: Arc<AtomicUsize>,
}

impl Backend {
    async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let requests = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&requests);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(answer(stream));
            }
        });
        Self { addr, requests }
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

async fn answer(stream: TcpStream) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    let (mut first, mut length) = (String::new(), 0);
    stream.read_line(&mut first).await?;
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await?;
        let line = line.trim().to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        assert!(!line.contains("qs_"), "the token went on to the API");
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().expect("a length");
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    let status = if first.contains("/forbidden") {
        "403 Forbidden"
    } else {
        "200 OK"
    };
    let head =
        format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(&body).await
}

/// A configuration with what its user fills in.
fn filled(name: &str, app: &TestApp, token: &str, backend: &Backend) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../deploy/gateways")
        .join(name);
    let quota = app.url("");
    let host = quota.rsplit('/').next().unwrap();
    let text = fs::read_to_string(path).expect("the file is there");
    text.replace("https://quota.example.com", &quota)
        .replace("quota.example.com", host)
        .replace("qs_YOUR_SERVICE_TOKEN", token)
        .replace("127.0.0.1:3000", &backend.addr.to_string())
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    listener.local_addr().expect("it is bound").port()
}

/// Starts a gateway whose configuration is made for a port, and waits until it listens.
async fn started(dir: &TempDir, make: impl Fn(u16) -> Command) -> (Process, String) {
    let output = dir.path().join("output");
    // Another process may take the port between our look and the gateway's own.
    for _ in 0..5 {
        let port = free_port();
        let mut process = Process::start(&make(port), &output).expect("it is installed");
        let began = Instant::now();
        while process.ended().unwrap().is_none() {
            if TcpStream::connect(("127.0.0.1", port)).await.is_ok() {
                return (process, format!("http://127.0.0.1:{port}"));
            }
            assert!(began.elapsed() < STARTED_WITHIN, "it does not listen");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    panic!("{}", fs::read_to_string(output).unwrap_or_default());
}

fn caddy(dir: &TempDir, site: &str) -> impl Fn(u16) -> Command {
    let (dir, site) = (dir.path().to_owned(), site.to_owned());
    move |port| {
        let file = dir.join("Caddyfile");
        let site = site.replace("api.example.com", &format!("http://127.0.0.1:{port}"));
        fs::write(
            &file,
            format!("{{\n\tadmin off\n\tauto_https off\n}}\n{site}"),
        )
        .unwrap();
        let mut command = Command::new("caddy");
        command
            .args(["run", "--adapter", "caddyfile", "--config"])
            .arg(file)
            .env("HOME", &dir)
            .env("XDG_DATA_HOME", &dir)
            .env("XDG_CONFIG_HOME", &dir);
        command
    }
}

fn nginx(dir: &TempDir, server: &str) -> impl Fn(u16) -> Command {
    let (dir, server) = (dir.path().to_owned(), server.to_owned());
    move |port| {
        let server = server
            .replace("listen 80;", &format!("listen 127.0.0.1:{port};"))
            .replace("api.example.com", "127.0.0.1");
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|name| format!("{name}_temp_path {};\n", dir.join(name).display()))
            .concat();
        let pid = dir.join("pid");
        // One process, so that its end is the end of it.
        let text = format!(
            "daemon off;\nmaster_process off;\npid {};\nerror_log stderr;\nevents {{}}\nhttp {{\naccess_log off;\n\
             {temporary}{server}}}\n",
            pid.display()
        );
        let file = dir.join("nginx.conf");
        fs::write(&file, text).unwrap();
        // Debian has it where only root looks.
        let own = Path::new("/usr/sbin/nginx");
        let mut command = Command::new(if own.exists() {
            own
        } else {
            Path::new("nginx")
        });
        command.arg("-p").arg(&dir).arg("-c").arg(file);
        command
    }
}

fn field<'a>(answer: &'a Response, name: &str) -> Option<&'a str> {
    answer.headers().get(name).map(|it| it.to_str().unwrap())
}

/// What a gateway with such a configuration does.
async fn lets_through_what_quota_admits(
    file: &str,
    gateway: impl AsyncFnOnce(&TempDir, String) -> (Process, String),
) {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = app
        .plan(&account, json!({"default_rpm": 1, "burst": 3}))
        .await;
    let key = app.key(&account, &plan).await.text;
    let token = app.service_token(&account).await;
    let backend = Backend::start().await;
    let dir = tempfile::tempdir().unwrap();
    let (_gateway, url) = gateway(&dir, filled(file, &app, &token, &backend)).await;
    let http = Client::new();

    let none = http.get(&url).send().await.unwrap();
    assert_eq!(none.status(), 401);
    assert_eq!(
        field(&none, "www-authenticate"),
        Some("Bearer realm=\"quota\"")
    );
    let wrong = http
        .get(&url)
        .header("x-api-key", "qk_wrong")
        .send()
        .await
        .unwrap();
    assert_eq!(wrong.status(), 401);
    let told = field(&wrong, "www-authenticate").unwrap();
    assert!(told.contains("error=\"invalid_token\""), "{told}");
    assert_eq!(backend.requests(), 0);

    for left in ["2", "1", "0"] {
        // What a consumer sends as the gateway's token is not the gateway's.
        let call = http
            .post(format!("{url}/orders?a=b"))
            .header("x-service-token", "forged");
        let admitted = call
            .header("x-api-key", &key)
            .body("an order")
            .send()
            .await
            .unwrap();
        assert_eq!(admitted.status(), 200);
        assert_eq!(field(&admitted, "x-ratelimit-remaining"), Some(left));
        for name in FIELDS {
            assert_eq!(admitted.headers().get_all(name).iter().count(), 1, "{name}");
        }
        assert_eq!(admitted.text().await.unwrap(), "an order");
    }
    assert_eq!(backend.requests(), 3);

    let denied = http.get(&url).bearer_auth(&key).send().await.unwrap();
    assert_eq!(denied.status(), 429);
    for name in FIELDS {
        assert_eq!(denied.headers().get_all(name).iter().count(), 1, "{name}");
    }
    assert_eq!(field(&denied, "x-ratelimit-remaining"), Some("0"));
    assert_eq!(field(&denied, "cache-control"), Some("no-store"));
    let wait: u64 = field(&denied, "retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&wait), "{wait}");
    assert_eq!(
        backend.requests(),
        3,
        "what is denied does not get to the API"
    );

    // What the API itself refuses stays as the API says it.
    let other = app.key(&account, &plan).await.text;
    let call = http
        .get(format!("{url}/forbidden"))
        .header("x-api-key", other);
    assert_eq!(call.send().await.unwrap().status(), 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn caddy_lets_through_what_quota_admits() {
    lets_through_what_quota_admits("Caddyfile", async |dir, site| {
        started(dir, caddy(dir, &site)).await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nginx_lets_through_what_quota_admits() {
    lets_through_what_quota_admits("nginx.conf", async |dir, server| {
        started(dir, nginx(dir, &server)).await
    })
    .await;
}

#[test]
fn every_configuration_says_what_is_to_be_filled_in() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/gateways");
    let mut seen = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let text = fs::read_to_string(entry.unwrap().path()).unwrap();
        for part in [
            "api.example.com",
            "127.0.0.1:3000",
            "https://quota.example.com",
            "qs_YOUR_SERVICE_TOKEN",
            "/v1/forward-auth",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        seen += 1;
    }
    assert_eq!(seen, 3);
}
