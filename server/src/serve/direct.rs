//! Serves plain requests directly from the bytes of a connection, without hyper.
//!
//! Requests that the endpoint accepts are served directly, in order. For a plain request that the endpoint does not
//! accept, or whose body has not arrived completely, the stream is lent to hyper. hyper can read only the bytes of that
//! request, whose end is known. So by the time hyper's response has been sent, hyper has not read any later bytes. The
//! first request that is not plain, or that arrives in too many parts, ends the direct service: hyper takes over the
//! connection, starting with that request.
//!
//! The stream and the connection's deadlines work as they do with hyper; see [`super::connection`]. If a panic occurs
//! while the endpoint responds to a request, only that request gets an error.

use std::{
    future::poll_fn,
    io,
    net::IpAddr,
    panic::AssertUnwindSafe,
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
};

use futures_util::FutureExt as _;
use tokio::{
    io::{AsyncRead as _, AsyncWriteExt as _, ReadBuf},
    task,
};

use super::{
    connection::{Connection, Shutdown},
    stream::{LentStream, WatchedStream},
    table::Slot,
};
use crate::plain_request::{Arrival, DirectEndpoint, Parsed, parse};

/// The size of the first read. Most requests are smaller.
const FIRST_READ: usize = 2 * 1024;
/// Larger buffers are not kept between requests.
const KEPT_MAX: usize = 8 * 1024;
/// Once the responses to pipelined requests reach this size, they are sent before the next request is handled.
const OUTPUT_MAX: usize = 32 * 1024;
/// If a request arrives in more parts than this, hyper takes over the connection. Each time a part arrives, the request
/// is parsed from the beginning, so the number of parts must be limited.
const PARTS_MAX: u32 = 16;

type Error = Box<dyn std::error::Error + Send + Sync>;

/// The context for serving one connection directly.
pub(super) struct DirectService<'a, D> {
    pub(super) endpoint: &'a D,
    pub(super) peer: IpAddr,
    pub(super) connection: &'a Arc<Connection>,
    pub(super) slot: &'a Slot,
}

/// The result of a read.
enum Read {
    Bytes(usize),
    /// The connection has been asked to shut down.
    Stop,
}

/// The next request that has not received a response.
enum Next {
    /// The request has not arrived, or has arrived only in part.
    Incomplete,
    /// hyper must respond to the request, which has this length.
    Foreign(usize),
    /// hyper must respond to the request and to everything after it.
    Other,
}

impl<D: DirectEndpoint> DirectService<'_, D> {
    /// Serves requests until hyper must take over the connection. Meanwhile, `http` (hyper) serves individual plain
    /// requests that cannot be served directly, on `lent`. Returns the stream, beginning with the first request that
    /// has not received a response, or `None` if the connection has ended.
    pub(super) async fn serve<H>(
        &self,
        mut stream: WatchedStream,
        lent: &LentStream,
        mut http: Pin<&mut H>,
    ) -> Result<Option<WatchedStream>, Error>
    where
        H: Future<Output = Result<(), Error>>,
    {
        let mut input = vec![0; FIRST_READ];
        let mut output = Vec::new();
        // The number of unread bytes, and the number of parts in which they have arrived.
        let (mut end, mut parts) = (0, 0);
        loop {
            let is_new_head = self.connection.head_began().is_none();
            match self.read(&mut stream, &mut input[end..]).await? {
                Read::Bytes(0) => return Ok(None),
                Read::Stop if end == 0 => return Ok(None),
                // The incomplete request is left to hyper, whose response announces that the connection will close.
                Read::Stop => {
                    stream.unread(&input[..end]);
                    return Ok(Some(stream));
                }
                Read::Bytes(length) => end += length,
            }
            parts += 1;
            let mut start = 0;
            // When the bytes were read, if a single read returned all of them. Used only for the first call of `answer`,
            // because later calls happen later.
            let mut just_read = self.connection.head_began();
            just_read = just_read.filter(|_| is_new_head && parts == 1);
            loop {
                let (length, next) = self
                    .answer(
                        &input[start..end],
                        just_read.take(),
                        &mut stream,
                        &mut output,
                    )
                    .await?;
                start += length;
                if start > 0 {
                    parts = u32::from(start < end);
                }
                if length > 0 && start < end {
                    // The next request has already begun to arrive, but sending the responses has cleared its deadline.
                    // This call sets the deadline again.
                    self.connection.has_read(end - start);
                }
                match next {
                    Next::Foreign(length) if !self.is_stopping() => {
                        let available = length.min(end - start);
                        stream.unread(&input[start..start + available]);
                        stream.allow(length);
                        match self.lend(stream, lent, http.as_mut()).await? {
                            None => return Ok(None),
                            Some(returned) => stream = returned,
                        }
                        start += available;
                    }
                    Next::Incomplete if parts <= PARTS_MAX => break,
                    Next::Incomplete | Next::Foreign(_) | Next::Other => {
                        stream.unread(&input[start..end]);
                        return Ok(Some(stream));
                    }
                }
            }
            input.copy_within(start..end, 0);
            end -= start;
            if end == input.len() {
                input.resize(2 * end, 0);
            } else if end == 0 && input.len() > KEPT_MAX {
                input = vec![0; FIRST_READ];
            }
        }
    }

    /// Lets hyper serve one request. The stream must allow reading only that request's length. Returns the stream after
    /// the response has been sent, or `None` if hyper has closed the connection.
    async fn lend<H>(
        &self,
        stream: WatchedStream,
        lent: &LentStream,
        mut http: Pin<&mut H>,
    ) -> Result<Option<WatchedStream>, Error>
    where
        H: Future<Output = Result<(), Error>>,
    {
        let before = self.connection.requests();
        lent.lend(stream);
        poll_fn(|context| {
            if let Poll::Ready(result) = http.as_mut().poll(context) {
                return Poll::Ready(result.map(|()| None));
            }
            let has_begun = self.connection.requests() != before;
            if has_begun
                && self.connection.has_responded()
                && let Some(mut stream) = lent.take_exhausted()
            {
                stream.allow(usize::MAX);
                return Poll::Ready(Ok(Some(stream)));
            }
            Poll::Pending
        })
        .await
    }

    async fn read(&self, stream: &mut WatchedStream, into: &mut [u8]) -> io::Result<Read> {
        poll_fn(|context| {
            let mut buffer = ReadBuf::new(into);
            match Pin::new(&mut *stream).poll_read(context, &mut buffer) {
                Poll::Ready(result) => {
                    Poll::Ready(result.map(|()| Read::Bytes(buffer.filled().len())))
                }
                Poll::Pending if self.is_stopping() => Poll::Ready(Ok(Read::Stop)),
                Poll::Pending => Poll::Pending,
            }
        })
        .await
    }

    fn is_stopping(&self) -> bool {
        self.connection.shutdown() != Shutdown::None
    }

    /// Responds to the requests at the start of `bytes`, up to the first request that is incomplete or not accepted.
    /// Returns the total length of the requests that got a response, and what follows them. `just_read` is when the bytes
    /// were read, as returned by [`Connection::head_began`]. `None` if that is unknown or no longer recent.
    async fn answer(
        &self,
        bytes: &[u8],
        just_read: Option<u64>,
        stream: &mut WatchedStream,
        output: &mut Vec<u8>,
    ) -> io::Result<(usize, Next)> {
        let mut in_flight = None;
        let mut has_waited = just_read.is_none();
        let mut answered = 0;
        // The response to a pipelined request while earlier responses are in `output`. Kept apart from them, so that they
        // can be sent while this one waits.
        let mut later = Vec::new();
        let next = loop {
            if answered == bytes.len() {
                break Next::Incomplete;
            }
            let (request, head) = match parse(&bytes[answered..]) {
                Parsed::Plain(request, head) => (request, head),
                Parsed::Incomplete => break Next::Incomplete,
                Parsed::Other => break Next::Other,
            };
            let length = head + request.body_length;
            // Requests with incomplete bodies are left to hyper, which may respond before the rest of the body arrives.
            let is_complete = request.body.len() == request.body_length;
            let route = is_complete.then(|| self.endpoint.route(&request)).flatten();
            let Some(route) = route.filter(|_| !self.is_stopping()) else {
                break Next::Foreign(length);
            };
            let is_authenticated = self.connection.marks.is_authenticated();
            // Uses the time of the read, to save a reading of the clock. Later requests have waited for the first one. An
            // unauthenticated connection may have waited for the lock of the connection table since the read.
            let time = just_read.filter(|_| in_flight.is_none() && is_authenticated);
            if in_flight.is_none() {
                let (is_first, request) = self.connection.begin_request(0);
                if is_first {
                    self.slot.has_requested();
                }
                in_flight = Some(request);
            }
            let marks = &self.connection.marks;
            let marks = (!is_authenticated).then_some(marks);
            let (finished, response) = if output.is_empty() {
                (None, &mut *output)
            } else {
                (Some(&mut *output), &mut later)
            };
            let mut context = None;
            let result = {
                // The future is pinned here, because it is large: moving it would cost more than most of its work.
                let answering = pin!(self.endpoint.answer(
                    route,
                    &request,
                    Arrival {
                        peer: self.peer,
                        time: time.map(|it| self.connection.at(it).into_std()),
                        marks,
                    },
                    &mut context,
                    response
                ));
                let mut answering = pin!(AssertUnwindSafe(answering).catch_unwind());
                let at_once = poll_fn(|context| Poll::Ready(answering.as_mut().poll(context)));
                match at_once.await {
                    Poll::Ready(result) => result,
                    Poll::Pending => {
                        has_waited = true;
                        if let Some(finished) = finished {
                            send(stream, finished).await?;
                        }
                        while_open(stream, answering).await?
                    }
                }
            };
            if result.is_err() {
                response.clear();
                let answering = self.endpoint.answer_after_panic(
                    route,
                    &request,
                    self.peer,
                    context.take(),
                    response,
                );
                // Boxed, so that connections reserve no memory for it.
                Box::pin(answering).await;
            }
            drop(context);
            output.append(&mut later);
            answered += length;
            if output.len() >= OUTPUT_MAX {
                send(stream, output).await?;
            }
            // One read may contain hundreds of requests. Other tasks must be able to run between them.
            task::coop::consume_budget().await;
        };
        if !output.is_empty() {
            send(stream, output).await?;
        }
        if let Some(request) = &mut in_flight
            && !has_waited
            && let Some(arrived) = just_read
        {
            // Only microseconds have passed since the requests arrived, so the clock is not read again.
            request.ends_at(arrived);
        }
        drop(in_flight);
        Ok((answered, next))
    }
}

/// Waits for a response, unless the client closes the connection.
async fn while_open<T>(
    stream: &WatchedStream,
    mut answering: Pin<&mut impl Future<Output = T>>,
) -> io::Result<T> {
    poll_fn(|context| match answering.as_mut().poll(context) {
        Poll::Ready(answered) => Poll::Ready(Ok(answered)),
        Poll::Pending if stream.is_closed(context) => {
            Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()))
        }
        Poll::Pending => Poll::Pending,
    })
    .await
}

async fn send(stream: &mut WatchedStream, output: &mut Vec<u8>) -> io::Result<()> {
    stream.write_all(output).await?;
    output.clear();
    output.shrink_to(KEPT_MAX);
    Ok(())
}
