//! A socket that reports to its connection when a request starts to arrive, when the client stops reading, and which
//! HTTP/2 frames are transferred.

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use super::{
    connection::{Connection, Shutdown},
    http2::{Frames, PREFACE},
    table::Table,
};

#[derive(Debug)]
pub(super) struct WatchedStream {
    stream: TcpStream,
    connection: Arc<Connection>,
    table: Arc<Table>,
    protocol: Protocol,
    /// Bytes that were read and then put back. They are read again before any bytes from the socket.
    unread: Bytes,
    /// How many more bytes may be read.
    allowed: usize,
}

#[derive(Debug)]
enum Protocol {
    /// The number of bytes that have arrived so far, all of which match the HTTP/2 preface.
    Unknown(usize),
    Http1,
    Http2 {
        received: Frames,
        sent: Frames,
    },
}

impl WatchedStream {
    pub(super) fn new(stream: TcpStream, connection: Arc<Connection>, table: Arc<Table>) -> Self {
        Self {
            stream,
            connection,
            table,
            protocol: Protocol::Unknown(0),
            unread: Bytes::new(),
            allowed: usize::MAX,
        }
    }

    /// Allows reading this many bytes. After that, only the end of the connection can be read, until more is allowed.
    pub(super) fn allow(&mut self, length: usize) {
        self.allowed = length;
    }

    /// Returns whether all the bytes that were allowed have been read.
    pub(super) fn is_exhausted(&self) -> bool {
        self.allowed == 0
    }

    /// Puts bytes back, to be read again. These bytes have already been reported to the connection.
    pub(super) fn unread(&mut self, bytes: &[u8]) {
        debug_assert!(self.unread.is_empty(), "earlier bytes would be lost");
        self.unread = Bytes::copy_from_slice(bytes);
    }

    fn has_delivered(&mut self, length: usize) {
        if self.allowed < usize::MAX {
            self.allowed -= length;
        }
    }

    /// Returns whether the client has closed the connection without sending more bytes. If the client has neither
    /// closed the connection nor sent anything, the task is woken when the client does either.
    pub(super) fn is_closed(&self, context: &mut Context<'_>) -> bool {
        let mut byte = [0];
        match self.stream.poll_peek(context, &mut ReadBuf::new(&mut byte)) {
            Poll::Ready(Ok(length)) => length == 0,
            Poll::Ready(Err(_)) => true,
            Poll::Pending => false,
        }
    }

    /// Waits until something can be read, or until the connection is asked to shut down.
    pub(super) async fn readable(&self) -> io::Result<()> {
        poll_fn(|context| {
            if self.connection.shutdown() == Shutdown::None {
                self.stream.poll_read_ready(context)
            } else {
                Poll::Ready(Ok(()))
            }
        })
        .await
    }

    fn has_read(&mut self, mut bytes: &[u8]) {
        self.connection.has_read(bytes.len());
        if let Protocol::Unknown(known) = self.protocol {
            let taken = bytes.len().min(PREFACE.len() - known);
            let (preface, rest) = bytes.split_at(taken);
            if preface != &PREFACE[known..known + taken] {
                self.protocol = Protocol::Http1;
            } else if known + taken < PREFACE.len() {
                self.protocol = Protocol::Unknown(known + taken);
            } else {
                self.connection.speaks_http2();
                self.protocol = Protocol::Http2 {
                    received: Frames::default(),
                    sent: Frames::default(),
                };
            }
            bytes = rest;
        }
        if let Protocol::Http2 { received, .. } = &mut self.protocol {
            received.scan(bytes, |event| self.connection.received(event));
        }
        self.account();
    }

    fn account(&self) {
        if self.connection.account() {
            self.table.free_memory();
        }
    }
}

impl Drop for WatchedStream {
    fn drop(&mut self) {
        if self.connection.has_unsent() {
            // Otherwise, the kernel would keep the unread bytes in memory for minutes.
            let _ = self.stream.set_zero_linger();
        }
    }
}

impl AsyncRead for WatchedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.connection.shutdown() == Shutdown::Immediate {
            // The error ends the connection even if its task is busy reading from the socket.
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        if self.allowed == 0 {
            return if self.is_closed(context) {
                Poll::Ready(Ok(()))
            } else {
                Poll::Pending
            };
        }
        if !self.unread.is_empty() {
            let length = self.unread.len().min(buffer.remaining()).min(self.allowed);
            buffer.put_slice(&self.unread.split_to(length));
            self.has_delivered(length);
            return Poll::Ready(Ok(()));
        }
        if self.connection.should_pause() {
            // Other tasks run first, including the handlers of connections that were just closed, so that they free
            // their memory.
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        let read = if self.allowed == usize::MAX {
            Pin::new(&mut self.stream).poll_read(context, buffer)
        } else {
            // Reads as many of the allowed bytes as possible: hyper keeps a buffer for each read, even if the read
            // fills only a part of it.
            let length = buffer.remaining().min(self.allowed);
            let mut part = ReadBuf::new(buffer.initialize_unfilled_to(length));
            let read = Pin::new(&mut self.stream).poll_read(context, &mut part);
            let length = part.filled().len();
            buffer.advance(length);
            read
        };
        let bytes = &buffer.filled()[before..];
        if !bytes.is_empty() {
            self.has_read(bytes);
            self.has_delivered(bytes.len());
        }
        read
    }
}

impl AsyncWrite for WatchedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let written = Pin::new(&mut this.stream).poll_write(context, bytes);
        match &written {
            Poll::Ready(Ok(length)) => {
                this.connection.has_written();
                if let Protocol::Http2 { sent, .. } = &mut this.protocol {
                    sent.scan(&bytes[..*length], |event| this.connection.sent(event));
                }
            }
            Poll::Ready(Err(_)) => {}
            Poll::Pending => this.connection.is_write_blocked(bytes.len()),
        }
        this.account();
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// The stream that hyper sees. The stream is absent while requests are served directly and hyper waits for the next
/// request.
#[derive(Debug, Clone, Default)]
pub(super) struct LentStream(Arc<Mutex<Option<WatchedStream>>>);

impl LentStream {
    pub(super) fn lend(&self, stream: WatchedStream) {
        *self.0.lock() = Some(stream);
    }

    /// Returns the stream if all the bytes that were allowed have been read.
    pub(super) fn take_exhausted(&self) -> Option<WatchedStream> {
        self.0.lock().take_if(|stream| stream.is_exhausted())
    }

    fn with<T>(
        &self,
        call: impl FnOnce(Pin<&mut WatchedStream>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        match &mut *self.0.lock() {
            Some(stream) => call(Pin::new(stream)),
            // hyper is polled again only after a stream has been lent.
            None => Poll::Pending,
        }
    }
}

impl AsyncRead for LentStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_read(context, buffer))
    }
}

impl AsyncWrite for LentStream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.with(|stream| stream.poll_write(context, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_flush(context))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_shutdown(context))
    }
}
