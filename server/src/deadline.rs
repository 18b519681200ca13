//! Deadlines that account for pauses of this process.
//!
//! After a process has not been scheduled for a while, its timers have expired, and responses may be waiting in its
//! sockets. Whether its tasks see the timer or the response first is random. Therefore, if the timer itself fires late,
//! the wait continues for as long as the timer was late, but only once, and for at most [`AT_MOST`]. If the response
//! has still not arrived after that, the other side is considered late.

use std::{pin::pin, time::Duration};

use tokio::time::{Instant, timeout_at};

/// The wait continues after the deadline if the timer fires at least this late. Timers usually fire up to a millisecond
/// late.
const PAUSE: Duration = Duration::from_millis(2);
/// How long the wait can continue after a late timer.
const AT_MOST: Duration = Duration::from_millis(20);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Late;

/// Waits for `future` until `deadline`, or for up to [`AT_MOST`] longer if the timer fires late.
pub async fn by<F: Future>(deadline: Instant, future: F) -> Result<F::Output, Late> {
    let mut future = pin!(future);
    if let Ok(output) = timeout_at(deadline, &mut future).await {
        return Ok(output);
    }
    let now = Instant::now();
    let pause = now.saturating_duration_since(deadline);
    if pause < PAUSE {
        return Err(Late);
    }
    timeout_at(now + pause.min(AT_MOST), future)
        .await
        .map_err(|_| Late)
}

/// Works like [`by`], with a deadline of `limit` from now.
pub async fn within<F: Future>(limit: Duration, future: F) -> Result<F::Output, Late> {
    by(Instant::now() + limit, future).await
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::TcpListener,
        sync::mpsc,
        thread,
    };

    use tokio::{io::AsyncReadExt as _, sync::oneshot};

    use super::*;

    const LIMIT: Duration = Duration::from_millis(10);

    /// The response arrives in time, but passes through two tasks, like a response from Redis. The process is paused
    /// until after the deadline.
    #[tokio::test]
    async fn response_during_a_pause_is_in_time() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let (ask, asked) = mpsc::channel();
        let (confirm, written) = mpsc::channel();
        let answer = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            asked.recv().unwrap();
            stream.write_all(b"!").unwrap();
            confirm.send(()).unwrap();
            // The read completes when the other side closes the connection.
            let _ = stream.read(&mut [0]);
        });
        let mut stream = tokio::net::TcpStream::connect(addr).await.unwrap();
        let (tell, told) = oneshot::channel();
        tokio::spawn(async move {
            let _ = tell.send(stream.read_u8().await.unwrap());
        });
        let (tell_on, told_on) = oneshot::channel();
        tokio::spawn(async move {
            let _ = tell_on.send(told.await.unwrap());
        });
        tokio::spawn(async move {
            ask.send(()).unwrap();
            written.recv().unwrap();
            thread::sleep(LIMIT * 5);
        });
        assert_eq!(within(LIMIT, told_on).await, Ok(Ok(b'!')));
        answer.join().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn missing_response_is_late() {
        let never = std::future::pending::<()>();
        assert_eq!(within(LIMIT, never).await, Err(Late));
    }
}
