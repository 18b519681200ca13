//! Sends webhooks to real sockets. The tests use their own resolver.

use std::{
    collections::VecDeque,
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use reqwest::dns::Resolve as _;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};

use super::{
    send::{Attempt, Sender, Sent},
    target::{Lookup, Targets},
};

/// A resolver that returns one answer after another, and then repeats the last one.
#[derive(Debug)]
struct Answers {
    left: Mutex<VecDeque<Vec<IpAddr>>>,
    lookups: AtomicUsize,
}

impl Answers {
    fn new(answers: &[&[&str]]) -> Arc<Self> {
        let parse = |answer: &&[&str]| answer.iter().map(|it| it.parse().unwrap()).collect();
        Arc::new(Self {
            left: Mutex::new(answers.iter().map(parse).collect()),
            lookups: AtomicUsize::new(0),
        })
    }
}

impl Lookup for Answers {
    fn lookup(&self, _: String) -> BoxFuture<'static, io::Result<Vec<IpAddr>>> {
        self.lookups.fetch_add(1, Ordering::Relaxed);
        let mut left = self.left.lock();
        let answer = if left.len() > 1 {
            left.pop_front()
        } else {
            left.front().cloned()
        };
        Box::pin(async move { Ok(answer.unwrap_or_default()) })
    }
}

/// A server that handles each connection with `respond`.
struct Receiver {
    addr: SocketAddr,
    connections: Arc<AtomicUsize>,
}

impl Receiver {
    async fn start<F>(respond: impl Fn(TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let count = connections.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(respond(stream));
            }
        });
        Self { addr, connections }
    }

    /// Starts a server that responds to every request with `text`.
    async fn saying(text: impl Into<String>) -> Self {
        let text: String = text.into();
        Self::start(move |mut stream| {
            let text = text.clone();
            async move {
                read_request(&mut stream).await;
                let _ = stream.write_all(text.as_bytes()).await;
            }
        })
        .await
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

async fn read_request(stream: &mut TcpStream) {
    let mut read = Vec::new();
    while !read.ends_with(b"{}") {
        let mut part = [0; 1024];
        match stream.read(&mut part).await {
            Ok(0) | Err(_) => return,
            Ok(n) => read.extend_from_slice(&part[..n]),
        }
    }
}

async fn send(private: &[&str], lookup: Arc<dyn Lookup>, url: &str) -> Sent {
    let private: Vec<_> = private.iter().map(|it| it.parse().unwrap()).collect();
    send_to(&Targets::new(&private), lookup, url).await
}

async fn send_to(targets: &Targets, lookup: Arc<dyn Lookup>, url: &str) -> Sent {
    let sender = Sender::new(targets, &lookup).unwrap();
    let (url, scheme) = targets.parse(url).unwrap();
    let attempt = Attempt {
        event_id: "msg_1",
        at: 1_800_000_000,
        signature: "v1,AA==",
        payload: "{}",
    };
    sender.send(url, scheme, &attempt).await
}

const LOOPBACK: &str = "127.0.0.1/32";

#[tokio::test(flavor = "multi_thread")]
async fn delivery_to_an_allowed_address_is_accepted() {
    let receiver = Receiver::saying("HTTP/1.1 204 No Content\r\n\r\n").await;
    let lookup = Answers::new(&[&["127.0.0.1"]]);
    let url = format!("http://hooks.example.com:{}/", receiver.addr.port());
    let sent = send(&[LOOPBACK], lookup.clone(), &url).await;
    assert_eq!((sent.status, sent.error), (Some(204), None));
    assert_eq!(receiver.connections(), 1);
    assert_eq!(lookup.lookups.load(Ordering::Relaxed), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn host_with_any_address_that_is_not_public_is_not_connected_to() {
    let receiver = Receiver::saying("HTTP/1.1 200 OK\r\n\r\n").await;
    for answer in [
        &["127.0.0.1"][..],
        &["::ffff:127.0.0.1"],
        // The second address would be tried if the first one failed.
        &["8.8.8.8", "127.0.0.1"],
    ] {
        let url = format!("https://hooks.example.com:{}/", receiver.addr.port());
        let sent = send(&[], Answers::new(&[answer]), &url).await;
        let error = sent.error.unwrap();
        assert!(
            error.contains("to which webhooks may not be sent"),
            "{error}"
        );
    }
    assert_eq!(receiver.connections(), 0);
}

/// A resolver in a private network: pairs of a host name and its address.
#[derive(Debug)]
struct Names(&'static [(&'static str, &'static str)]);

impl Lookup for Names {
    fn lookup(&self, host: String) -> BoxFuture<'static, io::Result<Vec<IpAddr>>> {
        let found = self.0.iter().find(|(name, _)| *name == host);
        let found = found.map(|(_, ip)| vec![ip.parse().unwrap()]);
        Box::pin(async move { found.ok_or_else(|| io::Error::other("no such host")) })
    }
}

/// If the errors were different, tenants could find out which names exist in the server's network.
#[tokio::test(flavor = "multi_thread")]
async fn unknown_host_and_forbidden_address_give_the_same_error() {
    let lookup = Arc::new(Names(&[("internal.example.com", "10.0.0.1")]));
    let mut errors = Vec::new();
    for host in ["internal.example.com", "missing.example.com"] {
        let sent = send(&[], lookup.clone(), &format!("https://{host}/")).await;
        errors.push(sent.error.unwrap());
    }
    assert_eq!(errors[0], errors[1]);
    assert!(!errors[0].contains("no such host"), "{}", errors[0]);
}

/// In a container, no interface has the machine's public address, so the host of the public URL must be refused too.
#[tokio::test(flavor = "multi_thread")]
async fn host_of_the_public_url_is_refused_by_name_and_by_address() {
    let lookup = Arc::new(Names(&[
        ("quota.example.com", "8.8.8.1"),
        ("alias.example.com", "8.8.8.1"),
        ("other.example.com", "8.8.8.2"),
    ]));
    // Nothing is sent, so that the test does not depend on these addresses.
    let is_refused = async |public_url: &str, host: &str| {
        let targets = Targets::new(&[]).without_host_of(public_url);
        let (url, scheme) = targets.parse(&format!("https://{host}/")).unwrap();
        let resolver = targets.resolver(scheme, lookup.clone());
        let literal = targets.check_literal(&url, scheme, &*lookup).await;
        let is_name = url.domain().is_some();
        literal.is_err() || is_name && resolver.resolve(host.parse().unwrap()).await.is_err()
    };
    for host in ["quota.example.com", "alias.example.com", "8.8.8.1"] {
        assert!(
            is_refused("https://quota.example.com", host).await,
            "{host}"
        );
        assert!(
            !is_refused("https://missing.example.com", host).await,
            "{host}"
        );
    }
    for host in ["quota.example.com", "alias.example.com"] {
        assert!(is_refused("https://8.8.8.1:8443", host).await, "{host}");
    }
    for host in ["other.example.com", "8.8.8.2"] {
        assert!(
            !is_refused("https://quota.example.com", host).await,
            "{host}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn delivery_to_the_address_of_the_public_url_fails() {
    let targets = Targets::new(&[]).without_host_of("https://quota.example.com");
    let lookup = Arc::new(Names(&[("quota.example.com", "8.8.8.1")]));
    for url in ["https://quota.example.com/", "https://8.8.8.1/"] {
        let sent = send_to(&targets, lookup.clone(), url).await;
        let error = sent.error.unwrap();
        assert!(error.contains("webhooks may not be sent"), "{url}: {error}");
    }
}

/// The host has an allowed address when it is checked, and a different address afterward.
#[tokio::test(flavor = "multi_thread")]
async fn connection_is_made_to_the_address_that_was_checked() {
    let receiver = Receiver::saying("HTTP/1.1 200 OK\r\n\r\n").await;
    let lookup = Answers::new(&[&["127.0.0.1"], &["127.0.0.2"]]);
    let url = format!("http://rebind.example.com:{}/", receiver.addr.port());
    let first = send(&[LOOPBACK], lookup.clone(), &url).await;
    assert_eq!(first.status, Some(200));
    assert_eq!(lookup.lookups.load(Ordering::Relaxed), 1, "only one lookup");
    // The next attempt resolves the host again, and gets the second address, which is not allowed.
    let second = send(&[LOOPBACK], lookup.clone(), &url).await;
    assert!(
        second
            .error
            .unwrap()
            .contains("to which webhooks may not be sent")
    );
    assert_eq!(lookup.lookups.load(Ordering::Relaxed), 2);
    assert_eq!(receiver.connections(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_http_reaches_only_the_networks_of_the_operator() {
    let lookup = Answers::new(&[&["8.8.8.8"]]);
    let sent = send(&[LOOPBACK], lookup, "http://hooks.example.com/").await;
    assert!(
        sent.error
            .unwrap()
            .contains("to which webhooks may not be sent")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn redirect_is_not_followed() {
    let target = Receiver::saying("HTTP/1.1 200 OK\r\n\r\n").await;
    let location = format!(
        "HTTP/1.1 307 Temporary Redirect\r\nlocation: http://127.0.0.1:{}/\r\n\r\n",
        target.addr.port()
    );
    let receiver = Receiver::saying(location).await;
    let url = format!("http://127.0.0.1:{}/", receiver.addr.port());
    let sent = send(&[LOOPBACK], Answers::new(&[]), &url).await;
    assert_eq!(sent.status, Some(307));
    assert!(sent.error.unwrap().contains("Redirects are not followed"));
    assert_eq!((receiver.connections(), target.connections()), (1, 0));
}

/// Measures how much of the body the endpoint can send before the connection is closed.
#[tokio::test(flavor = "multi_thread")]
async fn huge_body_is_not_read_to_its_end() {
    let (closed, mut written) = mpsc::unbounded_channel();
    let receiver = Receiver::start(move |mut stream| {
        let closed = closed.clone();
        async move {
            read_request(&mut stream).await;
            let head = "HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n";
            let _ = stream.write_all(head.as_bytes()).await;
            let mut written = 0;
            while written < 1_000_000_000 && stream.write_all(&[b'x'; 16384]).await.is_ok() {
                written += 16384;
            }
            let _ = closed.send(written);
        }
    })
    .await;
    let url = format!("http://127.0.0.1:{}/", receiver.addr.port());
    let sent = send(&[LOOPBACK], Answers::new(&[]), &url).await;
    assert_eq!((sent.status, sent.error), (Some(200), None));
    // The endpoint can also fill the buffers of the sockets, so it can send more than is read.
    let written = written.recv().await.unwrap();
    assert!(written < 20_000_000, "{written}");
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoint_that_is_silent_or_refuses_is_an_error() {
    let silent = Receiver::start(|mut stream| async move {
        read_request(&mut stream).await;
        tokio::time::sleep(Duration::from_secs(60)).await;
    })
    .await;
    let url = format!("http://127.0.0.1:{}/", silent.addr.port());
    let sent = send(&[LOOPBACK], Answers::new(&[]), &url).await;
    let error = sent.error.unwrap();
    assert_eq!(error, "The endpoint did not respond within 15 seconds.");

    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://127.0.0.1:{}/", closed.local_addr().unwrap().port());
    drop(closed);
    let sent = send(&[LOOPBACK], Answers::new(&[]), &url).await;
    let error = sent.error.unwrap();
    assert!(
        error.starts_with("Cannot connect to the endpoint: "),
        "{error}"
    );

    let nonsense = Receiver::saying("no HTTP at all\r\n\r\n").await;
    let url = format!("http://127.0.0.1:{}/", nonsense.addr.port());
    let sent = send(&[LOOPBACK], Answers::new(&[]), &url).await;
    assert!(sent.error.is_some() && sent.status.is_none(), "{sent:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_after_is_reported() {
    let text = "HTTP/1.1 503 Service Unavailable\r\nretry-after: 77\r\ncontent-length: 0\r\n\r\n";
    let receiver = Receiver::saying(text).await;
    let url = format!("http://127.0.0.1:{}/", receiver.addr.port());
    let sent = send(&[LOOPBACK], Answers::new(&[]), &url).await;
    assert_eq!((sent.status, sent.retry_after), (Some(503), Some(77)));
}
