//! A tenant with plans and keys, managed over HTTP.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use http::{HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::handshake;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{
    net::TcpStream,
    time::{Instant, sleep},
};

/// How long to repeat a request that gets 503. On a busy machine, PostgreSQL may respond too late.
const REPEATED_FOR: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(100);

/// A signed-in owner, who can use any replica.
#[derive(Clone)]
pub(crate) struct Tenant {
    email: String,
    /// The access token, which is valid for 15 minutes.
    token: String,
}

/// A plan to create.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) name: String,
    pub(crate) rpm: u32,
    pub(crate) burst: u32,
    pub(crate) strict: bool,
    pub(crate) daily: Option<u64>,
    pub(crate) monthly: Option<u64>,
    /// Behavior of the plan's keys while Redis is unreachable. `None` for the server default.
    pub(crate) on_redis_failure: Option<&'static str>,
}

impl Plan {
    pub(crate) fn new(name: impl Into<String>, rpm: u32, burst: u32) -> Self {
        Self {
            name: name.into(),
            rpm,
            burst,
            strict: false,
            daily: None,
            monthly: None,
            on_redis_failure: None,
        }
    }

    fn body(&self) -> Value {
        let mut body = json!({
            "name": self.name, "default_rpm": self.rpm, "burst": self.burst, "strict": self.strict,
        });
        if let Some(daily) = self.daily {
            body["daily_quota"] = daily.into();
        }
        if let Some(monthly) = self.monthly {
            body["monthly_quota"] = monthly.into();
        }
        if let Some(mode) = self.on_redis_failure {
            body["on_redis_failure"] = mode.into();
        }
        body
    }
}

pub(crate) struct Key {
    pub(crate) id: String,
    pub(crate) text: HeaderValue,
}

impl Tenant {
    pub(crate) async fn register(server: SocketAddr) -> Result<Self> {
        let email = format!("bench-{:08x}@example.com", fastrand::u32(..));
        let token = access_token(server, "/auth/register", &email).await?;
        Ok(Self { email, token })
    }

    /// Gets a new access token.
    pub(crate) async fn sign_in(&mut self, server: SocketAddr) -> Result<()> {
        self.token = access_token(server, "/auth/login", &self.email).await?;
        Ok(())
    }

    /// Sends a request and returns the JSON of the response. Repeats the request for up to a minute while the status
    /// is 503. Fails if the final status is not 2xx, unless it is 404 after a repeated DELETE.
    pub(crate) async fn call(
        &self,
        server: SocketAddr,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value> {
        call(server, method, path, Some(&self.token), body).await
    }

    pub(crate) async fn plan(&self, server: SocketAddr, plan: &Plan) -> Result<String> {
        let made = self
            .call(server, Method::POST, "/admin/plans", Some(&plan.body()))
            .await?;
        text(&made, "id")
    }

    pub(crate) async fn key(&self, server: SocketAddr, plan_id: &str) -> Result<Key> {
        let body = json!({"name": "bench", "plan_id": plan_id});
        let made = self
            .call(server, Method::POST, "/admin/api-keys", Some(&body))
            .await?;
        Ok(Key {
            id: text(&made["api_key"], "id")?,
            text: HeaderValue::from_str(&text(&made, "key")?)?,
        })
    }

    /// Creates a token for the check API.
    pub(crate) async fn service_token(&self, server: SocketAddr) -> Result<HeaderValue> {
        let body = json!({"name": "bench"});
        let made = self
            .call(server, Method::POST, "/admin/service-tokens", Some(&body))
            .await?;
        Ok(HeaderValue::from_str(&text(&made, "token")?)?)
    }

    /// Creates a plan, and a key on this plan.
    pub(crate) async fn key_on(&self, server: SocketAddr, plan: &Plan) -> Result<Key> {
        let id = self.plan(server, plan).await?;
        self.key(server, &id).await
    }
}

async fn access_token(server: SocketAddr, path: &str, email: &str) -> Result<String> {
    let account = json!({"email": email, "password": "correct horse battery staple 47"});
    let account = call(server, Method::POST, path, None, Some(&account)).await?;
    text(&account, "access_token")
}

fn text(value: &Value, name: &str) -> Result<String> {
    let text = value[name].as_str();
    Ok(text
        .with_context(|| format!("{name} is missing from {value}"))?
        .to_owned())
}

async fn call(
    server: SocketAddr,
    method: Method,
    path: &str,
    token: Option<&str>,
    body: Option<&Value>,
) -> Result<Value> {
    let deadline = Instant::now() + REPEATED_FOR;
    let (mut status, mut bytes) = send(server, &method, path, token, body).await?;
    let is_repeated = status == StatusCode::SERVICE_UNAVAILABLE;
    while status == StatusCode::SERVICE_UNAVAILABLE && Instant::now() < deadline {
        sleep(PAUSE).await;
        (status, bytes) = send(server, &method, path, token, body).await?;
    }
    // A deletion that got 503 may have taken effect nevertheless.
    if is_repeated && method == Method::DELETE && status == StatusCode::NOT_FOUND {
        return Ok(Value::Null);
    }
    if !status.is_success() {
        bail!(
            "{method} {path} returned {status}: {}",
            String::from_utf8_lossy(&bytes)
        );
    }
    if bytes.is_empty() {
        return Ok(Value::Null);
    }
    Ok(serde_json::from_slice(&bytes)?)
}

/// Sends a request once.
async fn send(
    server: SocketAddr,
    method: &Method,
    path: &str,
    token: Option<&str>,
    body: Option<&Value>,
) -> Result<(StatusCode, Bytes)> {
    let stream = TcpStream::connect(server).await?;
    stream.set_nodelay(true)?;
    let (mut sender, connection) = handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let mut request = Request::builder()
        .method(method.clone())
        .uri(path)
        .header(header::HOST, server.to_string())
        .header(header::CONTENT_TYPE, "application/json");
    if let Some(token) = token {
        request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
    }
    let body = body.map(Value::to_string).unwrap_or_default();
    let answer = sender
        .send_request(request.body(Full::new(Bytes::from(body)))?)
        .await?;
    let status = answer.status();
    let bytes = answer.into_body().collect().await?.to_bytes();
    connection.abort();
    Ok((status, bytes))
}

/// Returns whether the server's OpenAPI document contains a word, such as the name of a field that an earlier version
/// does not have.
pub(crate) async fn knows(server: SocketAddr, word: &str) -> Result<bool> {
    let document = call(server, Method::GET, "/openapi.json", None, None).await?;
    Ok(document.to_string().contains(&format!("\"{word}\"")))
}

/// Returns a metric of a replica.
pub(crate) async fn counted(metrics: SocketAddr, name: &str) -> Result<u64> {
    let stream = TcpStream::connect(metrics).await?;
    let (mut sender, connection) = handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let request = Request::get("/metrics").header(header::HOST, metrics.to_string());
    let request = request.body(Full::new(Bytes::new()))?;
    let answer = sender.send_request(request).await?;
    let bytes = answer.into_body().collect().await?.to_bytes();
    connection.abort();
    let text = String::from_utf8(bytes.to_vec())?;
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let value = value.with_context(|| format!("{name} is not among the metrics"))?;
    Ok(value.parse()?)
}
