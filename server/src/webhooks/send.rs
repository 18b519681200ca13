use std::{error::Error, sync::Arc, time::Duration};

use chrono::DateTime;
use reqwest::{
    Client, Response,
    header::{CONTENT_TYPE, RETRY_AFTER},
    redirect, retry,
};
use tokio::time::{Instant, timeout, timeout_at};
use url::Url;

use super::target::{Lookup, Scheme, Targets, UnusableHost};
use crate::error_chain::chain;

/// How long an attempt may take, including the DNS lookup and the connection.
pub const TIMEOUT: Duration = Duration::from_secs(15);
/// How long to read the rest of a response after its headers, so that the endpoint can finish sending it.
const READ_BODY: Duration = Duration::from_secs(1);
/// How much of a response's body to read. The body is not used.
const BODY_MAX: usize = 16 * 1024;
/// The maximum length of an error message, in characters.
const ERROR_MAX: usize = 200;

/// A request to an endpoint.
#[derive(Debug)]
pub struct Attempt<'a> {
    pub event_id: &'a str,
    /// The time of the attempt, in seconds since the Unix epoch.
    pub at: i64,
    pub signature: &'a str,
    pub payload: &'a str,
}

/// The result of an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sent {
    pub status: Option<u16>,
    /// `None` if the endpoint accepted the event.
    pub error: Option<String>,
    /// The retry delay that the endpoint requested, in seconds.
    pub retry_after: Option<u64>,
}

impl Sent {
    pub fn failed(error: impl Into<String>) -> Self {
        Self {
            status: None,
            error: Some(error.into().chars().take(ERROR_MAX).collect()),
            retry_after: None,
        }
    }
}

/// The HTTP clients for the two URL schemes. Different addresses are allowed for each scheme.
#[derive(Debug)]
pub struct Sender {
    https: Client,
    http: Client,
    targets: Targets,
    lookup: Arc<dyn Lookup>,
}

impl Sender {
    pub fn new(targets: &Targets, lookup: &Arc<dyn Lookup>) -> Result<Self, reqwest::Error> {
        let builder = |scheme| {
            Client::builder()
                .user_agent(concat!("Quota-Webhooks/", env!("CARGO_PKG_VERSION")))
                .dns_resolver(targets.resolver(scheme, lookup.clone()))
                // A proxy would resolve the host itself, so the host's addresses would not be checked.
                .no_proxy()
                // A redirect's target would not be checked. If an endpoint has moved, its new URL should be configured.
                .redirect(redirect::Policy::none())
                .retry(retry::never())
                .https_only(scheme == Scheme::Https)
                // Without idle connections, the host is resolved again for each attempt.
                .pool_max_idle_per_host(0)
                .timeout(TIMEOUT)
        };
        let client = |scheme| {
            builder(scheme).build().or_else(|error| {
                // This error must not prevent startup, because not every server sends webhooks.
                tracing::warn!(
                    error = %chain(&error),
                    "no CA certificates were found on this machine, so webhooks to https:// URLs fail"
                );
                builder(scheme).tls_certs_only([]).build()
            })
        };
        Ok(Self {
            https: client(Scheme::Https)?,
            http: client(Scheme::Http)?,
            targets: targets.clone(),
            lookup: lookup.clone(),
        })
    }

    /// Sends one request. [`Targets::parse`] must have checked `url`.
    pub async fn send(&self, url: Url, scheme: Scheme, attempt: &Attempt<'_>) -> Sent {
        let client = match scheme {
            Scheme::Https => &self.https,
            Scheme::Http => &self.http,
        };
        let request = client
            .post(url.clone())
            .header(CONTENT_TYPE, "application/json")
            .header("webhook-id", attempt.event_id)
            .header("webhook-timestamp", attempt.at)
            .header("webhook-signature", attempt.signature)
            .body(attempt.payload.to_owned());
        let response = async {
            let literal = self.targets.check_literal(&url, scheme, &*self.lookup);
            literal
                .await
                .map_err(|UnusableHost| UNUSABLE_HOST.to_owned())?;
            request.send().await.map_err(|error| reason(&error))
        };
        match timeout(TIMEOUT, response).await {
            Ok(Ok(response)) => received(response).await,
            Ok(Err(reason)) => Sent::failed(reason),
            Err(_) => Sent::failed(too_slow()),
        }
    }
}

const UNUSABLE_HOST: &str =
    "The URL's host is unknown, or has an address to which webhooks may not be sent.";

fn too_slow() -> String {
    format!(
        "The endpoint did not respond within {} seconds.",
        TIMEOUT.as_secs()
    )
}

async fn received(response: Response) -> Sent {
    let status = response.status();
    let retry_after = response
        .headers()
        .get(RETRY_AFTER)
        .and_then(|value| seconds_until(value.to_str().ok()?, response.headers()));
    skip_body(response).await;
    let error = if status.is_success() {
        None
    } else if status.is_redirection() {
        Some(format!(
            "The endpoint responded with status {}. Redirects are not followed.",
            status.as_u16()
        ))
    } else {
        Some(format!(
            "The endpoint responded with status {}.",
            status.as_u16()
        ))
    };
    Sent {
        status: Some(status.as_u16()),
        error,
        retry_after,
    }
}

/// Reads and discards the body: at most [`BODY_MAX`] bytes, for at most [`READ_BODY`].
async fn skip_body(mut response: Response) {
    let deadline = Instant::now() + READ_BODY;
    let mut read = 0;
    while read < BODY_MAX {
        match timeout_at(deadline, response.chunk()).await {
            Ok(Ok(Some(chunk))) => read += chunk.len(),
            _ => return,
        }
    }
}

/// Parses `Retry-After`, which contains seconds or a time. A time is compared with the `Date` header, which contains
/// the time on the endpoint's clock. Returns `None` if the field is invalid, if its time has passed, or if it contains
/// a time but there is no valid `Date` header.
fn seconds_until(retry_after: &str, headers: &reqwest::header::HeaderMap) -> Option<u64> {
    if let Ok(seconds) = retry_after.trim().parse() {
        return Some(seconds);
    }
    let time = |text: &str| DateTime::parse_from_rfc2822(text).ok();
    let until = time(retry_after)?;
    let now = time(headers.get("date")?.to_str().ok()?)?;
    u64::try_from((until - now).num_seconds()).ok()
}

/// Explains to the tenant why there was no response.
fn reason(error: &reqwest::Error) -> String {
    let mut cause: &dyn Error = error;
    loop {
        if cause.is::<UnusableHost>() {
            return UNUSABLE_HOST.to_owned();
        }
        match cause.source() {
            Some(source) => cause = source,
            None => break,
        }
    }
    if error.is_timeout() {
        too_slow()
    } else if error.is_connect() {
        format!("Cannot connect to the endpoint: {cause}.")
    } else {
        format!("The endpoint did not send a valid response: {cause}.")
    }
}

#[cfg(test)]
mod tests {
    use std::{
        convert::Infallible,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use futures_util::stream;
    use http_body_util::StreamBody;
    use hyper::body::{Bytes, Frame};
    use reqwest::{
        Body,
        header::{DATE, HeaderMap, HeaderValue},
    };

    use super::*;

    /// Returns a response whose body consists of `chunks` chunks of 1 KiB, with a pause before each of them. `read`
    /// counts the chunks that have been read.
    fn response(chunks: usize, pause: Duration, read: &Arc<AtomicUsize>) -> Response {
        let read = read.clone();
        let body = stream::unfold(chunks, move |left| {
            let read = read.clone();
            async move {
                let left = left.checked_sub(1)?;
                tokio::time::sleep(pause).await;
                read.fetch_add(1, Ordering::Relaxed);
                let chunk = Frame::data(Bytes::from_static(&[b'x'; 1024]));
                Some((Ok::<_, Infallible>(chunk), left))
            }
        });
        http::Response::builder()
            .status(500)
            .body(Body::wrap(StreamBody::new(Box::pin(body))))
            .unwrap()
            .into()
    }

    #[tokio::test(start_paused = true)]
    async fn slow_body_is_not_awaited_for_longer_than_a_second() {
        let read = Arc::new(AtomicUsize::new(0));
        let began = Instant::now();
        let sent = received(response(1000, Duration::from_millis(300), &read)).await;
        assert_eq!(sent.status, Some(500));
        assert_eq!(began.elapsed(), Duration::from_secs(1));
        assert_eq!(read.load(Ordering::Relaxed), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn at_most_16_kibibytes_of_a_body_are_read() {
        for (chunks, expected) in [(1000, 16), (5, 5)] {
            let read = Arc::new(AtomicUsize::new(0));
            let sent = received(response(chunks, Duration::ZERO, &read)).await;
            assert_eq!(sent.status, Some(500));
            assert_eq!(read.load(Ordering::Relaxed), expected);
        }
    }

    #[test]
    fn retry_after_is_seconds_or_a_time() {
        let mut headers = HeaderMap::new();
        let date = HeaderValue::from_static("Thu, 26 Nov 2026 11:00:00 GMT");
        assert_eq!(seconds_until("120", &headers), Some(120));
        let time = "Thu, 26 Nov 2026 11:01:30 GMT";
        assert_eq!(seconds_until(time, &headers), None);
        headers.insert(DATE, date);
        assert_eq!(seconds_until(time, &headers), Some(90));
        assert_eq!(
            seconds_until("Thu, 26 Nov 2026 10:00:00 GMT", &headers),
            None
        );
        for text in ["", "-1", "soon", "1.5"] {
            assert_eq!(seconds_until(text, &headers), None, "{text}");
        }
    }
}
