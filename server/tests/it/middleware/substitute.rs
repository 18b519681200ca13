//! A server at Quota's address that responds to checks as a test specifies.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

/// Stands for a response that is never sent.
pub(super) const SILENCE: &str = "silence";

/// Returns a complete response. Each of `fields` ends with CRLF.
pub(super) fn response(status: &str, fields: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\n{fields}\r\n{body}")
}

pub(super) struct Substitute {
    addr: SocketAddr,
    shared: Arc<Shared>,
    listener: JoinSet<()>,
}

#[derive(Default)]
struct Shared {
    response: Mutex<String>,
    checks: AtomicUsize,
}

impl Substitute {
    pub(super) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let addr = listener.local_addr().expect("the socket is bound");
        let shared = Arc::<Shared>::default();
        let state = Arc::clone(&shared);
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, Arc::clone(&state)));
            }
        });
        Self {
            addr,
            shared,
            listener: task,
        }
    }

    pub(super) fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Responds to later checks with `response`. If `response` is [`SILENCE`], does not respond. If `response` is not a
    /// complete response, closes the connection after sending it.
    pub(super) fn respond_with(&self, response: &str) {
        response.clone_into(&mut self.shared.response.lock());
    }

    /// Closes the port and all connections.
    pub(super) async fn stop(mut self) {
        self.listener.shutdown().await;
    }

    /// Returns the number of requests received.
    pub(super) fn checks(&self) -> usize {
        self.shared.checks.load(Ordering::SeqCst)
    }
}

async fn serve(mut stream: TcpStream, shared: Arc<Shared>) {
    let mut received = Vec::new();
    loop {
        // The body of a check is a JSON object without nested objects.
        while !received.ends_with(b"}") {
            match stream.read_buf(&mut received).await {
                Ok(1..) => {}
                Ok(0) | Err(_) => return,
            }
        }
        received.clear();
        shared.checks.fetch_add(1, Ordering::SeqCst);
        let response = shared.response.lock().clone();
        if response == SILENCE {
            return std::future::pending().await;
        }
        let is_complete = response.starts_with("HTTP/1.1 ");
        if stream.write_all(response.as_bytes()).await.is_err() || !is_complete {
            return;
        }
    }
}
