//! Requests: a [`Call`] goes to one server and its answer comes back as text. Knows neither the keychain nor Tauri.
//!
//! Only what [`Call::sent`] makes of a call is ever sent, and only to the server's own origin: redirects are not
//! followed, so no credential goes anywhere else.

use std::time::{Duration, Instant};

use quota_common::{
    Problem,
    call::{Call, LIMIT_FIELDS, Sent},
    shell::{Refusal, Tried},
};
use reqwest::{Method, RequestBuilder, Response, redirect};
use secrecy::{ExposeSecret as _, SecretString};

use crate::server::Server;

const CONNECT: Duration = Duration::from_secs(5);
const ANSWER: Duration = Duration::from_secs(20);
/// No answer of ours comes near it.
const LONGEST_BODY: usize = 8 * 1024 * 1024;

/// What opens the server for a call.
pub enum Credential<'a> {
    None,
    Access(&'a SecretString),
    /// Goes into the body.
    Refresh(&'a SecretString),
}

#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    server: Server,
}

impl Client {
    pub fn new(server: Server) -> Result<Self, reqwest::Error> {
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!(
                "Quota-Desktop/",
                env!("CARGO_PKG_VERSION"),
                " (Linux)"
            ))
            .redirect(redirect::Policy::none())
            .connect_timeout(CONNECT)
            .timeout(ANSWER);
        builder = if server.is_loopback() {
            builder.no_proxy()
        } else {
            builder.https_only(true)
        };
        Ok(Self {
            http: builder.build()?,
            server,
        })
    }

    pub fn server(&self) -> &Server {
        &self.server
    }

    /// The body of a good answer.
    pub async fn send(&self, call: &Call, credential: Credential<'_>) -> Result<String, Refusal> {
        let mut sent = call.sent();
        let mut bearer = None;
        match credential {
            Credential::None => {}
            Credential::Access(token) => bearer = Some(token),
            Credential::Refresh(token) => {
                sent.body = Some(serde_json::json!({ "refresh_token": token.expose_secret() }));
            }
        }
        let mut request = self.request(&sent)?;
        if let Some(token) = bearer {
            request = request.bearer_auth(token.expose_secret());
        }
        let response = self.answer(&sent, request).await?;
        let status = response.status();
        let body = text(response).await?;
        if status.is_success() {
            return Ok(body);
        }
        match serde_json::from_str::<Problem>(&body) {
            Ok(problem) => Err(Refusal::Problem {
                problem: Box::new(problem),
            }),
            // A proxy in between answers for a server that is away.
            Err(_) if status.is_server_error() => Err(Refusal::Unreachable),
            Err(_) => Err(Refusal::Unreadable),
        }
    }

    /// Sends a request as a consumer would: with the key and nothing of the session.
    pub async fn try_key(&self, key: &SecretString) -> Result<Tried, Refusal> {
        let sent = Call::Echo.sent();
        let request = self
            .request(&sent)?
            .header("x-api-key", key.expose_secret());
        let response = self.answer(&sent, request).await?;
        let field = |name: &str| {
            let value = response.headers().get(name)?.to_str().ok()?;
            Some((name.to_owned(), value.to_owned()))
        };
        Ok(Tried {
            status: response.status().as_u16(),
            headers: LIMIT_FIELDS.iter().filter_map(|name| field(name)).collect(),
        })
    }

    /// Whether a Quota server answers there.
    pub async fn is_there(&self) -> bool {
        let request = self.http.get(self.server.at("/health/live"));
        let Ok(response) = request.send().await else {
            return false;
        };
        let good = response.status().is_success();
        let body = text(response).await.unwrap_or_default();
        good && serde_json::from_str::<quota_common::health::Health>(&body).is_ok()
    }

    fn request(&self, sent: &Sent) -> Result<RequestBuilder, Refusal> {
        let method = Method::from_bytes(sent.method.as_bytes()).map_err(|_| Refusal::Unreadable)?;
        let mut url = self.server.at(&sent.path);
        if !sent.query.is_empty() {
            url.query_pairs_mut().extend_pairs(&sent.query);
        }
        let request = self.http.request(method, url);
        Ok(match &sent.body {
            Some(body) => request.json(body),
            None => request,
        })
    }

    async fn answer(&self, sent: &Sent, request: RequestBuilder) -> Result<Response, Refusal> {
        let began = Instant::now();
        let answer = request.send().await;
        let ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let (method, path) = (sent.method, sent.path.as_str());
        match answer {
            Ok(response) => {
                tracing::info!(
                    method,
                    path,
                    status = response.status().as_u16(),
                    ms,
                    "asked"
                );
                Ok(response)
            }
            Err(error) => {
                let error = error.without_url();
                tracing::warn!(
                    method,
                    path,
                    ms,
                    error = &error as &dyn std::error::Error,
                    "not reached"
                );
                Err(Refusal::Unreachable)
            }
        }
    }
}

async fn text(mut response: Response) -> Result<String, Refusal> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|_| Refusal::Unreachable)? {
        if body.len() + chunk.len() > LONGEST_BODY {
            return Err(Refusal::Unreadable);
        }
        body.extend_from_slice(&chunk);
    }
    String::from_utf8(body).map_err(|_| Refusal::Unreadable)
}
