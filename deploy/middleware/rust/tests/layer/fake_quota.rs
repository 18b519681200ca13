//! A substitute for Quota. It records the checks, and responds as the test specifies.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
};

/// A received request.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) line: String,
    fields: Vec<(String, String)>,
    pub(crate) body: Value,
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let field = self.fields.iter().find(|(it, _)| it == name)?;
        Some(&field.1)
    }
}

pub(crate) struct FakeQuota {
    pub(crate) url: String,
    checks: Arc<Mutex<Vec<Seen>>>,
    connections: Arc<AtomicUsize>,
}

impl FakeQuota {
    /// Responds to the nth check with the JSON that `answer` returns for n, counted from 0. If it is `Null`, closes the
    /// connection instead.
    pub(crate) async fn answering(answer: impl Fn(usize) -> Value + Send + Sync + 'static) -> Self {
        Self::start(move |n| match answer(n) {
            Value::Null => Some(String::new()),
            body => {
                let (id, body) = (n + 1, body.to_string());
                let length = body.len();
                Some(format!(
                    "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nx-request-id: quota-{id}\r\n\
                     content-length: {length}\r\n\r\n{body}"
                ))
            }
        })
        .await
    }

    /// Responds to each check with `response`. If `response` is empty, closes the connection instead.
    pub(crate) async fn raw(response: &str) -> Self {
        let response = response.to_owned();
        Self::start(move |_| Some(response.clone())).await
    }

    /// Never responds.
    pub(crate) async fn silent() -> Self {
        Self::start(|_| None).await
    }

    /// Refuses connections.
    pub(crate) async fn absent() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        Self::at(listener.local_addr().expect("it is bound"))
    }

    fn at(addr: SocketAddr) -> Self {
        Self {
            url: format!("http://{addr}"),
            checks: Arc::default(),
            connections: Arc::default(),
        }
    }

    async fn start(respond: impl Fn(usize) -> Option<String> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let quota = Self::at(listener.local_addr().expect("it is bound"));
        let checks = Arc::clone(&quota.checks);
        let connections = Arc::clone(&quota.connections);
        let respond = Arc::new(respond);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                connections.fetch_add(1, Ordering::SeqCst);
                let (checks, respond) = (Arc::clone(&checks), Arc::clone(&respond));
                tokio::spawn(async move {
                    let mut stream = BufReader::new(stream);
                    while let Some(seen) = read(&mut stream).await {
                        let n = {
                            let mut checks = checks.lock().expect("no panics");
                            checks.push(seen);
                            checks.len() - 1
                        };
                        let Some(response) = respond(n) else {
                            return std::future::pending().await;
                        };
                        if response.is_empty()
                            || stream.write_all(response.as_bytes()).await.is_err()
                        {
                            return;
                        }
                    }
                });
            }
        });
        quota
    }

    pub(crate) fn checks(&self) -> Vec<Seen> {
        self.checks.lock().expect("no panics").clone()
    }

    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

/// Returns the next request on a connection, or `None` if the connection has been closed.
async fn read(stream: &mut BufReader<TcpStream>) -> Option<Seen> {
    let mut line = String::new();
    if stream.read_line(&mut line).await.ok()? == 0 {
        return None;
    }
    let mut seen = Seen {
        line: line.trim().to_owned(),
        fields: Vec::new(),
        body: Value::Null,
    };
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await.ok()?;
        let Some((name, value)) = line.trim().split_once(':') else {
            break;
        };
        let field = (name.to_ascii_lowercase(), value.trim().to_owned());
        seen.fields.push(field);
    }
    let length = seen.header("content-length")?.parse().ok()?;
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    seen.body = serde_json::from_slice(&body).ok()?;
    Some(seen)
}
