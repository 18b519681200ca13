//! A proxy between the server and what it depends on, that can be made to fail: delay, cut, cut after so
//! many bytes, go silent, refuse. On a port of its own on loopback, in front of a TCP address or a Unix
//! socket.

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
    sync::watch,
    task::JoinHandle,
};

/// Where the proxy leads to.
#[derive(Debug, Clone)]
pub enum Upstream {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// What befalls the traffic, of connections that are open and of new ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// None: bytes pass.
    Pass,
    /// Each piece of data waits this long, in both directions.
    Delay(Duration),
    /// Bytes are swallowed and nothing comes back; connections stay open, new ones too.
    BlackHole,
    /// New connections are reset at once; open ones go on.
    Refuse,
    /// The connection is reset once it has carried this many more bytes towards the client.
    CutAfter(u64),
}

#[derive(Debug)]
pub struct FaultProxy {
    addr: SocketAddr,
    control: Arc<Control>,
    accepting: JoinHandle<()>,
}

#[derive(Debug)]
struct Control {
    fault: watch::Sender<Fault>,
    /// Counts the calls of [`FaultProxy::cut`]; a connection ends when it changes.
    cuts: watch::Sender<u64>,
    accepted: AtomicU64,
}

impl FaultProxy {
    pub async fn start(upstream: Upstream) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .expect("a free port");
        let addr = listener.local_addr().expect("it is bound");
        let control = Arc::new(Control {
            fault: watch::Sender::new(Fault::Pass),
            cuts: watch::Sender::new(0),
            accepted: AtomicU64::new(0),
        });
        let accepting = tokio::spawn(accept(listener, upstream, Arc::clone(&control)));
        Self {
            addr,
            control,
            accepting,
        }
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// From now on, until the next call.
    pub fn set(&self, fault: Fault) {
        self.control.fault.send_replace(fault);
    }

    /// Resets every open connection, once. New ones are as [`set`](Self::set) says.
    pub fn cut(&self) {
        self.control.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// How many connections were taken so far.
    pub fn accepted(&self) -> u64 {
        self.control.accepted.load(Ordering::SeqCst)
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.cut();
    }
}

async fn accept(listener: TcpListener, upstream: Upstream, control: Arc<Control>) {
    while let Ok((mut client, _)) = listener.accept().await {
        control.accepted.fetch_add(1, Ordering::SeqCst);
        let upstream = upstream.clone();
        // Subscribed before the task runs, so that a cut right after the accept is not missed.
        let mut cuts = control.cuts.subscribe();
        let fault = control.fault.subscribe();
        tokio::spawn(async move {
            let ended = tokio::select! {
                ended = relay(&mut client, upstream, fault) => ended,
                _ = cuts.changed() => Err(io::ErrorKind::ConnectionReset.into()),
            };
            if ended.is_err() {
                // Closes with RST, as a crashed or partitioned peer does; a FIN would be good manners.
                let _ = client.set_zero_linger();
            }
        });
    }
}

/// Until both sides have closed. An error when one failed, or a fault ended it.
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

async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut fault: watch::Receiver<Fault>,
    direction: Direction,
) -> io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    let mut carried = 0;
    loop {
        let length = from.read(&mut buffer).await?;
        if fault.has_changed().unwrap_or(false) {
            carried = 0;
        }
        let mut data = &buffer[..length];
        let now = *fault.borrow_and_update();
        match now {
            Fault::Pass | Fault::Refuse | Fault::CutAfter(_) if length == 0 => {
                return to.shutdown().await;
            }
            Fault::Delay(delay) => {
                tokio::time::sleep(delay).await;
                if length == 0 {
                    return to.shutdown().await;
                }
            }
            // Not even the end gets through.
            Fault::BlackHole if length == 0 => std::future::pending().await,
            Fault::BlackHole => continue,
            Fault::CutAfter(limit) if direction == Direction::Down => {
                let left = usize::try_from(limit - carried).unwrap_or(usize::MAX);
                data = &data[..length.min(left)];
                carried += data.len() as u64;
                if carried == limit {
                    to.write_all(data).await?;
                    return Err(io::ErrorKind::ConnectionReset.into());
                }
            }
            Fault::Pass | Fault::Refuse | Fault::CutAfter(_) => {}
        }
        to.write_all(data).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that sends back what it gets.
    async fn echo() -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .expect("a free port");
        let addr = listener.local_addr().expect("it is bound");
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

    /// Sends `ping` and gives what comes back within the time: `None` for silence.
    async fn ping(stream: &mut TcpStream, limit: Duration) -> Option<io::Result<String>> {
        let answer = async {
            stream.write_all(b"ping").await?;
            let mut buffer = [0; 4];
            stream.read_exact(&mut buffer).await?;
            Ok(String::from_utf8_lossy(&buffer).into_owned())
        };
        tokio::time::timeout(limit, answer).await.ok()
    }

    const LONG: Duration = Duration::from_secs(10);
    const SHORT: Duration = Duration::from_millis(200);

    #[tokio::test]
    async fn each_fault_does_what_it_says_and_passes() {
        let proxy = FaultProxy::start(Upstream::Tcp(echo().await)).await;
        let mut stream = TcpStream::connect(proxy.addr()).await.expect("it listens");
        let answer = ping(&mut stream, LONG).await.expect("in time");
        assert_eq!(answer.expect("it passes"), "ping");

        proxy.set(Fault::Delay(SHORT));
        let before = std::time::Instant::now();
        assert!(
            ping(&mut stream, LONG)
                .await
                .is_some_and(|answer| answer.is_ok())
        );
        assert!(before.elapsed() >= 2 * SHORT, "once there, once back");

        proxy.set(Fault::BlackHole);
        assert!(ping(&mut stream, SHORT).await.is_none(), "silence");

        proxy.set(Fault::Refuse);
        let mut refused = TcpStream::connect(proxy.addr())
            .await
            .expect("the kernel accepts");
        assert!(ping(&mut refused, LONG).await.expect("in time").is_err());
        let answer = ping(&mut stream, LONG).await.expect("in time");
        assert_eq!(answer.expect("the open one goes on"), "ping");

        proxy.set(Fault::CutAfter(6));
        let answer = ping(&mut stream, LONG).await.expect("in time");
        assert_eq!(answer.expect("four bytes pass"), "ping");
        assert!(
            ping(&mut stream, LONG).await.expect("in time").is_err(),
            "two are too few"
        );

        proxy.set(Fault::Pass);
        let mut stream = TcpStream::connect(proxy.addr()).await.expect("it listens");
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
        assert_eq!(proxy.accepted(), 3);
    }

    #[tokio::test]
    async fn an_end_of_one_side_is_passed_on_and_the_rest_still_arrives() {
        let proxy = FaultProxy::start(Upstream::Tcp(echo().await)).await;
        let mut stream = TcpStream::connect(proxy.addr()).await.expect("it listens");
        stream.write_all(b"all of it").await.expect("sent");
        stream.shutdown().await.expect("sent");
        let mut text = String::new();
        stream.read_to_string(&mut text).await.expect("a clean end");
        assert_eq!(text, "all of it");
    }

    #[tokio::test]
    async fn a_unix_socket_may_be_behind_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("socket");
        let listener = tokio::net::UnixListener::bind(&path).expect("a socket");
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            let (mut from, mut to) = stream.split();
            let _ = tokio::io::copy(&mut from, &mut to).await;
        });
        let proxy = FaultProxy::start(Upstream::Unix(path)).await;
        let mut stream = TcpStream::connect(proxy.addr()).await.expect("it listens");
        let answer = ping(&mut stream, LONG).await.expect("in time");
        assert_eq!(answer.expect("it passes"), "ping");
    }
}
