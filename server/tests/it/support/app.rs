//! A server in the test's process, with its own database, used over HTTP.
//!
//! The response to each [`Call`] is validated against the OpenAPI document: if the document contains the operation, the
//! operation must list the status, and a JSON body must match the schema.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use clap::Parser;
use quota_server::{
    clock::{Clock, SystemClock},
    config::{Config, PasswordCost, Settings},
    db::{self, Db},
    jobs::Jobs,
    openapi, router,
    serve::{ServeSettings, Timeouts, serve},
    state::AppState,
    telemetry::log::Log,
};
use reqwest::{Client, Method, RequestBuilder, StatusCode, header::HeaderMap};
use secrecy::SecretString;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{net::TcpListener, sync::watch};

use super::{postgres::TestDatabase, quota::data_dir};

/// The server's OpenAPI document.
pub(crate) static DOCUMENT: LazyLock<Value> =
    LazyLock::new(|| serde_json::from_str(&openapi::text()).expect("the document is JSON"));

/// A valid password.
pub(crate) const PASSWORD: &str = "violet-harbour-quilt-93";

#[derive(Parser)]
#[command(args_override_self = true)]
struct Flags {
    #[command(flatten)]
    settings: Settings,
}

/// A running server.
pub(crate) struct TestApp {
    pub(crate) addr: SocketAddr,
    pub(crate) metrics_addr: SocketAddr,
    /// The address of the gRPC listener, if `--grpc-listen` turns it on.
    pub(crate) grpc_addr: Option<SocketAddr>,
    pub(crate) state: AppState,
    pub(crate) database: Arc<TestDatabase>,
    pub(crate) http: Client,
    stop: watch::Sender<bool>,
    jobs: Option<Jobs>,
    servers: Vec<tokio::task::JoinHandle<()>>,
    /// The data directory, which is deleted with the server unless the test provided it.
    _data: Option<TempDir>,
}

/// The configuration of a test server.
pub(crate) struct Setup {
    flags: Vec<String>,
    clock: Arc<dyn Clock>,
    database: Option<Arc<TestDatabase>>,
    url: Option<String>,
    data_dir: Option<PathBuf>,
    with_jobs: bool,
    log: Option<Log>,
}

impl Setup {
    /// Adds one setting, such as `--auth-rpm=3`.
    pub(crate) fn flag(mut self, flag: impl Into<String>) -> Self {
        self.flags.push(flag.into());
        self
    }

    pub(crate) fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// Uses the database of another server, as a second replica or after a restart.
    pub(crate) fn database(mut self, database: Arc<TestDatabase>) -> Self {
        self.database = Some(database);
        self
    }

    /// Uses another URL for the database, such as that of a proxy.
    pub(crate) fn url(mut self, url: impl Into<String>) -> Self {
        self.url = Some(url.into());
        self
    }

    /// Uses the data directory of another server, or a directory that outlives this server.
    pub(crate) fn data_dir(mut self, path: &Path) -> Self {
        self.data_dir = Some(path.to_owned());
        self
    }

    /// Runs no background jobs, such as polling for invalidations, shipping usage, and sending webhooks and emails.
    pub(crate) fn without_jobs(mut self) -> Self {
        self.with_jobs = false;
        self
    }

    /// Writes log lines to `log` instead of standard output.
    pub(crate) fn log(mut self, log: Log) -> Self {
        self.log = Some(log);
        self
    }

    pub(crate) async fn start(self) -> TestApp {
        let database = match self.database {
            Some(database) => database,
            None => Arc::new(
                TestDatabase::create(|url| async move {
                    db::migrate(&SecretString::from(url)).await.map(drop)
                })
                .await,
            ),
        };
        // Most tests send all requests from one address, so limits per address would apply to all of these requests
        // together. Therefore, these limits are off by default.
        let mut flags = vec![
            "test".to_owned(),
            "--auth-rpm=0".into(),
            "--admin-rpm=0".into(),
            "--login-free-failures=0".into(),
            "--registrations-per-day=0".into(),
        ];
        flags.push("--database-pool=12".into());
        // On a busy machine, PostgreSQL may take much longer than the defaults allow.
        flags.push("--database-wait=10s".into());
        flags.push("--database-statement-timeout=30s".into());
        flags.push("--database-lock-timeout=10s".into());
        flags.push("--usage-backlog-max=67108864".into());
        // The test's own settings override the settings above.
        let name = |flag: &str| flag.split('=').next().unwrap_or_default().to_owned();
        flags.retain(|flag| !self.flags.iter().any(|it| name(it) == name(flag)));
        flags.extend(self.flags);
        let settings = Flags::try_parse_from(flags)
            .expect("the test's flags are valid")
            .settings;
        let data = self.data_dir.is_none().then(data_dir);
        let config = Config {
            password_cost: PasswordCost {
                memory_kib: 64,
                passes: 1,
            },
            data_dir: self
                .data_dir
                .or_else(|| data.as_ref().map(|it| it.path().to_owned()))
                .expect("a data directory"),
            ..Config::read(&settings).expect("the settings of a test are valid")
        };
        let url = SecretString::from(self.url.unwrap_or_else(|| database.url().to_owned()));
        let db = Db::new(&url, &config.database);
        let log = self.log.unwrap_or_else(|| Log::start(config.log_format));
        // Unboxed, this future would make the futures of tests very large.
        let state = Box::pin(AppState::new(config, db, self.clock, log))
            .await
            .expect("the state can be built");
        let jobs = self.with_jobs.then(|| Jobs::start(&state));

        let (stop, stopping) = watch::channel(false);
        let until = |mut stopping: watch::Receiver<bool>| async move {
            let _ = stopping.wait_for(|stop| *stop).await;
        };
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .expect("loopback has a free port");
        let metrics_listener = TcpListener::bind("127.0.0.1:0")
            .await
            .expect("loopback has a free port");
        let (addr, metrics_addr) = (
            listener.local_addr().expect("the socket is bound"),
            metrics_listener.local_addr().expect("the socket is bound"),
        );
        let public = ServeSettings::public(&state, None);
        let public = ServeSettings {
            timeouts: Timeouts {
                drain: Duration::from_secs(5),
                ..public.timeouts
            },
            ..public
        };
        let mut servers = vec![
            tokio::spawn(serve(
                listener,
                router::public(&state),
                router::direct(&state),
                public,
                until(stopping.clone()),
            )),
            tokio::spawn(serve(
                metrics_listener,
                router::metrics(&state),
                None::<Infallible>,
                ServeSettings::metrics(&state),
                until(stopping.clone()),
            )),
        ];
        let mut grpc_addr = None;
        if state.config.grpc_listen.is_some() {
            let listener = TcpListener::bind("127.0.0.1:0")
                .await
                .expect("loopback has a free port");
            grpc_addr = Some(listener.local_addr().expect("the socket is bound"));
            servers.push(tokio::spawn(serve(
                listener,
                router::grpc(&state),
                None::<Infallible>,
                ServeSettings::grpc(&state),
                until(stopping),
            )));
        }
        TestApp {
            addr,
            metrics_addr,
            grpc_addr,
            state,
            database,
            http: Client::new(),
            stop,
            jobs,
            servers,
            _data: data,
        }
    }
}

impl TestApp {
    pub(crate) fn setup() -> Setup {
        Setup {
            flags: Vec::new(),
            clock: Arc::new(SystemClock::new()),
            database: None,
            url: None,
            data_dir: None,
            with_jobs: true,
            log: None,
        }
    }

    pub(crate) async fn start() -> Self {
        Self::setup().start().await
    }

    /// Stops the server as SIGTERM does: requests finish and unused tokens are returned.
    pub(crate) async fn stop(mut self) {
        self.state.begin_draining();
        let _ = self.stop.send(true);
        for server in self.servers.drain(..) {
            server.await.expect("the server ends without a panic");
        }
        self.state.limiter.drain().await;
        if let Some(traces) = &self.state.traces {
            traces.stop().await;
        }
        if let Some(jobs) = self.jobs.take() {
            jobs.stop().await;
        }
    }

    /// Writes all usage recorded so far to the database.
    pub(crate) async fn ship_usage(&self) {
        self.state
            .metering
            .ship()
            .await
            .expect("usage can be shipped");
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.addr)
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> Call {
        Call {
            request: self.http.request(method.clone(), self.url(path)),
            method,
            path: path.to_owned(),
        }
    }

    pub(crate) fn get(&self, path: &str) -> Call {
        self.request(Method::GET, path)
    }

    pub(crate) fn post(&self, path: &str, body: Value) -> Call {
        self.request(Method::POST, path).json(body)
    }

    /// Creates an account with a new email address.
    pub(crate) async fn register(&self) -> Account {
        let email = format!("user-{}@example.com", uuid::Uuid::now_v7().simple());
        let made = self
            .post(
                "/auth/register",
                json!({"email": email, "password": PASSWORD}),
            )
            .send()
            .await;
        assert_eq!(made.status, 201, "{}", made.body);
        Account {
            email,
            access_token: made.text("access_token"),
            refresh_token: made.text("refresh_token"),
            user_id: made.body["user"]["id"].as_str().expect("an id").to_owned(),
            tenant_id: made.body["tenant"]["id"]
                .as_str()
                .expect("an id")
                .to_owned(),
        }
    }

    /// Creates a plan. Returns its ID.
    pub(crate) async fn plan(&self, account: &Account, plan: Value) -> String {
        let mut body = json!({"name": format!("Plan {}", uuid::Uuid::now_v7()), "default_rpm": 60});
        for (field, value) in plan.as_object().expect("an object") {
            body[field] = value.clone();
        }
        let made = self
            .post("/admin/plans", body)
            .bearer(&account.access_token)
            .send()
            .await;
        assert_eq!(made.status, 201, "{}", made.body);
        made.text("id")
    }

    /// Creates a key on a plan.
    pub(crate) async fn key(&self, account: &Account, plan_id: &str) -> Key {
        let body = json!({"name": "Key", "plan_id": plan_id});
        let made = self
            .post("/admin/api-keys", body)
            .bearer(&account.access_token)
            .send()
            .await;
        assert_eq!(made.status, 201, "{}", made.body);
        Key {
            text: made.text("key"),
            id: made.body["api_key"]["id"]
                .as_str()
                .expect("an id")
                .to_owned(),
        }
    }

    /// Creates a service token. Returns its secret.
    pub(crate) async fn service_token(&self, account: &Account) -> String {
        let made = self
            .post("/admin/service-tokens", json!({"name": "Gateway"}))
            .bearer(&account.access_token)
            .send()
            .await;
        assert_eq!(made.status, 201, "{}", made.body);
        made.text("token")
    }

    /// Creates a webhook with a public address, to which nothing is sent. Returns its ID.
    pub(crate) async fn webhook(&self, account: &Account) -> String {
        let body = json!({"name": "Hook", "url": "https://8.8.8.8/hook"});
        let made = self.act(account, "POST", "/admin/webhooks", body).await;
        assert_eq!(made.status, 201, "{}", made.body);
        let id = made.body["webhook"]["id"].as_str().expect("an id");
        id.to_owned()
    }

    /// Creates a delivery to a webhook. Returns its ID.
    pub(crate) async fn webhook_delivery(&self, account: &Account, webhook: &str) -> String {
        let path = format!("/admin/webhooks/{webhook}/test");
        let made = self.act(account, "POST", &path, Value::Null).await;
        assert_eq!(made.status, 201, "{}", made.body);
        made.text("id")
    }

    /// Sends a request with an account's credentials. `Null` means no body.
    pub(crate) async fn act(
        &self,
        account: &Account,
        method: &str,
        path: &str,
        body: Value,
    ) -> Answer {
        let method = method.parse::<Method>().expect("a method");
        let call = self.request(method, path).bearer(&account.access_token);
        if body.is_null() {
            call.send().await
        } else {
            call.json(body).send().await
        }
    }

    /// Returns every row of every table as JSON, so that tests can search for content that must not be stored.
    pub(crate) async fn everything_kept(&self) -> String {
        let client = self.database.connect().await;
        let tables = client
            .query(
                "SELECT tablename FROM pg_tables WHERE schemaname = 'public'",
                &[],
            )
            .await
            .expect("tables are listed");
        let mut kept = String::new();
        for table in tables {
            let table: String = table.get(0);
            let rows = client
                .query(
                    &format!("SELECT row_to_json(t)::text FROM \"{table}\" t"),
                    &[],
                )
                .await
                .expect("a table is read");
            for row in rows {
                kept += row.get::<_, &str>(0);
            }
        }
        kept
    }

    pub(crate) async fn echo(&self, key: &str) -> Answer {
        self.get("/v1/echo").header("X-API-Key", key).send().await
    }

    /// Returns a value of `/metrics`, which must exist.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let value = self.metric_if_present(name).await;
        value.unwrap_or_else(|| panic!("there is no value of {name}"))
    }

    /// Sends requests until one is denied. Returns how many were allowed.
    pub(crate) async fn spend(&self, key: &str) -> u32 {
        let (mut served, mut unavailable) = (0, 0);
        loop {
            let answer = self.echo(key).await;
            match answer.status {
                200 => served += 1,
                429 => return served,
                // On a busy machine, the ledger may respond too late.
                503 if unavailable < 20 => {
                    assert_eq!(answer.problem(), "temporary-reduced-capacity");
                    unavailable += 1;
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                other => panic!("{other}: {}", answer.text),
            }
        }
    }

    /// Waits until this replica notices a change made on another replica. Panics after ten polls, which are normally
    /// 150 ms apart. Polls are counted instead of time, because a busy machine delays them.
    pub(crate) async fn notices(&self, change: &str, mut is_noticed: impl AsyncFnMut() -> bool) {
        let polls = async || self.metric("quota_invalidation_polls_total").await;
        let before = polls().await;
        let began = Instant::now();
        while !is_noticed().await {
            assert!(began.elapsed() < Duration::from_secs(60), "{change}");
            assert!(
                polls().await <= before + 10.0,
                "{change} was not noticed within ten polls"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Returns a value of `/metrics`, or `None` if the metric has no value with these labels. The metric itself must
    /// exist.
    pub(crate) async fn metric_if_present(&self, name: &str) -> Option<f64> {
        let url = format!("http://{}/metrics", self.metrics_addr);
        let text = self
            .http
            .get(url)
            .send()
            .await
            .expect("metrics")
            .text()
            .await
            .expect("metrics");
        let family = name.split('{').next().unwrap_or_default();
        let suffixes = ["_total", "_sum", "_count", "_bucket"];
        let family = suffixes
            .iter()
            .find_map(|suffix| family.strip_suffix(suffix))
            .unwrap_or(family);
        assert!(
            text.contains(&format!("# TYPE {family} ")),
            "there is no metric {family}"
        );
        text.lines().find_map(|line| {
            line.strip_prefix(name)?
                .strip_prefix(' ')?
                .trim()
                .parse()
                .ok()
        })
    }
}

impl Drop for TestApp {
    fn drop(&mut self) {
        let _ = self.stop.send(true);
    }
}

pub(crate) struct Account {
    pub(crate) email: String,
    pub(crate) access_token: String,
    pub(crate) refresh_token: String,
    pub(crate) user_id: String,
    pub(crate) tenant_id: String,
}

pub(crate) struct Key {
    pub(crate) text: String,
    pub(crate) id: String,
}

/// A request that is being built.
pub(crate) struct Call {
    request: RequestBuilder,
    method: Method,
    path: String,
}

impl Call {
    pub(crate) fn bearer(mut self, token: &str) -> Self {
        self.request = self.request.bearer_auth(token);
        self
    }

    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.request = self.request.header(name, value);
        self
    }

    #[expect(clippy::needless_pass_by_value, reason = "reads better at every call")]
    pub(crate) fn json(mut self, body: Value) -> Self {
        self.request = self.request.json(&body);
        self
    }

    pub(crate) fn body(mut self, media_type: &str, body: impl Into<reqwest::Body>) -> Self {
        self.request = self.request.header("content-type", media_type).body(body);
        self
    }

    /// Sends the request and validates the response.
    pub(crate) async fn send(self) -> Answer {
        let response = self.request.send().await.expect("the server responds");
        let (status, headers) = (response.status(), response.headers().clone());
        let mut response = response;
        let text = if media_type(&headers) == "text/event-stream" {
            // The response is endless. Its first bytes show that the stream is open.
            let first = response.chunk().await.expect("a stream begins");
            String::from_utf8(first.expect("a stream begins").to_vec()).expect("events are text")
        } else {
            response.text().await.expect("the body arrives whole")
        };
        let body = serde_json::from_str(&text).unwrap_or(Value::Null);
        let answer = Answer {
            status: status.as_u16(),
            headers,
            body,
            text,
        };
        answer.check(
            &self.method,
            self.path.split('?').next().unwrap_or_default(),
            status,
        );
        answer
    }
}

/// Returns the media type of a response, without its parameters.
fn media_type(headers: &HeaderMap) -> &str {
    let media_type = headers.get("content-type").and_then(|it| it.to_str().ok());
    media_type
        .unwrap_or_default()
        .split(';')
        .next()
        .unwrap_or_default()
}

/// A validated response.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    /// `Null` if the body is not JSON.
    pub(crate) body: Value,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .get(name)
            .map(|value| value.to_str().expect("fields are text"))
    }

    pub(crate) fn number(&self, name: &str) -> u64 {
        let value = self
            .header(name)
            .unwrap_or_else(|| panic!("no {name} in {:?}", self.headers));
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name} is {value}"))
    }

    /// Returns a string field of the body.
    pub(crate) fn text(&self, field: &str) -> String {
        self.body[field]
            .as_str()
            .unwrap_or_else(|| panic!("no {field} in {}", self.body))
            .to_owned()
    }

    /// Returns the last segment of the problem's type.
    pub(crate) fn problem(&self) -> &str {
        let kind = self.body["type"].as_str().unwrap_or_default();
        kind.rsplit(['/', '#']).next().unwrap_or_default()
    }

    fn check(&self, method: &Method, path: &str, status: StatusCode) {
        assert!(
            self.headers.contains_key("x-request-id"),
            "every response has an ID"
        );
        assert_ne!(
            status,
            StatusCode::INTERNAL_SERVER_ERROR,
            "{method} {path}: {}",
            self.text
        );
        if status.is_client_error() || status.is_server_error() {
            assert!(
                self.text.is_empty()
                    || self.header("content-type") == Some("application/problem+json"),
                "{method} {path}: {}",
                self.text
            );
        }
        if status == StatusCode::UNAUTHORIZED {
            assert!(
                self.headers.contains_key("www-authenticate"),
                "{method} {path}"
            );
        }
        let Some((template, operation)) = operation(method, path) else {
            return;
        };
        let answers = &operation["responses"];
        let answer = &answers[status.as_str()];
        assert!(
            !answer.is_null(),
            "{method} {template} returned {status}, which the document does not list: {}",
            self.text
        );
        let Some(content) = answer["content"].as_object() else {
            assert_eq!(
                self.text, "",
                "{method} {template} {status} has no body in the document"
            );
            return;
        };
        if method == Method::HEAD || (self.text.is_empty() && template == "/v1/forward-auth") {
            return;
        }
        let media_type = media_type(&self.headers);
        let schema = content
            .iter()
            .find(|(name, _)| name.split(';').next() == Some(media_type))
            .map(|(_, content)| content["schema"].clone());
        let schema = schema
            .unwrap_or_else(|| panic!("{method} {template} {status} is {media_type}: {content:?}"));
        if media_type.starts_with("text/") {
            return;
        }
        let faults = faults(&schema, &self.body);
        assert!(
            faults.is_empty(),
            "{method} {template} {status} does not match the schema: {faults:?} in {}",
            self.text
        );
    }
}

/// Finds the operation of a request in the document.
pub(crate) fn operation(method: &Method, path: &str) -> Option<(String, &'static Value)> {
    let parts = path.split('/').collect::<Vec<_>>();
    let paths = DOCUMENT["paths"].as_object().expect("paths");
    let fits = |template: &str| {
        let names = template.split('/').collect::<Vec<_>>();
        names.len() == parts.len()
            && names
                .iter()
                .zip(&parts)
                .all(|(name, part)| name.starts_with('{') || name == part)
    };
    // A literal path takes precedence over a path with parameters.
    let mut found = paths
        .iter()
        .filter(|(template, _)| fits(template))
        .collect::<Vec<_>>();
    found.sort_by_key(|(template, _)| template.matches('{').count());
    let (template, operations) = found.first()?;
    // Forward-auth accepts any method but is documented for only one.
    let is_documented = !matches!(method.as_str(), "TRACE" | "BREW");
    let method = match path {
        "/v1/forward-auth" if is_documented => "get".to_owned(),
        _ => method.as_str().to_lowercase(),
    };
    let operation = &operations[method];
    (!operation.is_null()).then(|| ((*template).clone(), operation))
}

/// Returns how a value violates a schema of the document. OpenAPI 3.0 uses `nullable` instead of JSON Schema's type
/// `null`.
pub(crate) fn faults(schema: &Value, value: &Value) -> Vec<String> {
    static COMPONENTS: LazyLock<Value> = LazyLock::new(|| {
        let mut components = DOCUMENT["components"].clone();
        nullable(&mut components);
        components
    });
    let mut schema = schema.clone();
    nullable(&mut schema);
    schema["components"] = COMPONENTS.clone();
    let validator = jsonschema::draft4::new(&schema).expect("the document's schemas are valid");
    validator
        .iter_errors(value)
        .map(|error| format!("{}: {error}", error.instance_path()))
        .collect()
}

fn nullable(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            if fields.get("nullable") == Some(&Value::Bool(true)) {
                let plain = Value::Object(
                    fields
                        .clone()
                        .into_iter()
                        .filter(|(name, _)| name != "nullable")
                        .collect(),
                );
                *fields = HashMap::from([("anyOf".to_owned(), json!([plain, {"type": "null"}]))])
                    .into_iter()
                    .collect();
            }
            fields.values_mut().for_each(nullable);
        }
        Value::Array(items) => items.iter_mut().for_each(nullable),
        _ => {}
    }
}
