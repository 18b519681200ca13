//! Tests webhooks that were signed by another program: localstripe, an independent substitute for Stripe.
//!
//! localstripe is not part of this repository. The test installs it from PyPI into the target directory.

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use reqwest::Client;
use serde_json::{Value, json};

use crate::support::{app::TestApp, stripe::TestStripe};

const VERSION: &str = "1.15.10";
const AT_MOST: Duration = Duration::from_secs(60);

/// Installs localstripe if it is not installed yet. Returns the path of its program.
fn install() -> Result<PathBuf, String> {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("localstripe-{VERSION}"));
    let program = dir.join("bin/localstripe");
    if program.exists() {
        return Ok(program);
    }
    let run = |program: &Path, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output();
        let output = output.map_err(|error| format!("{}: {error}", program.display()))?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        output.status.success().then_some(()).ok_or(text)
    };
    let target = dir.to_str().ok_or("the target directory is not text")?;
    run(Path::new("python3"), &["-m", "venv", target])?;
    let package = format!("localstripe=={VERSION}");
    let arguments = [
        "install",
        "--quiet",
        "--retries=0",
        "--timeout=10",
        &package,
    ];
    run(&dir.join("bin/pip"), &arguments)?;
    Ok(program)
}

/// A running localstripe, which is killed when the test ends.
struct LocalStripe {
    child: Child,
    url: String,
    http: Client,
}

impl Drop for LocalStripe {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl LocalStripe {
    async fn start(program: &Path) -> Self {
        let free = TcpListener::bind("127.0.0.1:0").and_then(|it| it.local_addr());
        let port = free.expect("loopback has a free port").port();
        let child = Command::new(program)
            .args(["--from-scratch", &format!("--port={port}")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("localstripe is installed");
        let it = Self {
            child,
            url: format!("http://127.0.0.1:{port}"),
            http: Client::new(),
        };
        let began = Instant::now();
        while it.http.get(&it.url).send().await.is_err() {
            assert!(began.elapsed() < AT_MOST, "localstripe does not start");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        it
    }

    async fn post(&self, path: &str, body: Value) -> Value {
        let call = self.http.post(format!("{}{path}", self.url)).json(&body);
        let answer = call.bearer_auth("sk_test_12345").send().await;
        let answer = answer.expect("the server responds");
        assert!(answer.status().is_success(), "{path}: {}", answer.status());
        answer.json().await.unwrap_or_default()
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "installs localstripe from PyPI"]
async fn webhooks_of_localstripe_are_accepted() {
    let program = match install() {
        Ok(program) => program,
        Err(error) => {
            println!("skipped: localstripe {VERSION} cannot be installed: {error}");
            return;
        }
    };
    let stripe = TestStripe::start().await;
    let app: TestApp = stripe.app().await;
    let local = LocalStripe::start(&program).await;
    let client = app.database.connect().await;
    let kinds = async || {
        let sql = "SELECT kind FROM billing_events WHERE body LIKE '%2017-08-15%' ORDER BY kind";
        let rows = client.query(sql, &[]).await.expect("events");
        rows.iter().map(|row| row.get(0)).collect::<Vec<String>>()
    };
    let webhook =
        |secret: &str| json!({"url": app.url("/billing/stripe/webhook"), "secret": secret});
    local
        .post("/_config/webhooks/1", webhook(&stripe.secret))
        .await;
    let customer = local
        .post("/v1/customers", json!({"email": "a@example.com"}))
        .await;
    let id = customer["id"].as_str().expect("an ID");
    let plan = json!({"id": "plan", "amount": 2900, "currency": "eur", "interval": "month", "name": "Quota"});
    local.post("/v1/plans", plan).await;
    let path = format!("/v1/customers/{id}");
    local
        .post(&path, json!({"description": "Grüße, “Acme” 你好"}))
        .await;
    let expected = [
        "customer.created",
        "customer.updated",
        "plan.created",
        "product.created",
    ];
    let began = Instant::now();
    while kinds().await != expected {
        assert!(began.elapsed() < AT_MOST, "{:?}", kinds().await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // The events are ignored, because they belong to a customer that this server does not have.
    let waiting = "SELECT count(*) FROM billing_events WHERE outcome IS DISTINCT FROM 'ignored'";
    while client
        .query_one(waiting, &[])
        .await
        .expect("a count")
        .get::<_, i64>(0)
        > 0
    {
        assert!(began.elapsed() < AT_MOST, "not processed");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let bad = async || app.metric("quota_billing_signatures_bad_total").await;
    assert!(bad().await < 0.5);

    // Webhooks that are signed with another secret are rejected.
    local
        .post("/_config/webhooks/1", webhook("whsec_of_someone_else"))
        .await;
    local
        .post("/v1/customers", json!({"email": "b@example.com"}))
        .await;
    let began = Instant::now();
    while bad().await < 0.5 {
        assert!(began.elapsed() < AT_MOST, "nothing was rejected");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(kinds().await, expected);
}
