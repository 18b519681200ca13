//! What is between clients and a server: nothing, a proxy that forwards every byte, or a real proxy.

use std::{net::SocketAddr, path::Path, sync::Arc};

use quota_testkit::gateways::{Gateway, Parsing, Program};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::Mutex,
};

use super::response;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Direct,
    /// Treats the bytes that arrive together from a client as one request. Forwards them without changes, on one
    /// connection to the server that all clients share. The server's next response goes to this client.
    Relay,
    Proxy(Program, Parsing),
}

/// A front, and the address to which clients connect.
pub(super) struct Front {
    pub(super) addr: SocketAddr,
    _gateway: Option<Gateway>,
}

impl Kind {
    pub(super) async fn start(self, server: SocketAddr) -> Front {
        match self {
            Self::Direct => Front {
                addr: server,
                _gateway: None,
            },
            Self::Relay => Front {
                addr: start_relay(server).await,
                _gateway: None,
            },
            Self::Proxy(program, parsing) => {
                let tools = Path::new(env!("CARGO_TARGET_TMPDIR"));
                let gateway = program.start_shared(server, parsing, tools).await;
                Front {
                    addr: gateway.addr,
                    _gateway: Some(gateway),
                }
            }
        }
    }
}

/// The relay's connection to the server, and the bytes that it has received but not yet forwarded.
#[derive(Default)]
struct Upstream {
    stream: Option<TcpStream>,
    received: Vec<u8>,
}

async fn start_relay(server: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let addr = listener.local_addr().expect("the socket is bound");
    let upstream = Arc::new(Mutex::new(Upstream::default()));
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let upstream = Arc::clone(&upstream);
            tokio::spawn(async move {
                let _ = relay(client, server, &upstream).await;
            });
        }
    });
    addr
}

async fn relay(
    mut client: TcpStream,
    server: SocketAddr,
    upstream: &Mutex<Upstream>,
) -> std::io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = client.read(&mut buffer).await?;
        if length == 0 {
            return Ok(());
        }
        let mut upstream = upstream.lock().await;
        let request = buffer[..length].to_vec();
        match upstream.exchange(server, request, &mut client).await {
            Some(response) => client.write_all(&response).await?,
            None => {
                *upstream = Upstream::default();
                return Ok(());
            }
        }
    }
}

impl Upstream {
    /// Sends a request, the rest of which may follow later, and returns the next response. Connects again if the server
    /// has closed the connection. Returns `None` if there is no response or the client disconnects.
    async fn exchange(
        &mut self,
        server: SocketAddr,
        mut request: Vec<u8>,
        client: &mut TcpStream,
    ) -> Option<Vec<u8>> {
        loop {
            let is_new = self.stream.is_none();
            if is_new {
                self.received.clear();
                let stream = TcpStream::connect(server).await;
                self.stream = Some(stream.expect("the server listens"));
            }
            let stream = self.stream.as_mut()?;
            let mut is_open = stream.write_all(&request).await.is_ok();
            while is_open {
                if let Some(length) = response::complete(&self.received) {
                    let response = self.received.drain(..length).collect::<Vec<_>>();
                    if response::closes(&response) {
                        self.stream = None;
                    }
                    return Some(response);
                }
                let mut more = Vec::new();
                tokio::select! {
                    read = stream.read_buf(&mut self.received) => {
                        is_open = matches!(read, Ok(1..));
                    }
                    read = client.read_buf(&mut more) => {
                        if !matches!(read, Ok(1..)) {
                            return None;
                        }
                        is_open = stream.write_all(&more).await.is_ok();
                        request.extend(more);
                    }
                }
            }
            self.stream = None;
            if is_new {
                return None;
            }
        }
    }
}
