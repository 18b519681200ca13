//! Sends a [`Call`] to a server over HTTP, and returns the response body. Does not depend on the keychain or Tauri.
//!
//! The client sends requests only to the server's own origin. It does not follow redirects, so that credentials cannot
//! reach another host.

use std::time::{Duration, Instant};

use quota_common::{
    Problem,
    call::{Call, LIMIT_FIELDS, Sent},
    ipc::{CallError, TestResponse},
};
use reqwest::{Method, RequestBuilder, Response, header::CONTENT_TYPE, redirect};
use secrecy::{ExposeSecret as _, SecretString};

use crate::server::Server;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(20);
/// The maximum size of a response body, far larger than any API response.
const MAX_BODY: usize = 8 * 1024 * 1024;

pub enum Credential<'a> {
    None,
    Access(&'a SecretString),
    /// A refresh token, which is sent in the body.
    Refresh(&'a SecretString),
}

#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    server: Server,
}

impl Client {
    pub fn new(server: Server) -> Result<Self, reqwest::Error> {
        Self::with_timeout(server, RESPONSE_TIMEOUT)
    }

    fn with_timeout(server: Server, timeout: Duration) -> Result<Self, reqwest::Error> {
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!(
                "Quota-Desktop/",
                env!("CARGO_PKG_VERSION"),
                " (Linux)"
            ))
            .redirect(redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(timeout);
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

    pub async fn send(&self, call: &Call, credential: Credential<'_>) -> Result<String, CallError> {
        let mut sent = call.sent();
        let mut bearer = None;
        match credential {
            Credential::None => {}
            Credential::Access(token) => bearer = Some(token),
            Credential::Refresh(token) => {
                let body = serde_json::json!({ "refresh_token": token.expose_secret() });
                sent.body = Some(body.to_string());
            }
        }
        let mut request = self.request(&sent)?;
        if let Some(token) = bearer {
            request = request.bearer_auth(token.expose_secret());
        }
        let response = self
            .execute(&sent, request)
            .await
            .map_err(|error| failure(&error, call))?;
        let status = response.status();
        let body = read_body(response, call.is_change()).await?;
        if status.is_success() {
            return Ok(body);
        }
        match serde_json::from_str::<Problem>(&body) {
            Ok(problem) => Err(CallError::Problem {
                problem: Box::new(problem),
            }),
            // A proxy responded on behalf of an unreachable server.
            Err(_) if status.is_server_error() => Err(CallError::Unreachable),
            Err(_) => Err(CallError::Unreadable),
        }
    }

    /// Sends a request as an API client would: with the key and without the session.
    pub async fn try_key(&self, key: &SecretString) -> Result<TestResponse, CallError> {
        let sent = Call::Echo.sent();
        let request = self
            .request(&sent)?
            .header("x-api-key", key.expose_secret());
        let response = self
            .execute(&sent, request)
            .await
            .map_err(|_| CallError::Unreachable)?;
        let field = |name: &str| {
            let value = response.headers().get(name)?.to_str().ok()?;
            Some((name.to_owned(), value.to_owned()))
        };
        let status = response.status();
        let headers = LIMIT_FIELDS.iter().filter_map(|name| field(name)).collect();
        let problem = if status.is_success() {
            None
        } else {
            let body = read_body(response, false).await?;
            serde_json::from_str(&body).ok()
        };
        Ok(TestResponse {
            status: status.as_u16(),
            headers,
            problem,
        })
    }

    pub async fn is_quota_server(&self) -> bool {
        let request = self.http.get(self.server.at("/health/live"));
        let Ok(response) = request.send().await else {
            return false;
        };
        let is_success = response.status().is_success();
        let body = read_body(response, false).await.unwrap_or_default();
        is_success && serde_json::from_str::<quota_common::health::Health>(&body).is_ok()
    }

    fn request(&self, sent: &Sent) -> Result<RequestBuilder, CallError> {
        let method =
            Method::from_bytes(sent.method.as_bytes()).map_err(|_| CallError::Unreadable)?;
        let mut url = self.server.at(&sent.path);
        if !sent.query.is_empty() {
            url.query_pairs_mut().extend_pairs(&sent.query);
        }
        let request = self.http.request(method, url);
        Ok(match &sent.body {
            Some(body) => request
                .header(CONTENT_TYPE, "application/json")
                .body(body.clone()),
            None => request,
        })
    }

    async fn execute(
        &self,
        sent: &Sent,
        request: RequestBuilder,
    ) -> Result<Response, reqwest::Error> {
        let started = Instant::now();
        let result = request.send().await;
        let ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let (method, path) = (sent.method, sent.path.as_str());
        match result {
            Ok(response) => {
                tracing::info!(
                    method,
                    path,
                    status = response.status().as_u16(),
                    ms,
                    "request sent"
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
                    "server unreachable"
                );
                Err(error)
            }
        }
    }
}

/// Returns why a call has no response. [`CallError::NoResponse`] means that the server may have received a change,
/// which may therefore still take effect.
fn failure(error: &reqwest::Error, call: &Call) -> CallError {
    if error.is_timeout() && !error.is_connect() && call.is_change() {
        CallError::NoResponse
    } else {
        CallError::Unreachable
    }
}

/// Returns the body of a response. If the body ends early, a change may nevertheless take effect.
async fn read_body(mut response: Response, is_change: bool) -> Result<String, CallError> {
    let mut body = Vec::new();
    loop {
        match response.chunk().await {
            Ok(Some(chunk)) if body.len() + chunk.len() > MAX_BODY => {
                return Err(CallError::Unreadable);
            }
            Ok(Some(chunk)) => body.extend_from_slice(&chunk),
            Ok(None) => return String::from_utf8(body).map_err(|_| CallError::Unreadable),
            Err(error) => {
                tracing::warn!(
                    error = &error.without_url() as &dyn std::error::Error,
                    "incomplete response"
                );
                return Err(if is_change {
                    CallError::NoResponse
                } else {
                    CallError::Incomplete
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use quota_common::{auth::UpdateMe, call::PageOf};
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    async fn outcomes(server: &str, timeout: Duration) -> [Option<CallError>; 2] {
        let server = Server::parse(server).expect("a server");
        let client = Client::with_timeout(server, timeout).expect("a client");
        let change = Call::UpdateMe(UpdateMe::default());
        let list = Call::ListServiceTokens(PageOf::default());
        [
            client.send(&change, Credential::None).await.err(),
            client.send(&list, Credential::None).await.err(),
        ]
    }

    /// A response whose body ends early is not the same as an unreachable server.
    #[tokio::test]
    async fn incomplete_response_is_not_an_unreachable_server() {
        for closes in [false, true] {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            let address = format!("http://{}", listener.local_addr().expect("an address"));
            let serving = tokio::spawn(async move {
                let mut open = Vec::new();
                loop {
                    let (mut stream, _) = listener.accept().await.expect("a connection");
                    let _ = stream.read(&mut [0; 4096]).await;
                    let start = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{";
                    stream.write_all(start).await.expect("sent");
                    if !closes {
                        open.push(stream);
                    }
                }
            });
            // The head of the response must arrive in time, even if the machine is busy.
            let timeout = if closes { LONG } else { Duration::from_secs(3) };
            let outcomes = outcomes(&address, timeout).await;
            let expected = [CallError::NoResponse, CallError::Incomplete];
            assert_eq!(outcomes, expected.map(Some), "{closes}");
            serving.abort();
        }
    }

    #[tokio::test]
    async fn only_a_change_that_was_sent_may_still_take_effect() {
        // Connections are established, but no request is read.
        let silent = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = format!("http://{}", silent.local_addr().expect("an address"));
        let expected = [CallError::NoResponse, CallError::Unreachable];
        let short = Duration::from_millis(300);
        assert_eq!(outcomes(&address, short).await, expected.map(Some));
        drop(silent);
        let expected = [CallError::Unreachable, CallError::Unreachable];
        assert_eq!(outcomes(&address, LONG).await, expected.map(Some));
    }
}
