//! Deadlines that a pause of this process does not use up.
//!
//! A process that was not scheduled for a while finds its timers past and the answers in its sockets at the same
//! moment, and which of the two its tasks see first is chance. So when a timer is late itself, the answer gets
//! that much more time, once and up to [`AT_MOST`]: what is called late then is the other side's doing.

use std::{pin::pin, time::Duration};

use tokio::time::{Instant, timeout_at};

/// A timer is a millisecond late as a rule.
const PAUSE: Duration = Duration::from_millis(2);
const AT_MOST: Duration = Duration::from_millis(20);

/// The time was up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Late;

/// What `future` comes to, if it does by `deadline`.
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

/// The same from now on.
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

    /// An answer that is there in good time, but passes through two tasks before it is heard, as one from Redis
    /// does, in a process that stands still until the time is up.
    #[tokio::test]
    async fn what_came_during_a_pause_is_in_time() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let (ask, asked) = mpsc::channel();
        let answer = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            asked.recv().unwrap();
            stream.write_all(b"!").unwrap();
            // Until the other side has ended.
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
            thread::sleep(LIMIT * 5);
        });
        assert_eq!(within(LIMIT, told_on).await, Ok(Ok(b'!')));
        answer.join().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn what_does_not_come_is_late() {
        let never = std::future::pending::<()>();
        assert_eq!(within(LIMIT, never).await, Err(Late));
    }
}
