//! The upstreams of a gateway: the API that it protects, and Quota or a substitute behind TLS.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use parking_lot::Mutex;
use tokio::{
    io::{
        AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _,
        BufReader, copy_bidirectional,
    },
    net::{TcpListener, TcpStream},
};
use tokio_rustls::TlsAcceptor;

use crate::support::authority::Authority;

/// The API behind a gateway. The API returns the body that it received. A path such as `/status/403` selects another
/// status.
pub(crate) struct Api {
    pub(crate) addr: SocketAddr,
    requests: Arc<Mutex<Vec<Head>>>,
}

/// The first line of a request, and its header fields with lowercase names.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    pub(crate) line: String,
    pub(crate) fields: Vec<(String, String)>,
}

impl Head {
    pub(crate) fn values(&self, name: &str) -> Vec<&str> {
        self.fields
            .iter()
            .filter(|(it, _)| it == name)
            .map(|(_, value)| value.as_str())
            .collect()
    }
}

impl Api {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let addr = listener.local_addr().expect("the socket is bound");
        let requests = Arc::new(Mutex::new(Vec::new()));
        let received = Arc::clone(&requests);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let received = Arc::clone(&received);
                tokio::spawn(async move {
                    let mut stream = BufReader::new(stream);
                    while let Some((head, body)) = read_request(&mut stream).await {
                        let status = head
                            .line
                            .split("/status/")
                            .nth(1)
                            .and_then(|rest| rest.get(..3))
                            .unwrap_or("200")
                            .to_owned();
                        received.lock().push(head);
                        // The gateway may replace these headers only with Quota's values.
                        let answer = format!(
                            "HTTP/1.1 {status} Status\r\ncontent-length: {}\r\nx-ratelimit-limit: api\r\n\
                             ratelimit: api\r\nx-quota-degraded: api\r\nx-own: kept\r\n\r\n",
                            body.len()
                        );
                        if stream.write_all(answer.as_bytes()).await.is_err()
                            || stream.write_all(&body).await.is_err()
                        {
                            break;
                        }
                    }
                });
            }
        });
        Self { addr, requests }
    }

    pub(crate) fn requests(&self) -> Vec<Head> {
        self.requests.lock().clone()
    }
}

/// Returns the next request of a connection, or `None` if the connection has been closed.
async fn read_request(
    stream: &mut (impl AsyncBufRead + AsyncWrite + Unpin),
) -> Option<(Head, Vec<u8>)> {
    let mut line = String::new();
    if stream.read_line(&mut line).await.ok()? == 0 {
        return None;
    }
    let mut head = Head {
        line: line.trim().to_owned(),
        fields: Vec::new(),
    };
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await.ok()?;
        let line = line.trim();
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':')?;
        let field = (name.to_ascii_lowercase(), value.trim().to_owned());
        head.fields.push(field);
    }
    let length = head
        .values("content-length")
        .first()
        .map_or(0, |length| length.parse().expect("a length"));
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    Some((head, body))
}

/// The server at Quota's address.
#[derive(Clone, Copy)]
pub(crate) enum Behind {
    Quota(SocketAddr),
    /// A substitute that responds to each request with the status line and headers that the function returns.
    Other(fn(&Head) -> &'static str),
}

/// A TLS proxy in front of Quota, as operators run it.
pub(crate) struct TlsHop {
    pub(crate) port: u16,
    connections: Arc<AtomicUsize>,
}

impl TlsHop {
    pub(crate) async fn start(authority: &Authority, behind: Behind) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("the socket is bound").port();
        let acceptor = TlsAcceptor::from(Arc::clone(&authority.config));
        let connections = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&connections);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, counted) = (acceptor.clone(), Arc::clone(&counted));
                tokio::spawn(async move {
                    // A gateway that does not trust the certificate disconnects here.
                    let Ok(mut stream) = acceptor.accept(stream).await else {
                        return;
                    };
                    counted.fetch_add(1, Ordering::SeqCst);
                    match behind {
                        Behind::Quota(addr) => {
                            let mut quota =
                                TcpStream::connect(addr).await.expect("the server listens");
                            let _ = copy_bidirectional(&mut stream, &mut quota).await;
                        }
                        Behind::Other(answer) => {
                            let mut stream = BufReader::new(stream);
                            while let Some((head, _)) = read_request(&mut stream).await {
                                let answer = format!("HTTP/1.1 {}\r\n\r\n", answer(&head));
                                if stream.write_all(answer.as_bytes()).await.is_err()
                                    || stream.flush().await.is_err()
                                {
                                    break;
                                }
                            }
                        }
                    }
                });
            }
        });
        Self { port, connections }
    }

    /// Returns the number of connections that the gateway has made.
    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}
