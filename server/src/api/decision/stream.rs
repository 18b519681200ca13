//! Streams decisions as server-sent events.
//!
//! A stream reads the log by position, that is, in the order in which rows become visible. The stream contains the
//! decisions that all replicas have shipped, and any replica can resume the stream. A stream holds only one batch at a
//! time, and reads the next one after the client has read the current one. A client that falls too far behind receives
//! the number of decisions it has missed. If a stream must end but its client does not read it to the end, the
//! connection is closed.
//!
//! While PostgreSQL is unreachable, events are delayed.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, stream};
use poem::{
    Body, IntoResponse, Response,
    http::{HeaderValue, header},
};
use poem_openapi::{
    ApiResponse,
    registry::{MetaMediaType, MetaResponse, MetaResponses, MetaSchema, MetaSchemaRef, Registry},
    types::{Example, Type},
};
use quota_common::{
    TenantId,
    decision::{Decision, DroppedDecisions},
};
use secrecy::{ExposeSecret, SecretString};
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::position::write_position;
use crate::{
    api::problem::ApiError,
    auth::AuthError,
    connection_marks::EndlessResponse,
    db::DbError,
    repo::usage_log::{self, Filter},
    state::AppState,
    tenant_places::{Place, TenantPlaces},
};

const MEDIA_TYPE: &str = "text/event-stream";
/// How often the log is read. A decision usually appears in the log within a second.
const EVERY: Duration = Duration::from_millis(500);
/// How often to send a comment while there are no events, so that proxies do not close the idle connection.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// How often to check whether a stream must end even though its client is not reading it.
const GUARD_EVERY: Duration = Duration::from_secs(2);
/// The maximum number of rows per read.
const BATCH: i64 = 500;
/// The maximum number of open streams on this replica.
const STREAMS: usize = 200;
/// The maximum number of open streams per tenant on this replica.
const STREAMS_OF_TENANT: usize = 20;

/// The open streams of this replica. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Streams(TenantPlaces);

impl Default for Streams {
    fn default() -> Self {
        Self(TenantPlaces::new(STREAMS_OF_TENANT, STREAMS))
    }
}

impl Streams {
    pub(super) fn begin(&self, tenant: TenantId) -> Result<Place, ApiError> {
        self.0.take(tenant).ok_or_else(ApiError::too_many_streams)
    }
}

/// The session that opened a stream.
#[derive(Clone)]
pub(super) struct StreamSession {
    pub(super) state: AppState,
    pub(super) token: SecretString,
}

/// A stream's position in its tenant's log.
pub(super) struct Tail {
    /// Checked before each read, so that a revoked session receives no further events.
    pub(super) session: StreamSession,
    pub(super) tenant: TenantId,
    pub(super) filter: Filter,
    /// The last position that was read.
    pub(super) after: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    SessionEnded,
    ServerStopping,
}

impl End {
    const fn reason(self) -> &'static str {
        match self {
            Self::SessionEnded => "session_ended",
            Self::ServerStopping => "server_stopping",
        }
    }
}

fn event(name: &str, id: Option<i64>, data: &impl serde::Serialize) -> String {
    let id = id
        .map(|id| format!("id: {}\n", write_position(id)))
        .unwrap_or_default();
    // Compact JSON contains no line breaks, because line breaks in strings are escaped.
    let data = serde_json::to_string(data).unwrap_or_default();
    format!("event: {name}\n{id}data: {data}\n\n")
}

impl StreamSession {
    /// Returns the reason why the stream must end, if there is one.
    async fn end(&self) -> Option<End> {
        if self.state.is_draining() {
            return Some(End::ServerStopping);
        }
        let session = self
            .state
            .sessions
            .of_access_token(self.token.expose_secret())
            .await;
        match session {
            Ok(session) if session.role.may_read_usage() => None,
            Ok(_) | Err(AuthError::Unauthorized) => Some(End::SessionEnded),
            // Do not end the stream if the session cannot be checked: the log cannot be read either, so no events are
            // sent.
            Err(_) => None,
        }
    }
}

impl Tail {
    /// Returns events for the decisions that were added to the log since the last read.
    async fn look(&mut self) -> Result<String, DbError> {
        let state = self.session.state.clone();
        let Ok(_turn) = state.reads.turn(self.tenant).await else {
            return Ok(String::new());
        };
        let mut tx = state.db.tenant(self.tenant).await?;
        let newest = usage_log::last_seq(&mut tx).await?;
        if newest <= self.after {
            tx.commit().await?;
            // The newest position can be lower than `after` only if PostgreSQL was restored to an earlier state.
            self.after = newest;
            return Ok(String::new());
        }
        let dropped = (newest - self.after - BATCH).max(0);
        let after = self.after + dropped;
        let rows = usage_log::between(&mut tx, &self.filter, after, newest).await?;
        tx.commit().await?;
        let mut text = String::new();
        if let Ok(count @ 1..) = u64::try_from(dropped) {
            state.metrics.decisions_not_streamed.inc_by(count);
            text = event("dropped", Some(after), &DroppedDecisions { count });
        }
        for row in rows {
            let seq = row.seq;
            text.push_str(&event("decision", Some(seq), &Decision::from(row)));
        }
        self.after = newest;
        Ok(text)
    }
}

/// Closes the connection of a stream that must end but is not being read. Dropping the guard stops its task and frees
/// the stream's slot.
struct Guard(JoinHandle<()>);

impl Guard {
    fn start(session: StreamSession, place: Place, endless: Option<EndlessResponse>) -> Self {
        let grace = session.state.config.write_timeout;
        Self(tokio::spawn(async move {
            while session.end().await.is_none() {
                sleep(GUARD_EVERY).await;
            }
            // Give the client time to read the remaining events.
            sleep(grace).await;
            if let Some(endless) = &endless {
                endless.close_connection();
            }
            drop(place);
            // Closing the connection also ends all other responses on the connection. The stream is then dropped, and
            // its guard aborts this task.
            std::future::pending::<()>().await;
        }))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Reads the log step by step. Each step starts after the client has read the output of the previous one.
fn events(tail: Tail, guard: Guard) -> impl Stream<Item = std::io::Result<Bytes>> + Send + 'static {
    struct Running {
        tail: Tail,
        _guard: Guard,
        next: Instant,
        sent: Instant,
        keep_alive: Duration,
        is_over: bool,
    }
    // Send comments well before the deadline for HTTP/2 responses that make no progress.
    let keep_alive = KEEP_ALIVE.min(tail.session.state.config.write_timeout / 3);
    let now = Instant::now();
    let running = Running {
        tail,
        _guard: guard,
        next: now,
        sent: now,
        keep_alive,
        is_over: false,
    };
    // Confirms the connection, and sets the time that the client waits before it reconnects.
    let hello = stream::iter([Ok(Bytes::from_static(b"retry: 1000\n: connected\n\n"))]);
    let rest = stream::unfold(running, |mut it| async move {
        if it.is_over {
            return None;
        }
        loop {
            sleep_until(it.next).await;
            it.next = Instant::now() + EVERY;
            if let Some(end) = it.tail.session.end().await {
                it.is_over = true;
                let text = event("end", None, &serde_json::json!({ "reason": end.reason() }));
                return Some((Ok(Bytes::from(text)), it));
            }
            let db = it.tail.session.state.db.clone();
            // The time limit keeps a slow PostgreSQL from delaying the next comment for long.
            let look = timeout(it.keep_alive, db.within_limit(it.tail.look()));
            let text = match look.await {
                Ok(Ok(text)) => text,
                Err(_) => String::new(),
                Ok(Err(error)) => {
                    tracing::debug!(error = %crate::db::chain(&error), "cannot read the usage log");
                    String::new()
                }
            };
            if !text.is_empty() || it.sent.elapsed() >= it.keep_alive {
                it.sent = Instant::now();
                let text = if text.is_empty() {
                    ":\n\n".into()
                } else {
                    text
                };
                return Some((Ok(Bytes::from(text)), it));
            }
        }
    });
    futures_util::StreamExt::chain(hello, rest)
}

/// Returns the schema of a stream, with an example event.
fn schema() -> MetaSchemaRef {
    MetaSchemaRef::Inline(Box::new(MetaSchema {
        example: Some(event("decision", Some(1), &Decision::example()).into()),
        ..MetaSchema::new("string")
    }))
}

pub struct DecisionStream(Body);

impl DecisionStream {
    pub(super) fn new(tail: Tail, place: Place, endless: Option<EndlessResponse>) -> Self {
        let guard = Guard::start(tail.session.clone(), place, endless);
        Self(Body::from_bytes_stream(events(tail, guard)))
    }
}

impl IntoResponse for DecisionStream {
    fn into_response(self) -> Response {
        let mut response = Response::builder().body(self.0);
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
        // Otherwise, nginx would buffer events. Caddy never buffers this media type.
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        response
    }
}

impl ApiResponse for DecisionStream {
    fn meta() -> MetaResponses {
        MetaResponses {
            responses: vec![MetaResponse {
                description: "Server-sent events: `decision`, `dropped` and `end`.",
                status: Some(200),
                status_range: None,
                content: vec![MetaMediaType {
                    content_type: MEDIA_TYPE,
                    schema: schema(),
                }],
                headers: vec![],
            }],
        }
    }

    fn register(registry: &mut Registry) {
        Decision::register(registry);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_of_data() {
        let text = event(
            "decision",
            Some(1),
            &serde_json::json!({"endpoint": "a\nb\r\n: c"}),
        );
        assert_eq!(text.lines().count(), 4);
        assert!(text.ends_with("\n\n"));
    }
}
