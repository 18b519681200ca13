//! A server that is vulnerable to request smuggling. It proves that the tests detect the vulnerability.
//!
//! The server honors any field that resembles `Transfer-Encoding: chunked` even if the request also has a
//! `Content-Length`, ignores the bodies of GET requests, and keeps the connection open.

use std::{collections::HashMap, net::SocketAddr, sync::Arc};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use super::response::{head, value};

/// Starts the server, which responds to requests with these keys like Quota. Each key has its own limit.
pub(super) async fn start(limits: HashMap<String, String>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let addr = listener.local_addr().expect("the socket is bound");
    let limits = Arc::new(limits);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let limits = Arc::clone(&limits);
            tokio::spawn(async move {
                let _ = serve(stream, &limits).await;
            });
        }
    });
    addr
}

async fn serve(mut stream: TcpStream, limits: &HashMap<String, String>) -> std::io::Result<()> {
    let mut received = Vec::new();
    loop {
        while let Some((text, length)) = request(&received) {
            let request = received.drain(..length).collect::<Vec<_>>();
            let request = String::from_utf8_lossy(&request);
            let limit = limits
                .iter()
                .find(|(key, _)| request.contains(key.as_str()))
                .map_or("none", |(_, limit)| limit);
            let id = value(&text, "x-request-id").unwrap_or("none");
            let response = format!(
                "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nx-request-id: {id}\r\nx-ratelimit-limit: {limit}\r\n\r\n"
            );
            stream.write_all(response.as_bytes()).await?;
        }
        if stream.read_buf(&mut received).await? == 0 {
            return Ok(());
        }
    }
}

/// Returns the head of the request at the beginning of these bytes, and the length of the request, if the request is
/// complete.
fn request(bytes: &[u8]) -> Option<(String, usize)> {
    let (text, end) = head(bytes)?;
    let lower = text.to_ascii_lowercase();
    let is_chunked = lower
        .lines()
        .any(|line| line.contains("encoding") && line.contains("chunked"));
    let length = if is_chunked {
        let last = b"0\r\n\r\n";
        bytes[end..].windows(last.len()).position(|it| it == last)? + last.len()
    } else if text.starts_with("GET") {
        0
    } else {
        value(&text, "content-length")
            .and_then(|it| it.parse().ok())
            .unwrap_or(0)
    };
    (end + length <= bytes.len()).then_some((text, end + length))
}
