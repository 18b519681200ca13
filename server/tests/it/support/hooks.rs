//! A local server that receives webhooks.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde_json::{Value, json};
use standardwebhooks::Webhook;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use super::app::{Account, Setup, TestApp};

/// How long a test waits for webhooks or their results, which take a few seconds at most on an idle machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A request that was received.
#[derive(Debug, Clone)]
pub(crate) struct Received {
    pub(crate) path: String,
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: String,
}

impl Received {
    pub(crate) fn id(&self) -> &str {
        &self.headers["webhook-id"]
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).expect("the body is JSON")
    }

    /// Returns whether the request was signed with this secret, according to the reference implementation of Standard
    /// Webhooks.
    pub(crate) fn is_signed_with(&self, secret: &str) -> bool {
        let mut headers = HeaderMap::new();
        for (name, value) in &self.headers {
            headers.insert(
                HeaderName::from_bytes(name.as_bytes()).expect("a name"),
                HeaderValue::from_str(value).expect("a value"),
            );
        }
        let verifier = Webhook::new(secret).expect("a secret in the standard format");
        verifier.verify(self.body.as_bytes(), &headers).is_ok()
    }
}

/// The response to requests for a path: its status, its headers, and the delay before it is sent.
#[derive(Debug, Clone)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: &'static str,
    pub(crate) delay: Duration,
}

impl Response {
    pub(crate) fn status(status: u16) -> Self {
        Self {
            status,
            headers: "",
            delay: Duration::ZERO,
        }
    }
}

/// A server that records the requests it receives. If no response is set for a path, the server responds with 204.
#[derive(Clone)]
pub(crate) struct Hooks {
    pub(crate) addr: SocketAddr,
    received: Arc<Mutex<Vec<Received>>>,
    responses: Arc<Mutex<HashMap<String, Response>>>,
}

impl Hooks {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let hooks = Self {
            addr: listener.local_addr().expect("the socket is bound"),
            received: Arc::default(),
            responses: Arc::default(),
        };
        let serving = hooks.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serving.clone().serve(stream));
            }
        });
        hooks
    }

    async fn serve(self, mut stream: TcpStream) {
        let Some(request) = read(&mut stream).await else {
            return;
        };
        let response = self.responses.lock().get(&request.path).cloned();
        let response = response.unwrap_or_else(|| Response::status(204));
        self.received.lock().push(request);
        tokio::time::sleep(response.delay).await;
        let head = format!(
            "HTTP/1.1 {} Status\r\nconnection: close\r\ncontent-length: 0\r\n{}\r\n",
            response.status, response.headers
        );
        let _ = stream.write_all(head.as_bytes()).await;
    }

    pub(crate) fn respond(&self, path: &str, response: Response) {
        self.responses.lock().insert(path.to_owned(), response);
    }

    /// Returns the requests received at a path, in order of arrival.
    pub(crate) fn received(&self, path: &str) -> Vec<Received> {
        let received = self.received.lock();
        received
            .iter()
            .filter(|it| it.path == path)
            .cloned()
            .collect()
    }

    /// Waits until `count` requests have been received at a path, and returns all requests received there.
    pub(crate) async fn wait_for(&self, path: &str, count: usize) -> Vec<Received> {
        let began = Instant::now();
        loop {
            let received = self.received(path);
            if received.len() >= count {
                return received;
            }
            assert!(
                began.elapsed() < PATIENCE,
                "{} of {count} requests for {path}",
                received.len()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Creates a webhook for a path. Returns its ID and its secret.
    pub(crate) async fn create(
        &self,
        app: &TestApp,
        account: &Account,
        path: &str,
    ) -> (String, String) {
        let url = format!("http://{}{path}", self.addr);
        let body = json!({"name": format!("Hook {path}"), "url": url});
        let made = app.act(account, "POST", "/admin/webhooks", body).await;
        assert_eq!(made.status, 201, "{}", made.body);
        let id = made.body["webhook"]["id"].as_str().expect("an id");
        (id.to_owned(), made.text("secret"))
    }
}

/// Allows webhooks to reach this machine.
pub(crate) fn with_hooks(setup: Setup) -> Setup {
    setup.flag("--webhook-private-networks=127.0.0.0/8")
}

async fn read(stream: &mut TcpStream) -> Option<Received> {
    let mut bytes = Vec::new();
    loop {
        let mut part = [0; 4096];
        let n = stream.read(&mut part).await.ok()?;
        if n == 0 {
            return None;
        }
        bytes.extend_from_slice(&part[..n]);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let Some((head, body)) = text.split_once("\r\n\r\n") else {
            continue;
        };
        let mut lines = head.lines();
        let path = lines.next()?.split(' ').nth(1)?.to_owned();
        let headers: HashMap<_, _> = lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
            .collect();
        let length: usize = headers.get("content-length")?.parse().ok()?;
        if body.len() >= length {
            return Some(Received {
                path,
                headers,
                body: body.to_owned(),
            });
        }
    }
}
