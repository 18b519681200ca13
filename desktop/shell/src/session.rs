//! A session with one server: its tokens, and calls that use them. Does not depend on Tauri.
//!
//! The access token is kept in memory. The refresh token is kept in the keychain, or in memory if no keychain is
//! available. When the access token has expired or is about to expire, the next call refreshes the session, and other
//! calls wait. The new refresh token is stored before the new access token is used, so that the session survives if the
//! app exits between the two steps.
//!
//! Several processes of the same user share the keychain entry. A file lock ensures that only one process refreshes at
//! a time, so that each process finds the token that the previous process stored.
//!
//! While the server is unreachable, a `GET` call returns its last response, if that is stored, with the time at which
//! the response was received.

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
    ipc::{CallError, CallResponse, Stored, TestResponse},
};
use secrecy::{ExposeSecret as _, SecretString};

use crate::{
    client::{Client, Credential},
    keychain::{self, Keychain},
};

/// How long before its expiration an access token is no longer used.
const REFRESH_AHEAD: Duration = Duration::from_secs(30);
/// How long to wait for another process to finish a refresh. This is longer than a refresh takes, unless the user has
/// to unlock the keychain.
const LOCK_TIMEOUT: Duration = Duration::from_secs(30);
/// How often to try to acquire the lock.
const LOCK_POLL: Duration = Duration::from_millis(50);
/// The maximum number of responses to keep for use while the server is unreachable. When there are more, all earlier
/// responses are dropped.
const MAX_CACHED: usize = 200;

struct Access {
    token: SecretString,
    expires_at: Instant,
}

#[derive(Default)]
struct State {
    access: Option<Access>,
    /// The refresh token, if it could not be stored in the keychain.
    refresh: Option<SecretString>,
}

pub struct Session {
    client: Client,
    keychain: Arc<dyn Keychain>,
    /// The path of an empty file that is locked during a refresh.
    lock: PathBuf,
    /// Locked while the session starts, is refreshed, or ends.
    state: tokio::sync::Mutex<State>,
    has_keychain: Mutex<bool>,
    responses: Mutex<HashMap<String, Cached>>,
}

/// The body of a response that the server has sent in full.
#[derive(Clone)]
struct Cached {
    body: String,
    loaded_at: Timestamp,
}

impl Session {
    pub fn new(client: Client, keychain: Arc<dyn Keychain>, lock: PathBuf) -> Self {
        Self {
            client,
            keychain,
            lock,
            state: tokio::sync::Mutex::default(),
            has_keychain: Mutex::new(true),
            responses: Mutex::default(),
        }
    }

    /// Returns `false` if the last use of the keychain failed.
    pub fn has_keychain(&self) -> bool {
        *self.has_keychain.lock()
    }

    /// Updates the result of [`has_keychain`](Self::has_keychain). If a refresh token is in memory, tries to store it in
    /// the keychain.
    pub async fn probe_keychain(&self) {
        {
            let mut state = self.state.lock().await;
            if let Some(token) = state.refresh.clone() {
                return self.store(&mut state, token).await;
            }
        }
        // The lock is not held while the user may have to unlock the keychain.
        let _ = self.stored_token().await;
    }

    pub async fn call(&self, call: &Call) -> Result<CallResponse, CallError> {
        match call {
            Call::Register(_) | Call::Login(_) => self.sign_in(call).await,
            Call::Refresh => {
                let mut state = self.state.lock().await;
                let expires_in = self.refresh(&mut state).await?;
                // The console must never see the session's tokens.
                let without_tokens = Tokens {
                    access_token: None,
                    refresh_token: None,
                    expires_in,
                };
                Ok(fresh(json(&without_tokens)?))
            }
            Call::Logout => self.sign_out().await,
            Call::Echo => self.client.send(call, Credential::None).await.map(fresh),
            _ => self.with_access(call).await,
        }
    }

    pub async fn try_key(&self, key: &SecretString) -> Result<TestResponse, CallError> {
        self.client.try_key(key).await
    }

    /// Signs out, even if the server is unreachable.
    pub async fn forget(&self) {
        let _ = self.sign_out().await;
    }

    async fn sign_in(&self, call: &Call) -> Result<CallResponse, CallError> {
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
            serde_json::from_str(&body).map_err(|_| CallError::Unreadable)?;
        let access = signed_in.access_token.take().ok_or(CallError::Unreadable)?;
        let refresh = signed_in
            .refresh_token
            .take()
            .ok_or(CallError::Unreadable)?;
        let device = signed_in.device_token.take();
        self.responses.lock().clear();
        self.store(&mut state, refresh.into()).await;
        if let Some(device) = device {
            self.store_device(device.into()).await;
        }
        state.access = Some(Access::new(access, signed_in.expires_in));
        tracing::info!(server = %self.client.server(), "signed in");
        Ok(fresh(json(&signed_in)?))
    }

    /// Signs out, and drops the tokens in any case. Returns an error if the server does not confirm the sign-out.
    async fn sign_out(&self) -> Result<CallResponse, CallError> {
        let mut state = self.state.lock().await;
        let result = match self.refresh_token(&state).await {
            Some(token) => {
                let credential = Credential::Refresh(&token);
                self.client.send(&Call::Logout, credential).await
            }
            None => Ok(String::new()),
        };
        self.end(&mut state).await;
        match result {
            Err(error) if !is_unauthorized(&error) => {
                tracing::warn!(server = %self.client.server(), "signed out on this computer only");
                Err(error)
            }
            _ => {
                tracing::info!(server = %self.client.server(), "signed out");
                Ok(fresh(String::new()))
            }
        }
    }

    async fn with_access(&self, call: &Call) -> Result<CallResponse, CallError> {
        let result = self.send(call).await;
        let sent = call.sent();
        if sent.method != "GET" {
            return result.map(fresh);
        }
        let key = format!("{} {:?}", sent.path, sent.query);
        match result {
            Ok(body) => {
                let mut responses = self.responses.lock();
                if responses.len() >= MAX_CACHED && !responses.contains_key(&key) {
                    responses.clear();
                }
                let cached = Cached {
                    body: body.clone(),
                    loaded_at: now(),
                };
                responses.insert(key, cached);
                Ok(fresh(body))
            }
            Err(error @ (CallError::Unreachable | CallError::Incomplete)) => {
                let cached = self.responses.lock().get(&key).cloned();
                let Some(cached) = cached else {
                    return Err(error);
                };
                Ok(CallResponse {
                    body: cached.body,
                    stored: Some(Stored {
                        loaded_at: cached.loaded_at,
                        server_responded: error == CallError::Incomplete,
                    }),
                })
            }
            Err(error) => Err(error),
        }
    }

    async fn send(&self, call: &Call) -> Result<String, CallError> {
        let token = self.access(None).await?;
        match self.client.send(call, Credential::Access(&token)).await {
            // The access token expired before it reached the server, or the server revoked it. Try once more with a new
            // token.
            Err(error) if is_unauthorized(&error) => {
                let token = self.access(Some(&token)).await?;
                self.client.send(call, Credential::Access(&token)).await
            }
            result => result,
        }
    }

    /// Returns an access token that differs from `rejected`. Refreshes the session if necessary.
    async fn access(&self, rejected: Option<&SecretString>) -> Result<SecretString, CallError> {
        let mut state = self.state.lock().await;
        let usable = state.access.as_ref().filter(|access| {
            let same =
                rejected.is_some_and(|it| it.expose_secret() == access.token.expose_secret());
            !same && Instant::now() < access.expires_at
        });
        if let Some(access) = usable {
            return Ok(access.token.clone());
        }
        self.refresh(&mut state).await?;
        let access = state.access.as_ref().ok_or(CallError::Unreadable)?;
        Ok(access.token.clone())
    }

    /// Gets new tokens. Returns the lifetime of the access token in seconds.
    async fn refresh(&self, state: &mut State) -> Result<u32, CallError> {
        let _lock = self.lock_refresh().await;
        let Some(token) = self.refresh_token(state).await else {
            state.access = None;
            return Err(self.not_signed_in());
        };
        let body = match self
            .client
            .send(&Call::Refresh, Credential::Refresh(&token))
            .await
        {
            Ok(body) => body,
            Err(error) => {
                if is_unauthorized(&error) {
                    tracing::info!(server = %self.client.server(), "session ended");
                    // Another process may have started a new session since the token was read.
                    let stored = self.stored_token().await;
                    if stored.is_none_or(|it| it.expose_secret() == token.expose_secret()) {
                        self.end(state).await;
                    } else {
                        *state = State::default();
                    }
                }
                return Err(error);
            }
        };
        let tokens: Tokens = serde_json::from_str(&body).map_err(|_| CallError::Unreadable)?;
        let access = tokens.access_token.ok_or(CallError::Unreadable)?;
        let refresh = tokens.refresh_token.ok_or(CallError::Unreadable)?;
        self.store(state, refresh.into()).await;
        state.access = Some(Access::new(access, tokens.expires_in));
        Ok(tokens.expires_in)
    }

    async fn refresh_token(&self, state: &State) -> Option<SecretString> {
        match &state.refresh {
            Some(token) => Some(token.clone()),
            None => self.stored_token().await,
        }
    }

    async fn stored_token(&self) -> Option<SecretString> {
        let (keychain, server) = (Arc::clone(&self.keychain), self.server_name());
        let stored = keychain::call(move || keychain.get(&server)).await;
        *self.has_keychain.lock() = stored.is_ok();
        stored.ok().flatten()
    }

    /// Stores a refresh token in the keychain, or in memory if the keychain is unavailable.
    async fn store(&self, state: &mut State, token: SecretString) {
        let (keychain, server, stored) = (
            Arc::clone(&self.keychain),
            self.server_name(),
            token.clone(),
        );
        let is_stored = keychain::call(move || keychain.set(&server, &stored))
            .await
            .is_ok();
        *self.has_keychain.lock() = is_stored;
        state.refresh = (!is_stored).then_some(token);
    }

    /// Returns the token that identifies this device to the server at sign-in. The token remains valid after a session
    /// ends. Returns `None` if there is no keychain or no stored token.
    async fn device(&self) -> Option<SecretString> {
        let (keychain, entry) = (Arc::clone(&self.keychain), self.device_entry());
        let stored = keychain::call(move || keychain.get(&entry)).await;
        stored.ok().flatten()
    }

    async fn store_device(&self, token: SecretString) {
        let (keychain, entry) = (Arc::clone(&self.keychain), self.device_entry());
        // If the token cannot be stored, the next sign-in counts as a sign-in from a new device.
        let _ = keychain::call(move || keychain.set(&entry, &token)).await;
    }

    fn device_entry(&self) -> String {
        format!("{} (device)", self.server_name())
    }

    async fn end(&self, state: &mut State) {
        *state = State::default();
        self.responses.lock().clear();
        let (keychain, server) = (Arc::clone(&self.keychain), self.server_name());
        let deleted = keychain::call(move || keychain.delete(&server)).await;
        *self.has_keychain.lock() = deleted.is_ok();
    }

    fn server_name(&self) -> String {
        self.client.server().to_string()
    }

    /// Waits for other processes to finish refreshing, and returns the locked file. Returns `None` if the file cannot
    /// be locked within [`LOCK_TIMEOUT`]. In that case, processes may refresh at the same time, which the server
    /// tolerates for a few seconds.
    async fn lock_refresh(&self) -> Option<File> {
        let file = File::create(&self.lock).ok()?;
        let deadline = Instant::now() + LOCK_TIMEOUT;
        loop {
            match file.try_lock() {
                Ok(()) => return Some(file),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    tokio::time::sleep(LOCK_POLL).await;
                }
                Err(_) => return None,
            }
        }
    }

    /// Returns the same error as the server for requests without a session.
    fn not_signed_in(&self) -> CallError {
        let code = ProblemCode::Unauthorized;
        CallError::Problem {
            problem: Box::new(Problem {
                kind: code.type_uri(&self.server_name()).into_owned(),
                title: code.title().to_owned(),
                status: code.status(),
                detail: "You are not signed in.".to_owned(),
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
            expires_at: Instant::now() + lifetime.saturating_sub(REFRESH_AHEAD),
        }
    }
}

fn is_unauthorized(error: &CallError) -> bool {
    matches!(error, CallError::Problem { problem } if problem.status == 401)
}

const fn fresh(body: String) -> CallResponse {
    CallResponse { body, stored: None }
}

fn json(value: &impl serde::Serialize) -> Result<String, CallError> {
    serde_json::to_string(value).map_err(|_| CallError::Unreadable)
}

#[expect(clippy::disallowed_methods, reason = "only displayed")]
fn now() -> Timestamp {
    Timestamp::new(chrono::Utc::now())
}
