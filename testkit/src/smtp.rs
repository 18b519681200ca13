//! A mail server that stores the emails it receives.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
};

/// An email as it was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceivedMail {
    pub from: String,
    pub to: Vec<String>,
    /// The header and the body, without the dots that the protocol adds.
    pub message: String,
}

/// A mail server, which receives emails until the value and all of its clones are dropped.
#[derive(Debug, Clone)]
pub struct SmtpServer {
    pub addr: SocketAddr,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    received: Mutex<Vec<ReceivedMail>>,
    /// Responses that reject the next recipients.
    refusals: Mutex<VecDeque<String>>,
    /// The user and password in Base64, as AUTH PLAIN sends them.
    credentials: Mutex<Option<String>>,
    /// The delay of each response to a command.
    delay: Mutex<Duration>,
}

impl SmtpServer {
    /// Starts a mail server on a free loopback port.
    ///
    /// # Panics
    ///
    /// Panics if loopback has no free port.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .expect("loopback has a free port");
        let addr = listener.local_addr().expect("the socket is bound");
        let state = Arc::new(State::default());
        let weak = Arc::downgrade(&state);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let Some(state) = weak.upgrade() else { return };
                tokio::spawn(async move {
                    let _ = converse(stream, &state).await;
                });
            }
        });
        Self { addr, state }
    }

    /// Accepts only the given credentials in AUTH PLAIN. `plain` is in Base64.
    pub fn require_credentials(&self, plain: &str) {
        *lock(&self.state.credentials) = Some(plain.to_owned());
    }

    /// Rejects the next recipient with the given line, such as `550 No such user`.
    pub fn refuse(&self, line: &str) {
        lock(&self.state.refusals).push_back(line.to_owned());
    }

    /// From now on, delays each response, except the greeting and responses with status 221 or 354.
    pub fn delay(&self, delay: Duration) {
        *lock(&self.state.delay) = delay;
    }

    pub fn received(&self) -> Vec<ReceivedMail> {
        lock(&self.state.received).clone()
    }
}

/// Ignores poisoning, so that the test reports only the original panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the address between angle brackets.
fn address(line: &str) -> String {
    let inside = line
        .split_once('<')
        .and_then(|(_, rest)| rest.split_once('>'));
    inside.map_or_else(String::new, |(address, _)| address.to_owned())
}

async fn converse(stream: TcpStream, state: &State) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    stream.write_all(b"220 mail.test ESMTP\r\n").await?;
    let (mut from, mut to) = (String::new(), Vec::new());
    let mut is_signed_in = lock(&state.credentials).is_none();
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await? == 0 {
            return Ok(());
        }
        let line = line.trim_end();
        let verb = line.split(' ').next().unwrap_or_default().to_uppercase();
        let answer = match verb.as_str() {
            "EHLO" => "250-mail.test\r\n250-8BITMIME\r\n250 AUTH PLAIN".to_owned(),
            "AUTH" => {
                let sent = line.rsplit(' ').next().unwrap_or_default();
                is_signed_in = lock(&state.credentials).as_deref() == Some(sent);
                if is_signed_in {
                    "235 Welcome".to_owned()
                } else {
                    "535 Wrong user or password".to_owned()
                }
            }
            "MAIL" if !is_signed_in => "530 Sign in first".to_owned(),
            "MAIL" => {
                from = address(line);
                "250 OK".to_owned()
            }
            "RCPT" => match lock(&state.refusals).pop_front() {
                Some(refusal) => refusal,
                None => {
                    to.push(address(line));
                    "250 OK".to_owned()
                }
            },
            "DATA" => {
                stream.write_all(b"354 Go on\r\n").await?;
                let mut message = String::new();
                loop {
                    let mut line = String::new();
                    if stream.read_line(&mut line).await? == 0 {
                        return Ok(());
                    }
                    if line == ".\r\n" {
                        break;
                    }
                    message.push_str(line.strip_prefix('.').unwrap_or(&line));
                }
                lock(&state.received).push(ReceivedMail {
                    from: std::mem::take(&mut from),
                    to: std::mem::take(&mut to),
                    message,
                });
                "250 Queued".to_owned()
            }
            "QUIT" => {
                stream.write_all(b"221 Bye\r\n").await?;
                return Ok(());
            }
            "NOOP" | "RSET" => "250 OK".to_owned(),
            _ => "502 Unknown command".to_owned(),
        };
        let delay = *lock(&state.delay);
        tokio::time::sleep(delay).await;
        stream.write_all(answer.as_bytes()).await?;
        stream.write_all(b"\r\n").await?;
    }
}
