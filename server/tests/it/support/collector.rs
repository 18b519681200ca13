//! An OpenTelemetry collector (OTLP over HTTP) that remembers the spans it receives.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write as _,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{KeyValue, any_value::Value},
    trace::v1::status::StatusCode as SpanStatus,
};
use parking_lot::Mutex;
use poem::{Request, endpoint, http::StatusCode, listener::TcpAcceptor};
use prost::Message as _;
use tokio::net::TcpListener;

/// How long a test waits for spans that arrive within a second on an idle machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A span that was received. IDs are hexadecimal; the parent of a root span is empty.
#[derive(Debug, Clone)]
pub(crate) struct Received {
    pub(crate) service: String,
    pub(crate) name: String,
    pub(crate) trace: String,
    pub(crate) id: String,
    pub(crate) parent: String,
    pub(crate) attributes: BTreeMap<String, String>,
    pub(crate) is_error: bool,
}

impl Received {
    /// Returns an attribute, or an empty string if it is missing.
    pub(crate) fn attribute(&self, name: &str) -> &str {
        self.attributes.get(name).map_or("", String::as_str)
    }
}

#[derive(Default)]
struct State {
    spans: Vec<Received>,
    /// All received bytes, so that tests can search for content that must not be sent.
    bytes: Vec<u8>,
    /// The headers of the last request.
    headers: HashMap<String, String>,
}

#[derive(Clone)]
pub(crate) struct Collector {
    pub(crate) addr: SocketAddr,
    state: Arc<Mutex<State>>,
}

impl Collector {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let collector = Self {
            addr: listener.local_addr().expect("the socket is bound"),
            state: Arc::default(),
        };
        let acceptor = TcpAcceptor::from_tokio(listener).expect("the socket is bound");
        let state = collector.state.clone();
        let receive = endpoint::make(move |request| receive(state.clone(), request));
        tokio::spawn(poem::Server::new_with_acceptor(acceptor).run(receive));
        collector
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Returns the spans received so far.
    pub(crate) fn spans(&self) -> Vec<Received> {
        self.state.lock().spans.clone()
    }

    pub(crate) fn header(&self, name: &str) -> Option<String> {
        self.state.lock().headers.get(name).cloned()
    }

    /// Returns whether any request contained the given text.
    pub(crate) fn has_received(&self, text: &str) -> bool {
        let state = self.state.lock();
        state
            .bytes
            .windows(text.len())
            .any(|it| it == text.as_bytes())
    }

    /// Waits until the spans satisfy a condition, and returns them.
    pub(crate) async fn wait_until(&self, done: impl Fn(&[Received]) -> bool) -> Vec<Received> {
        let began = Instant::now();
        loop {
            let spans = self.spans();
            if done(&spans) {
                return spans;
            }
            assert!(began.elapsed() < PATIENCE, "{spans:#?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

async fn receive(state: Arc<Mutex<State>>, mut request: Request) -> poem::Result<StatusCode> {
    assert_eq!(request.uri().path(), "/v1/traces");
    let body = request.take_body().into_vec().await?;
    let content = ExportTraceServiceRequest::decode(&body[..]).expect("the body is OTLP");
    let mut state = state.lock();
    state.bytes.extend_from_slice(&body);
    state.headers = request
        .headers()
        .iter()
        .map(|(name, value)| {
            let value = value.to_str().unwrap_or_default();
            (name.to_string(), value.to_owned())
        })
        .collect();
    for group in content.resource_spans {
        let resource = group.resource.unwrap_or_default();
        let service = attributes(resource.attributes).remove("service.name");
        let service = service.unwrap_or_default();
        let spans = group.scope_spans.into_iter().flat_map(|it| it.spans);
        state.spans.extend(spans.map(|span| {
            Received {
                service: service.clone(),
                name: span.name,
                trace: hex(&span.trace_id),
                id: hex(&span.span_id),
                parent: hex(&span.parent_span_id),
                attributes: attributes(span.attributes),
                is_error: span
                    .status
                    .is_some_and(|it| it.code == SpanStatus::Error as i32),
            }
        }));
    }
    Ok(StatusCode::OK)
}

fn attributes(attributes: Vec<KeyValue>) -> BTreeMap<String, String> {
    let attributes = attributes.into_iter().map(|it| {
        let value = match it.value.and_then(|it| it.value) {
            Some(Value::StringValue(text)) => text,
            Some(Value::IntValue(number)) => number.to_string(),
            Some(Value::BoolValue(value)) => value.to_string(),
            other => format!("{other:?}"),
        };
        (it.key, value)
    });
    attributes.collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
