//! A proxy between the server and one of its dependencies, with fault injection: it can delay all traffic or only
//! responses, reset connections immediately or after a number of bytes, go silent, and refuse connections. The proxy
//! listens on its own loopback port, in front of a TCP address or a Unix socket.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UnixStream},
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::{Instant, sleep_until},
};

/// The address that the proxy forwards to.
#[derive(Debug, Clone)]
pub enum Upstream {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// What happens to the traffic on open and new connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// All data is forwarded.
    Pass,
    /// Data is delayed by the given time in both directions. The bandwidth does not change.
    Delay(Duration),
    /// Data toward the client is delayed by the given time: requests arrive on time, and responses arrive late.
    Late(Duration),
    /// Bytes are discarded in both directions. Connections remain open, and new ones are accepted.
    BlackHole,
    /// New connections are reset immediately. Open connections are not affected.
    Refuse,
    /// A connection is reset after the given number of further bytes toward the client.
    CutAfter(u64),
}

#[derive(Debug)]
pub struct FaultProxy {
    addr: SocketAddr,
    control: Arc<Control>,
    running: Running,
}

#[derive(Debug)]
enum Running {
    Here(JoinHandle<()>),
    /// The proxy's thread ends when this sender is dropped.
    Apart(#[expect(dead_code, reason = "held for its drop")] oneshot::Sender<()>),
}

#[derive(Debug)]
struct Control {
    fault: watch::Sender<Fault>,
    /// Counts calls to [`FaultProxy::cut`]. Connections end when this number changes.
    cuts: watch::Sender<u64>,
    accepted: AtomicU64,
}

impl Default for Control {
    fn default() -> Self {
        Self {
            fault: watch::Sender::new(Fault::Pass),
            cuts: watch::Sender::new(0),
            accepted: AtomicU64::new(0),
        }
    }
}

impl FaultProxy {
    /// Starts a proxy in the caller's runtime.
    pub async fn start(upstream: Upstream) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .expect("a free port");
        let addr = listener.local_addr().expect("the socket is bound");
        let control = Arc::new(Control::default());
        let accepting = tokio::spawn(accept(listener, upstream, Arc::clone(&control)));
        Self {
            addr,
            control,
            running: Running::Here(accepting),
        }
    }

    /// Starts a proxy on its own thread, so that a busy caller does not delay the traffic.
    pub async fn start_apart(upstream: Upstream) -> Self {
        let control = Arc::new(Control::default());
        let (tell, addr) = oneshot::channel();
        let (stop, stopped) = oneshot::channel::<()>();
        let theirs = Arc::clone(&control);
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(async {
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
                    .await
                    .expect("a free port");
                let _ = tell.send(listener.local_addr().expect("the socket is bound"));
                tokio::select! {
                    () = accept(listener, upstream, theirs) => {}
                    _ = stopped => {}
                }
            });
        });
        Self {
            addr: addr.await.expect("the thread has started"),
            control,
            running: Running::Apart(stop),
        }
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Sets the fault, which lasts until the next call.
    pub fn set(&self, fault: Fault) {
        self.control.fault.send_replace(fault);
    }

    /// Resets every open connection. New connections are not affected.
    pub fn cut(&self) {
        self.control.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Returns the number of connections accepted so far.
    pub fn accepted(&self) -> u64 {
        self.control.accepted.load(Ordering::SeqCst)
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        if let Running::Here(accepting) = &self.running {
            accepting.abort();
        }
        self.cut();
    }
}

async fn accept(listener: TcpListener, upstream: Upstream, control: Arc<Control>) {
    while let Ok((mut client, _)) = listener.accept().await {
        control.accepted.fetch_add(1, Ordering::SeqCst);
        let upstream = upstream.clone();
        // Subscribe before the task runs, so that a reset right after accepting is not missed.
        let mut cuts = control.cuts.subscribe();
        let fault = control.fault.subscribe();
        tokio::spawn(async move {
            let ended = tokio::select! {
                ended = relay(&mut client, upstream, fault) => ended,
                _ = cuts.changed() => Err(io::ErrorKind::ConnectionReset.into()),
            };
            if ended.is_err() {
                // Close the connection with RST, like a crashed peer, instead of FIN.
                let _ = client.set_zero_linger();
            }
        });
    }
}

/// Relays data until both sides have closed. Returns an error if one side failed or a fault ended the connection.
async fn relay(
    client: &mut TcpStream,
    upstream: Upstream,
    fault: watch::Receiver<Fault>,
) -> io::Result<()> {
    if *fault.borrow() == Fault::Refuse {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    client.set_nodelay(true)?;
    let (from_client, to_client) = client.split();
    match upstream {
        Upstream::Tcp(addr) => {
            let mut server = TcpStream::connect(addr).await?;
            server.set_nodelay(true)?;
            let (from_server, to_server) = server.split();
            tokio::try_join!(
                pass(from_client, to_server, fault.clone(), Direction::Up),
                pass(from_server, to_client, fault, Direction::Down),
            )?;
        }
        Upstream::Unix(path) => {
            let mut server = UnixStream::connect(path).await?;
            let (from_server, to_server) = server.split();
            tokio::try_join!(
                pass(from_client, to_server, fault.clone(), Direction::Up),
                pass(from_server, to_client, fault, Direction::Down),
            )?;
        }
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Up,
    Down,
}

/// Data in transit, and the time when it arrives. Empty data marks the end of the stream, unless `last` is set.
struct Piece {
    due: Instant,
    data: Vec<u8>,
    /// Whether the connection is reset after the data.
    last: bool,
}

/// The maximum number of pieces in transit in one direction before the sender is slowed down.
const PIECES: usize = 1024;

async fn pass(
    from: impl AsyncRead + Unpin,
    to: impl AsyncWrite + Unpin,
    fault: watch::Receiver<Fault>,
    direction: Direction,
) -> io::Result<()> {
    let (send, receive) = mpsc::channel(PIECES);
    tokio::try_join!(take(from, send, fault, direction), deliver(to, receive))?;
    Ok(())
}

async fn take(
    mut from: impl AsyncRead + Unpin,
    to: mpsc::Sender<Piece>,
    mut fault: watch::Receiver<Fault>,
    direction: Direction,
) -> io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    let (mut carried, mut due) = (0, Instant::now());
    loop {
        let length = from.read(&mut buffer).await?;
        if fault.has_changed().unwrap_or(false) {
            carried = 0;
        }
        let mut data = &buffer[..length];
        let mut last = false;
        let now = *fault.borrow_and_update();
        let delay = match now {
            // Not even the end of the stream is forwarded.
            Fault::BlackHole if length == 0 => std::future::pending().await,
            Fault::BlackHole => continue,
            Fault::Delay(delay) => delay,
            Fault::Late(delay) if direction == Direction::Down => delay,
            Fault::CutAfter(limit) if direction == Direction::Down && length > 0 => {
                let left = usize::try_from(limit - carried).unwrap_or(usize::MAX);
                data = &data[..length.min(left)];
                carried += data.len() as u64;
                last = carried == limit;
                Duration::ZERO
            }
            Fault::Pass | Fault::Late(_) | Fault::Refuse | Fault::CutAfter(_) => Duration::ZERO,
        };
        // Data must not overtake data sent earlier.
        due = due.max(Instant::now() + delay);
        let piece = Piece {
            due,
            data: data.to_vec(),
            last,
        };
        if to.send(piece).await.is_err() || length == 0 || last {
            return Ok(());
        }
    }
}

async fn deliver(
    mut to: impl AsyncWrite + Unpin,
    mut pieces: mpsc::Receiver<Piece>,
) -> io::Result<()> {
    while let Some(piece) = pieces.recv().await {
        if piece.due > Instant::now() {
            sleep_until(piece.due).await;
        }
        if piece.data.is_empty() && !piece.last {
            return to.shutdown().await;
        }
        to.write_all(&piece.data).await?;
        if piece.last {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Starts an echo server.
    async fn echo() -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .expect("a free port");
        let addr = listener.local_addr().expect("the socket is bound");
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                    let _ = to.shutdown().await;
                });
            }
        });
        addr
    }

    /// Sends `ping` and returns the response, or `None` if it is late.
    async fn ping(stream: &mut TcpStream, limit: Duration) -> Option<io::Result<String>> {
        let answer = async {
            stream.write_all(b"ping").await?;
            let mut buffer = [0; 4];
            stream.read_exact(&mut buffer).await?;
            Ok(String::from_utf8_lossy(&buffer).into_owned())
        };
        tokio::time::timeout(limit, answer).await.ok()
    }

    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(200);

    #[tokio::test]
    async fn each_fault_has_its_effect_and_can_be_ended() {
        let proxy = FaultProxy::start(Upstream::Tcp(echo().await)).await;
        let mut stream = TcpStream::connect(proxy.addr())
            .await
            .expect("the server listens");
        let answer = ping(&mut stream, LONG).await.expect("in time");
        assert_eq!(answer.expect("the data is forwarded"), "ping");

        proxy.set(Fault::Delay(SHORT));
        let before = std::time::Instant::now();
        assert!(
            ping(&mut stream, LONG)
                .await
                .is_some_and(|answer| answer.is_ok())
        );
        assert!(
            before.elapsed() >= 2 * SHORT,
            "the delay applies in both directions"
        );

        proxy.set(Fault::Late(SHORT));
        let before = std::time::Instant::now();
        let two = tokio::join!(ping(&mut stream, LONG), async {
            let mut other = TcpStream::connect(proxy.addr())
                .await
                .expect("the server listens");
            ping(&mut other, LONG).await
        });
        assert!(two.0.is_some_and(|it| it.is_ok()) && two.1.is_some_and(|it| it.is_ok()));
        assert!(before.elapsed() >= SHORT, "the response is not late");

        proxy.set(Fault::BlackHole);
        assert!(ping(&mut stream, SHORT).await.is_none(), "silence");

        proxy.set(Fault::Refuse);
        let mut refused = TcpStream::connect(proxy.addr())
            .await
            .expect("the kernel accepts");
        assert!(ping(&mut refused, LONG).await.expect("in time").is_err());
        let answer = ping(&mut stream, LONG).await.expect("in time");
        assert_eq!(answer.expect("the open connection still works"), "ping");

        proxy.set(Fault::CutAfter(6));
        let answer = ping(&mut stream, LONG).await.expect("in time");
        assert_eq!(answer.expect("four bytes pass"), "ping");
        assert!(
            ping(&mut stream, LONG).await.expect("in time").is_err(),
            "the reset follows after two more bytes"
        );

        proxy.set(Fault::Pass);
        let mut stream = TcpStream::connect(proxy.addr())
            .await
            .expect("the server listens");
        assert!(
            ping(&mut stream, LONG)
                .await
                .is_some_and(|answer| answer.is_ok())
        );
        proxy.cut();
        let mut byte = [0];
        let error = tokio::time::timeout(LONG, stream.read(&mut byte))
            .await
            .expect("in time");
        assert_eq!(
            error.expect_err("a reset").kind(),
            io::ErrorKind::ConnectionReset
        );
        assert_eq!(proxy.accepted(), 4);
    }

    /// Delayed data does not add delay to data sent after it.
    #[tokio::test]
    async fn a_delay_does_not_reduce_the_bandwidth() {
        // If the delays added up, 20 of them would take 40 seconds.
        const DELAY: Duration = Duration::from_secs(2);
        let proxy = FaultProxy::start_apart(Upstream::Tcp(echo().await)).await;
        let mut stream = TcpStream::connect(proxy.addr())
            .await
            .expect("the server listens");
        proxy.set(Fault::Late(DELAY));
        let before = std::time::Instant::now();
        let (mut from, mut to) = stream.split();
        let send = async {
            for _ in 0..20 {
                to.write_all(b"ping").await.expect("sent");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let receive = async {
            let mut all = [0; 80];
            from.read_exact(&mut all).await.expect("all of it");
        };
        tokio::time::timeout(LONG, async { tokio::join!(send, receive) })
            .await
            .expect("in time");
        assert!(before.elapsed() >= DELAY);
        assert!(before.elapsed() < 10 * DELAY, "the delays do not add up");
    }

    #[tokio::test]
    async fn the_end_of_a_stream_is_forwarded_and_the_response_still_arrives() {
        let proxy = FaultProxy::start(Upstream::Tcp(echo().await)).await;
        let mut stream = TcpStream::connect(proxy.addr())
            .await
            .expect("the server listens");
        stream.write_all(b"all of it").await.expect("sent");
        stream.shutdown().await.expect("sent");
        let mut text = String::new();
        stream.read_to_string(&mut text).await.expect("a clean end");
        assert_eq!(text, "all of it");
    }

    #[tokio::test]
    async fn a_unix_socket_may_be_the_upstream() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("socket");
        let listener = tokio::net::UnixListener::bind(&path).expect("a socket");
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            let (mut from, mut to) = stream.split();
            let _ = tokio::io::copy(&mut from, &mut to).await;
        });
        let proxy = FaultProxy::start(Upstream::Unix(path)).await;
        let mut stream = TcpStream::connect(proxy.addr())
            .await
            .expect("the server listens");
        let answer = ping(&mut stream, LONG).await.expect("in time");
        assert_eq!(answer.expect("the data is forwarded"), "ping");
    }
}
