//! Handles request bodies that are not read to the end.
//!
//! If the end of a request's body has not arrived when the response is sent, hyper closes the connection instead of
//! reading the rest later. hyper does not announce this. A proxy could then send another client's request on the
//! connection, and that client would get no response.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, combinators::BoxBody};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use parking_lot::Mutex;
use poem::http::header::{CONNECTION, EXPECT, HeaderMap, HeaderValue};
use tokio::time::timeout;

/// If more than this remains of a body, the rest is not read: closing the connection costs less.
const READ_MAX: u64 = 64 * 1024;
/// How long a response waits for the rest of a body. Many clients send the head and the body in two packets.
const WAIT: Duration = Duration::from_millis(30);

/// Finds out whether the end of a request's body arrives in time.
pub(super) struct BodyEnd {
    state: Arc<Mutex<State>>,
    /// Whether the client may be waiting for permission to send the body. Reading the body would give that permission.
    is_withheld: bool,
}

enum State {
    /// A handler has the body, or reading the body has failed.
    NotEnded,
    Ended,
    /// The handler has dropped the body before its end.
    Dropped(Incoming),
}

impl BodyEnd {
    /// Returns the body to pass to a handler.
    pub(super) fn watch(headers: &HeaderMap, body: Incoming) -> (Self, poem::Body) {
        let state = Arc::new(Mutex::new(State::NotEnded));
        let watched = WatchedBody {
            body: Some(body),
            has_ended: false,
            has_failed: false,
            state: state.clone(),
        };
        let end = Self {
            state,
            is_withheld: headers.contains_key(EXPECT),
        };
        (end, BoxBody::new(watched).into())
    }

    /// Announces in the head of a response that the connection is about to be closed, unless the end of the request's
    /// body has arrived or arrives soon.
    pub(super) async fn announce_close(self, response: &mut HeaderMap) {
        if response.contains_key(CONNECTION) {
            // The server is stopping, so the connection closes in any case.
            return;
        }
        let state = std::mem::replace(&mut *self.state.lock(), State::NotEnded);
        let has_ended = match state {
            State::Ended => true,
            State::Dropped(body) => !self.is_withheld && ends_soon(body).await,
            State::NotEnded => false,
        };
        if !has_ended {
            response.insert(CONNECTION, HeaderValue::from_static("close"));
        }
    }
}

/// Reads the rest of a body. Returns whether its end arrives soon.
async fn ends_soon(mut body: Incoming) -> bool {
    let mut left = READ_MAX;
    if body.size_hint().lower() > left {
        return false;
    }
    let read = async {
        while !body.is_end_stream() {
            match body.frame().await {
                None => break,
                Some(Err(_)) => return false,
                Some(Ok(frame)) => {
                    let length = frame.data_ref().map_or(0, Bytes::len) as u64;
                    let Some(rest) = left.checked_sub(length) else {
                        return false;
                    };
                    left = rest;
                }
            }
        }
        true
    };
    timeout(WAIT, read).await.unwrap_or(false)
}

/// A request body that returns the rest of itself when it is dropped.
struct WatchedBody {
    body: Option<Incoming>,
    has_ended: bool,
    has_failed: bool,
    state: Arc<Mutex<State>>,
}

impl Body for WatchedBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let Some(body) = &mut self.body else {
            return Poll::Ready(None);
        };
        let frame = ready!(Pin::new(body).poll_frame(context));
        // After an error, hyper reports the end of the body.
        self.has_failed |= matches!(frame, Some(Err(_)));
        self.has_ended |= frame.is_none();
        Poll::Ready(frame.map(|frame| frame.map_err(io::Error::other)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Incoming::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body
            .as_ref()
            .map_or_else(SizeHint::default, Incoming::size_hint)
    }
}

impl Drop for WatchedBody {
    fn drop(&mut self) {
        if self.has_failed {
            return;
        }
        let has_ended = self.has_ended || self.is_end_stream();
        *self.state.lock() = match self.body.take() {
            Some(body) if !has_ended => State::Dropped(body),
            _ => State::Ended,
        };
    }
}
