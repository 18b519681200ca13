//! A socket that reports to its connection when a request starts to arrive, when the client stops reading, and which
//! HTTP/2 frames are transferred.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

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
}

#[derive(Debug)]
enum Protocol {
    /// The number of bytes that have arrived, all of which match the HTTP/2 preface.
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
        }
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

impl AsyncRead for WatchedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.connection.shutdown() == Shutdown::Immediate {
            // Ends the connection even if its task is busy reading from the socket.
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        if self.connection.should_pause() {
            // Lets other tasks run first, including the handlers of connections that were just closed.
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        let bytes = &buffer.filled()[before..];
        if !bytes.is_empty() {
            self.has_read(bytes);
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
