//! A gRPC client for Envoy's rate limit service.

use std::net::SocketAddr;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Request,
    client::conn::http2::{SendRequest, handshake},
    header::HeaderMap,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message as _;
use quota_server::api::grpc::message::{
    Code, Descriptor, Entry, RateLimitRequest, RateLimitResponse,
};
use serde_json::Value;
use tokio::net::TcpStream;

pub(crate) const SHOULD_RATE_LIMIT: &str =
    "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit";

/// A connection to the gRPC listener.
#[derive(Clone)]
pub(crate) struct GrpcClient {
    addr: SocketAddr,
    sender: SendRequest<Full<Bytes>>,
}

/// The response to a call.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) http_status: u16,
    pub(crate) headers: HeaderMap,
    /// The gRPC status. `None` if the response is not gRPC.
    pub(crate) status: Option<u32>,
    pub(crate) response: RateLimitResponse,
}

/// Returns a descriptor with the given entries.
pub(crate) fn descriptor(entries: &[(&str, &str)]) -> Descriptor {
    let entries = entries.iter().map(|(key, value)| Entry {
        key: (*key).to_owned(),
        value: value.as_bytes().to_vec(),
    });
    Descriptor {
        entries: entries.collect(),
        ..Descriptor::default()
    }
}

/// Returns a request to check a key.
pub(crate) fn request(key: &str) -> RateLimitRequest {
    RateLimitRequest {
        descriptors: vec![descriptor(&[("api_key", key)])],
        hits_addend: 0,
    }
}

/// Returns a message with the prefix that gRPC requires.
pub(crate) fn framed(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).expect("a short message");
    [&[0], &length.to_be_bytes()[..], message].concat()
}

impl GrpcClient {
    pub(crate) async fn connect(addr: SocketAddr) -> Self {
        let stream = TcpStream::connect(addr).await.expect("the server listens");
        // A call is sent in two packets. Without this option, the second packet would wait until the server has
        // acknowledged the first.
        stream.set_nodelay(true).expect("a socket");
        let (sender, connection) = handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .expect("the server speaks HTTP/2");
        tokio::spawn(connection);
        Self { addr, sender }
    }

    /// Calls the service with one service token.
    pub(crate) async fn call(&self, token: &str, request: &RateLimitRequest) -> Reply {
        let body = framed(&request.encode_to_vec());
        self.send(&[("x-service-token", token)], body).await
    }

    /// Calls the service with the given metadata and body, which may be malformed.
    pub(crate) async fn send(&self, metadata: &[(&str, &str)], body: Vec<u8>) -> Reply {
        self.send_to(SHOULD_RATE_LIMIT, "application/grpc", metadata, body)
            .await
    }

    pub(crate) async fn send_to(
        &self,
        path: &str,
        media_type: &str,
        metadata: &[(&str, &str)],
        body: Vec<u8>,
    ) -> Reply {
        let mut request = Request::post(format!("http://{}{path}", self.addr))
            .header("content-type", media_type)
            .header("te", "trailers");
        for (name, value) in metadata {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(Bytes::from(body)));
        let mut sender = self.sender.clone();
        sender.ready().await.expect("the connection is open");
        let response = sender.send_request(request.expect("a valid request"));
        let (head, body) = response.await.expect("the server responds").into_parts();
        let body = body.collect().await.expect("the body arrives whole");
        let trailers = body.trailers().cloned().unwrap_or_default();
        let status = [&head.headers, &trailers].map(|it| it.get("grpc-status"));
        let status = status.into_iter().flatten().next();
        let status = status.map(|it| it.to_str().expect("text").parse().expect("a number"));
        let body = body.to_bytes();
        let response = if status == Some(0) {
            assert_eq!(framed(&body[5..]), body, "one uncompressed message");
            RateLimitResponse::decode(&body[5..]).expect("a response")
        } else {
            RateLimitResponse::default()
        };
        assert!(head.headers.contains_key("x-request-id"));
        Reply {
            http_status: head.status.as_u16(),
            headers: head.headers,
            status,
            response,
        }
    }
}

impl Reply {
    /// Returns the response code. The call must have succeeded.
    pub(crate) fn code(&self) -> Code {
        assert_eq!((self.http_status, self.status), (200, Some(0)), "{self:?}");
        let code = Code::try_from(self.response.overall_code).expect("a known code");
        assert_eq!(code == Code::Ok, self.response.raw_body.is_empty());
        code
    }

    /// Returns the codes of the descriptors.
    pub(crate) fn codes(&self) -> Vec<Code> {
        let statuses = self.response.statuses.iter();
        let codes = statuses.map(|it| Code::try_from(it.code).expect("a known code"));
        codes.collect()
    }

    /// Returns a header that Envoy adds to its response.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.response.response_headers_to_add.iter();
        let header = headers.find(|header| header.key == name)?;
        assert!(headers.all(|other| other.key != name), "{name} twice");
        Some(&header.value)
    }

    /// Returns the decision in the dynamic metadata.
    pub(crate) fn decision(&self) -> &str {
        let metadata = self.response.dynamic_metadata.as_ref();
        let [field] = &metadata.expect("every response has metadata").fields[..] else {
            panic!("{self:?}");
        };
        assert_eq!(field.key, "decision");
        &field.value.as_ref().expect("a value").string_value
    }

    /// Returns the problem in the body that Envoy sends to the consumer.
    pub(crate) fn problem(&self) -> Value {
        assert_eq!(
            self.header("content-type"),
            Some("application/problem+json")
        );
        serde_json::from_slice(&self.response.raw_body).expect("JSON")
    }

    pub(crate) fn message(&self) -> &str {
        let message = self.headers.get("grpc-message");
        message.map_or("", |it| it.to_str().expect("text"))
    }
}
