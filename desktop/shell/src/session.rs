//! A session with one server: its tokens, and calls made with them. Knows neither Tauri nor who asks.
//!
//! The access token is in memory alone, the refresh token in the keychain; without a keychain it is in memory too.
//! Whoever finds the access token used up renews it while the others wait. The next refresh token is stored before
//! the access token that came with it is used: should the app end in between, the session does not end with it.
//!
//! Two processes of one person share the keychain's entry: a lock on a file makes one of them renew at a time, and
//! the other then finds the new token. While a server is away, what it had answered is answered again, with when.

#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    fs::{File, TryLockError},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use quota_common::{
    Problem, ProblemCode, Timestamp,
    auth::{Login, SignedIn, Tokens},
    call::Call,
    shell::{Answered, Refusal, Tried},
};
use secrecy::{ExposeSecret as _, SecretString};

use crate::{
    client::{Client, Credential},
    keychain::{self, Keychain},
};

/// An access token is renewed so long before it ends.
const AHEAD: Duration = Duration::from_secs(30);
/// Longer than a renewal by another process can take.
const LOCK_PATIENCE: Duration = Duration::from_secs(30);
const LOCK_PAUSE: Duration = Duration::from_millis(50);
/// So many answers are kept for when the server is away.
const KEPT_ANSWERS: usize = 200;

struct Access {
    token: SecretString,
    until: Instant,
}

#[derive(Default)]
struct State {
    access: Option<Access>,
    /// Only what the keychain did not take.
    refresh: Option<SecretString>,
}

pub struct Session {
    client: Client,
    keychain: Arc<dyn Keychain>,
    /// Locked by who renews. Holds nothing.
    lock: PathBuf,
    /// Held while a session begins, is renewed or ends.
    state: tokio::sync::Mutex<State>,
    keeps: Mutex<bool>,
    answers: Mutex<HashMap<String, Answered>>,
}

impl Session {
    pub fn new(client: Client, keychain: Arc<dyn Keychain>, lock: PathBuf) -> Self {
        Self {
            client,
            keychain,
            lock,
            state: tokio::sync::Mutex::default(),
            keeps: Mutex::new(true),
            answers: Mutex::default(),
        }
    }

    /// Whether the keychain took what it was last given. Asked before anything was: whether there is one.
    pub fn keeps(&self) -> bool {
        *self.keeps.lock()
    }

    /// Finds out whether there is a keychain.
    pub async fn look(&self) {
        let _ = self.stored().await;
    }

    pub async fn call(&self, call: &Call) -> Result<Answered, Refusal> {
        match call {
            Call::Register(_) | Call::Login(_) => self.sign_in(call).await,
            Call::Refresh => {
                let mut state = self.state.lock().await;
                let expires_in = self.renew(&mut state).await?;
                // The page is told of no token.
                let told = Tokens {
                    access_token: None,
                    refresh_token: None,
                    expires_in,
                };
                Ok(fresh(json(&told)?))
            }
            Call::Logout => self.sign_out().await,
            Call::Echo => self.client.send(call, Credential::None).await.map(fresh),
            _ => self.with_access(call).await,
        }
    }

    pub async fn try_key(&self, key: &SecretString) -> Result<Tried, Refusal> {
        self.client.try_key(key).await
    }

    /// Signs out, whether the server can be told or not.
    pub async fn forget(&self) {
        let _ = self.sign_out().await;
    }

    async fn sign_in(&self, call: &Call) -> Result<Answered, Refusal> {
        let mut state = self.state.lock().await;
        let device = self.device().await;
        let known = match call {
            Call::Login(login) => Some(Call::Login(Login {
                device_token: device.map(|it| it.expose_secret().into()),
                ..login.clone()
            })),
            _ => None,
        };
        let call = known.as_ref().unwrap_or(call);
        let body = self.client.send(call, Credential::None).await?;
        let mut signed_in: SignedIn =
            serde_json::from_str(&body).map_err(|_| Refusal::Unreadable)?;
        let access = signed_in.access_token.take().ok_or(Refusal::Unreadable)?;
        let refresh = signed_in.refresh_token.take().ok_or(Refusal::Unreadable)?;
        let device = signed_in.device_token.take();
        self.answers.lock().clear();
        self.keep(&mut state, refresh.into()).await;
        if let Some(device) = device {
            self.keep_device(device.into()).await;
        }
        state.access = Some(Access::new(access, signed_in.expires_in));
        tracing::info!(server = %self.client.server(), "signed in");
        Ok(fresh(json(&signed_in)?))
    }

    /// The session is forgotten here in any case. An error says that the server was not told.
    async fn sign_out(&self) -> Result<Answered, Refusal> {
        let mut state = self.state.lock().await;
        let told = match self.refresh_token(&state).await {
            Some(token) => {
                let credential = Credential::Refresh(&token);
                self.client.send(&Call::Logout, credential).await
            }
            None => Ok(String::new()),
        };
        self.end(&mut state).await;
        match told {
            Err(refusal) if !says_unauthorized(&refusal) => {
                tracing::warn!(server = %self.client.server(), "signed out here alone");
                Err(refusal)
            }
            _ => {
                tracing::info!(server = %self.client.server(), "signed out");
                Ok(fresh(String::new()))
            }
        }
    }

    async fn with_access(&self, call: &Call) -> Result<Answered, Refusal> {
        let answer = self.send(call).await;
        let sent = call.sent();
        if sent.method != "GET" {
            return answer.map(fresh);
        }
        let name = format!("{} {:?}", sent.path, sent.query);
        match answer {
            Ok(body) => {
                let mut answers = self.answers.lock();
                if answers.len() >= KEPT_ANSWERS && !answers.contains_key(&name) {
                    answers.clear();
                }
                let kept = Answered {
                    body: body.clone(),
                    loaded_at: Some(now()),
                };
                answers.insert(name, kept);
                Ok(fresh(body))
            }
            Err(Refusal::Unreachable) => {
                let kept = self.answers.lock().get(&name).cloned();
                kept.ok_or(Refusal::Unreachable)
            }
            Err(refusal) => Err(refusal),
        }
    }

    async fn send(&self, call: &Call) -> Result<String, Refusal> {
        let token = self.access(None).await?;
        match self.client.send(call, Credential::Access(&token)).await {
            // It ran out on its way, or the server no longer knows it.
            Err(refusal) if says_unauthorized(&refusal) => {
                let token = self.access(Some(&token)).await?;
                self.client.send(call, Credential::Access(&token)).await
            }
            answer => answer,
        }
    }

    /// An access token that is not `refused`.
    async fn access(&self, refused: Option<&SecretString>) -> Result<SecretString, Refusal> {
        let mut state = self.state.lock().await;
        let usable = state.access.as_ref().filter(|access| {
            let same = refused.is_some_and(|it| it.expose_secret() == access.token.expose_secret());
            !same && Instant::now() < access.until
        });
        if let Some(access) = usable {
            return Ok(access.token.clone());
        }
        self.renew(&mut state).await?;
        let access = state.access.as_ref().ok_or(Refusal::Unreadable)?;
        Ok(access.token.clone())
    }

    /// Gets the next pair of tokens; tells for how many seconds it is good.
    async fn renew(&self, state: &mut State) -> Result<u32, Refusal> {
        let _turn = self.turn().await;
        let Some(token) = self.refresh_token(state).await else {
            state.access = None;
            return Err(self.nobody());
        };
        let body = match self
            .client
            .send(&Call::Refresh, Credential::Refresh(&token))
            .await
        {
            Ok(body) => body,
            Err(refusal) => {
                if says_unauthorized(&refusal) {
                    tracing::info!(server = %self.client.server(), "the session is over");
                    // Another process may have begun a new one meanwhile.
                    let stored = self.stored().await;
                    if stored.is_none_or(|it| it.expose_secret() == token.expose_secret()) {
                        self.end(state).await;
                    } else {
                        *state = State::default();
                    }
                }
                return Err(refusal);
            }
        };
        let tokens: Tokens = serde_json::from_str(&body).map_err(|_| Refusal::Unreadable)?;
        let access = tokens.access_token.ok_or(Refusal::Unreadable)?;
        let refresh = tokens.refresh_token.ok_or(Refusal::Unreadable)?;
        self.keep(state, refresh.into()).await;
        state.access = Some(Access::new(access, tokens.expires_in));
        Ok(tokens.expires_in)
    }

    async fn refresh_token(&self, state: &State) -> Option<SecretString> {
        match &state.refresh {
            Some(token) => Some(token.clone()),
            None => self.stored().await,
        }
    }

    async fn stored(&self) -> Option<SecretString> {
        let (keychain, server) = (Arc::clone(&self.keychain), self.name());
        let stored = keychain::ask(move || keychain.get(&server)).await;
        if stored.is_err() {
            *self.keeps.lock() = false;
        }
        stored.ok().flatten()
    }

    /// Into the keychain; where that does not take it, into memory.
    async fn keep(&self, state: &mut State, token: SecretString) {
        let (keychain, server, stored) = (Arc::clone(&self.keychain), self.name(), token.clone());
        let kept = keychain::ask(move || keychain.set(&server, &stored))
            .await
            .is_ok();
        *self.keeps.lock() = kept;
        state.refresh = (!kept).then_some(token);
    }

    /// Returns the device token, by which the server recognizes this device. It outlives sessions. `None` without a
    /// keychain.
    async fn device(&self) -> Option<SecretString> {
        let (keychain, entry) = (Arc::clone(&self.keychain), self.device_entry());
        let stored = keychain::ask(move || keychain.get(&entry)).await;
        stored.ok().flatten()
    }

    async fn keep_device(&self, token: SecretString) {
        let (keychain, entry) = (Arc::clone(&self.keychain), self.device_entry());
        // A device that is not remembered signs in like a new one.
        let _ = keychain::ask(move || keychain.set(&entry, &token)).await;
    }

    fn device_entry(&self) -> String {
        format!("{} (device)", self.name())
    }

    async fn end(&self, state: &mut State) {
        *state = State::default();
        self.answers.lock().clear();
        let (keychain, server) = (Arc::clone(&self.keychain), self.name());
        if keychain::ask(move || keychain.delete(&server))
            .await
            .is_err()
        {
            *self.keeps.lock() = false;
        }
    }

    fn name(&self) -> String {
        self.client.server().to_string()
    }

    /// This process's turn to renew. Where files cannot be locked all go at once, which the server allows for some
    /// seconds.
    async fn turn(&self) -> Option<File> {
        let file = File::create(&self.lock).ok()?;
        let until = Instant::now() + LOCK_PATIENCE;
        loop {
            match file.try_lock() {
                Ok(()) => return Some(file),
                Err(TryLockError::WouldBlock) if Instant::now() < until => {
                    tokio::time::sleep(LOCK_PAUSE).await;
                }
                Err(_) => return None,
            }
        }
    }

    /// What the server would say to who is not signed in.
    fn nobody(&self) -> Refusal {
        let code = ProblemCode::Unauthorized;
        Refusal::Problem {
            problem: Box::new(Problem {
                kind: code.type_uri(&self.name()).into_owned(),
                title: code.title().to_owned(),
                status: code.status(),
                detail: "Nobody is signed in.".to_owned(),
                request_id: String::new(),
                errors: Vec::new(),
                violated_policies: Vec::new(),
            }),
        }
    }
}

impl Access {
    fn new(token: String, expires_in: u32) -> Self {
        let lifetime = Duration::from_secs(expires_in.into());
        Self {
            token: token.into(),
            until: Instant::now() + lifetime.saturating_sub(AHEAD),
        }
    }
}

fn says_unauthorized(refusal: &Refusal) -> bool {
    matches!(refusal, Refusal::Problem { problem } if problem.status == 401)
}

const fn fresh(body: String) -> Answered {
    Answered {
        body,
        loaded_at: None,
    }
}

fn json(value: &impl serde::Serialize) -> Result<String, Refusal> {
    serde_json::to_string(value).map_err(|_| Refusal::Unreadable)
}

#[expect(
    clippy::disallowed_methods,
    reason = "told to a person, and nothing follows from it"
)]
fn now() -> Timestamp {
    Timestamp::new(chrono::Utc::now())
}
