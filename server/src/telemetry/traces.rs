//! Decides which requests are traced, and sends their spans to an OpenTelemetry collector.
//!
//! A request is traced if a trusted proxy has decided to trace it. If no trusted proxy has decided, a configured
//! fraction of requests is traced.
//!
//! Spans that have ended wait in a bounded queue. A task sends the spans in batches (OTLP over HTTP, as protobuf).
//! Spans that do not fit in the queue or that the collector does not accept are dropped and counted. So a slow or
//! unreachable collector does not delay requests, and delays shutdown by at most two seconds.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::{
    Context, InstrumentationScope, KeyValue,
    propagation::{Extractor, TextMapPropagator as _},
    trace::{TraceContextExt as _, TracerProvider as _},
};
use opentelemetry_otlp::{
    ExporterBuildError, Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _,
};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    propagation::TraceContextPropagator,
    trace::{
        Sampler, SdkTracer, SdkTracerProvider, Span as SdkSpan, SpanData, SpanExporter as _,
        SpanProcessor,
    },
};
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use secrecy::ExposeSecret as _;
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{self, MissedTickBehavior},
};
use uuid::Uuid;

use super::metrics::Metrics;
use crate::{
    config::TraceSettings,
    spans::{Span, SpanKind},
};

/// The maximum number of spans that wait to be sent.
const QUEUE: usize = 4096;
/// The maximum number of spans per request to the collector.
const BATCH: usize = 512;
const SEND_EVERY: Duration = Duration::from_millis(500);
/// How long sending a batch may take, including retries.
const SEND_WITHIN: Duration = Duration::from_secs(5);
/// How long shutdown waits for the last spans to be sent.
const STOP_WITHIN: Duration = Duration::from_secs(2);

/// Starts request traces and sends their spans.
#[derive(Debug)]
pub struct Traces {
    tracer: SdkTracer,
    /// The fraction of requests to trace if no trusted proxy has decided.
    ratio: f64,
    stop: watch::Sender<bool>,
    sender: Mutex<Option<JoinHandle<()>>>,
}

/// Why traces cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum TracesError {
    #[error("cannot create the HTTP client for traces")]
    Client(#[from] reqwest::Error),
    #[error("cannot create the trace exporter")]
    Exporter(#[from] ExporterBuildError),
}

impl Traces {
    /// Starts the task that sends spans. Must be called within a tokio runtime.
    pub fn start(
        settings: &TraceSettings,
        replica: Uuid,
        metrics: &Metrics,
    ) -> Result<Self, TracesError> {
        let resource = Resource::builder_empty()
            .with_service_name(settings.service_name.clone())
            .with_attributes([
                KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
                KeyValue::new("service.instance.id", replica.to_string()),
            ])
            .build();
        let client = reqwest::Client::builder()
            .timeout(SEND_WITHIN)
            .redirect(reqwest::redirect::Policy::none())
            .default_headers(headers(settings))
            .build()?;
        let mut exporter = SpanExporter::builder()
            .with_http()
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(format!("{}/v1/traces", settings.endpoint))
            .with_timeout(SEND_WITHIN)
            .with_http_client(client)
            .build()?;
        exporter.set_resource(&resource);

        let (spans, waiting) = mpsc::channel(QUEUE);
        let queue = Queue {
            spans,
            dropped: metrics.spans_dropped.clone(),
        };
        let provider = SdkTracerProvider::builder()
            // Spans are created only for requests that are traced.
            .with_sampler(Sampler::AlwaysOn)
            .with_resource(resource)
            .with_span_processor(queue)
            .build();
        let scope = InstrumentationScope::builder("quota")
            .with_version(env!("CARGO_PKG_VERSION"))
            .build();
        let (stop, stopping) = watch::channel(false);
        let sender = Sender {
            waiting,
            exporter,
            sent: metrics.spans_sent.clone(),
            dropped: metrics.spans_dropped.clone(),
            is_failing: false,
        };
        Ok(Self {
            tracer: provider.tracer_with_scope(scope),
            ratio: settings.ratio,
            stop,
            sender: Mutex::new(Some(tokio::spawn(sender.run(stopping)))),
        })
    }

    /// Starts the span of a request, if the request is traced. `traceparent` is the header of that name
    /// (<https://www.w3.org/TR/trace-context/>), if the header comes from a trusted proxy.
    pub fn begin(&self, traceparent: Option<&str>) -> Option<Span> {
        let parent = match traceparent.map_or(Sampling::Undecided, Sampling::of) {
            Sampling::On(parent) => parent,
            Sampling::Undecided if fastrand::f64() < self.ratio => Context::new(),
            Sampling::Off | Sampling::Undecided => return None,
        };
        let kind = SpanKind::Server;
        Some(Span::start(&self.tracer, &parent, "request", kind))
    }

    /// Waits up to two seconds for the remaining spans to be sent. Spans that have not been sent by then, and later
    /// spans, are lost.
    pub async fn stop(&self) {
        let _ = self.stop.send(true);
        let Some(mut sender) = self.sender.lock().take() else {
            return;
        };
        if time::timeout(STOP_WITHIN, &mut sender).await.is_err() {
            sender.abort();
            tracing::warn!("the last traces could not be sent in time");
        }
    }
}

fn headers(settings: &TraceSettings) -> HeaderMap {
    let headers = settings.headers.iter().filter_map(|(name, value)| {
        let name = HeaderName::from_bytes(name.as_bytes()).ok()?;
        let mut value = HeaderValue::from_str(value.expose_secret()).ok()?;
        value.set_sensitive(true);
        Some((name, value))
    });
    headers.collect()
}

/// A trusted proxy's decision about a request.
enum Sampling {
    On(Context),
    Off,
    /// The proxy has not decided, or its header could not be parsed.
    Undecided,
}

/// The length of a `traceparent` header with version 00. The header's last digit contains the sampled flag.
const TRACEPARENT: usize = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".len();

impl Sampling {
    fn of(traceparent: &str) -> Self {
        // A proxy that traces requests leaves the sampled flag of most `traceparent` headers unset, so this check
        // usually avoids parsing the header. The rest of such a header is not validated.
        let is_off = |digit: &u8| matches!(digit, b'0' | b'2' | b'4' | b'6' | b'8');
        if traceparent.len() == TRACEPARENT && traceparent.as_bytes().last().is_some_and(is_off) {
            return Self::Off;
        }
        let header = Traceparent(traceparent);
        let context = TraceContextPropagator::new().extract_with_context(&Context::new(), &header);
        let span = context.span();
        let parent = span.span_context();
        match (parent.is_valid(), parent.is_sampled()) {
            (true, true) => Self::On(context.clone()),
            (true, false) => Self::Off,
            (false, _) => Self::Undecided,
        }
    }
}

struct Traceparent<'a>(&'a str);

impl Extractor for Traceparent<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        (key == "traceparent").then_some(self.0)
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent"]
    }
}

/// Receives spans that have ended.
#[derive(Debug)]
struct Queue {
    spans: mpsc::Sender<SpanData>,
    dropped: Counter,
}

impl SpanProcessor for Queue {
    fn on_start(&self, _: &mut SdkSpan, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        if self.spans.try_send(span).is_err() {
            self.dropped.inc();
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

/// Sends waiting spans to the collector.
struct Sender {
    waiting: mpsc::Receiver<SpanData>,
    exporter: SpanExporter,
    sent: Counter,
    dropped: Counter,
    /// Whether the last batch was not accepted.
    is_failing: bool,
}

impl Sender {
    /// Sends spans at regular intervals until the server stops: waking up for every span would cost more.
    async fn run(mut self, mut stopping: watch::Receiver<bool>) {
        let mut ticks = time::interval(SEND_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let is_last = tokio::select! {
                biased;
                // `wait_for` also completes when the `Traces` are dropped.
                _ = stopping.wait_for(|stop| *stop) => true,
                _ = ticks.tick() => false,
            };
            self.send_waiting().await;
            if is_last {
                return;
            }
        }
    }

    async fn send_waiting(&mut self) {
        loop {
            let mut batch = Vec::with_capacity(self.waiting.len().min(BATCH));
            while batch.len() < BATCH
                && let Ok(span) = self.waiting.try_recv()
            {
                batch.push(span);
            }
            if batch.is_empty() {
                return;
            }
            self.send(batch).await;
        }
    }

    async fn send(&mut self, batch: Vec<SpanData>) {
        let count = batch.len() as u64;
        match self.exporter.export(batch).await {
            Ok(()) => {
                self.sent.inc_by(count);
                if std::mem::take(&mut self.is_failing) {
                    tracing::info!("the collector accepts traces again");
                }
            }
            Err(error) => {
                self.dropped.inc_by(count);
                // An outage of the collector is logged once.
                if !std::mem::replace(&mut self.is_failing, true) {
                    tracing::warn!(error = %error, spans = count, "cannot send traces to the collector");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-";

    fn settings(endpoint: &str, ratio: f64) -> TraceSettings {
        TraceSettings {
            endpoint: endpoint.to_owned(),
            headers: Vec::new(),
            service_name: "quota".into(),
            ratio,
        }
    }

    /// An address on which nothing listens.
    const NOWHERE: &str = "http://127.0.0.1:1";

    #[test]
    fn decision_of_the_proxy_is_read_from_the_header() {
        let of = |header: &str| match Sampling::of(header) {
            Sampling::On(context) => context.span().span_context().trace_id().to_string(),
            Sampling::Off => "off".into(),
            Sampling::Undecided => "undecided".into(),
        };
        for flags in ["01", "03", "0b", "ff"] {
            let trace = of(&format!("{PARENT}{flags}"));
            assert_eq!(trace, "4bf92f3577b34da6a3ce929d0e0e4736", "{flags}");
        }
        for flags in ["00", "02", "0a", "fe"] {
            assert_eq!(of(&format!("{PARENT}{flags}")), "off", "{flags}");
        }
        for header in [
            "",
            "01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473x-00f067aa0ba902b7-01",
        ] {
            assert_eq!(of(header), "undecided", "{header}");
        }
    }

    #[tokio::test]
    async fn ratio_of_requests_is_traced_unless_the_proxy_has_decided() {
        let metrics = Metrics::default();
        let traced = |ratio: f64, header: Option<&str>| {
            let traces = Traces::start(&settings(NOWHERE, ratio), Uuid::nil(), &metrics);
            let traces = traces.expect("the settings are valid");
            (0..10_000)
                .filter(|_| traces.begin(header).is_some())
                .count()
        };
        assert_eq!(traced(0.0, None), 0);
        assert_eq!(traced(1.0, None), 10_000);
        // The bounds are 7.5 standard deviations from the mean, so a count outside them has a probability below 1e-11.
        assert!((25..=175).contains(&traced(0.01, None)));
        assert_eq!(traced(0.0, Some(&format!("{PARENT}01"))), 10_000);
        assert_eq!(traced(1.0, Some(&format!("{PARENT}00"))), 0);
        assert_eq!(traced(0.0, Some("nonsense")), 0);
    }

    #[tokio::test]
    async fn spans_that_cannot_be_sent_are_dropped_and_counted() {
        let metrics = Metrics::default();
        let traces = Traces::start(&settings(NOWHERE, 1.0), Uuid::nil(), &metrics);
        let traces = traces.expect("the settings are valid");
        for _ in 0..QUEUE + 10 {
            drop(traces.begin(None));
        }
        assert_eq!(metrics.spans_dropped.get(), 10, "the queue is full");
        let began = std::time::Instant::now();
        traces.stop().await;
        assert!(began.elapsed() < STOP_WITHIN * 5, "{:?}", began.elapsed());
        assert_eq!(metrics.spans_sent.get(), 0);
    }
}
