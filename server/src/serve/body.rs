//! Response bodies that are passed to hyper.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};

use super::connection::RequestInFlight;
use crate::tenant_places::HeldUntilSent;

/// The maximum size of a chunk.
const CHUNK: usize = 16 * 1024;

/// A response body that keeps its request in flight and is passed to hyper in small chunks.
pub(super) struct ResponseBody<B> {
    pub(super) body: B,
    /// The rest of a large frame. hyper would copy a large frame as a whole, and keep that memory until the connection
    /// closes.
    pub(super) rest: Bytes,
    /// Whether a chunk has just been passed to hyper.
    pub(super) has_passed: bool,
    pub(super) request: RequestInFlight,
    pub(super) _held: Option<HeldUntilSent>,
}

impl<B: Body<Data = Bytes> + Unpin> Body for ResponseBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        // A chunk waits until the previous chunk has been sent. Otherwise, hyper would collect several chunks before it
        // writes them, and keep a buffer of their total size.
        if !self.rest.is_empty() {
            let is_early = std::mem::take(&mut self.has_passed) || self.request.has_unsent();
            if is_early && self.request.hold_back() {
                return Poll::Pending;
            }
        }
        let mut frame = if self.rest.is_empty() {
            Pin::new(&mut self.body).poll_frame(context)
        } else {
            Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut self.rest)))))
        };
        if let Poll::Ready(Some(Ok(frame))) = &mut frame
            && let Some(data) = frame.data_mut()
            && data.len() > CHUNK
        {
            self.rest = data.split_off(CHUNK);
            self.has_passed = true;
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let rest = self.rest.len() as u64;
        let hint = self.body.size_hint();
        let mut with_rest = SizeHint::new();
        with_rest.set_lower(hint.lower() + rest);
        if let Some(upper) = hint.upper() {
            with_rest.set_upper(upper + rest);
        }
        with_rest
    }
}
