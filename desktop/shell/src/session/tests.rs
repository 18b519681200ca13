//! Against a server that knows nothing but sessions, by the real server's rules, and a keychain in memory.

use std::{
    collections::HashMap,
    convert::Infallible,
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use http_body_util::{BodyExt as _, Full};
use hyper::{
    Request, Response, body::Bytes, body::Incoming, server::conn::http1, service::service_fn,
};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use quota_common::{
    auth::{Login, UpdateMe},
    call::{Call, PageOf},
    shell::Refusal,
};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinHandle};

use super::Session;
use crate::{
    client::Client,
    keychain::{Keychain, NoKeychain},
    server::Server,
};

/// A keychain that can be away.
#[derive(Default)]
struct InMemory {
    entries: Mutex<HashMap<String, String>>,
    away: AtomicBool,
}

impl InMemory {
    /// The refresh token.
    fn only(&self) -> Option<String> {
        let entries = self.entries.lock();
        let mut tokens = entries.values().filter(|it| it.starts_with("qr_"));
        tokens.next().cloned()
    }

    fn there(&self) -> Result<(), NoKeychain> {
        if self.away.load(Ordering::SeqCst) {
            return Err(NoKeychain);
        }
        Ok(())
    }
}

impl Keychain for InMemory {
    fn get(&self, server: &str) -> Result<Option<SecretString>, NoKeychain> {
        self.there()?;
        Ok(self.entries.lock().get(server).map(|it| it.clone().into()))
    }

    fn set(&self, server: &str, token: &SecretString) -> Result<(), NoKeychain> {
        self.there()?;
        let token = token.expose_secret().to_owned();
        self.entries.lock().insert(server.to_owned(), token);
        Ok(())
    }

    fn delete(&self, server: &str) -> Result<(), NoKeychain> {
        self.there()?;
        self.entries.lock().remove(server);
        Ok(())
    }
}

/// One session: which pair of tokens is good.
#[derive(Default)]
struct Rules {
    turn: AtomicU32,
    over: AtomicBool,
    /// What the last sign-in brought.
    device: Mutex<Value>,
    refreshes: AtomicU32,
    /// An access token came before the refresh token beside it was in the keychain.
    too_early: AtomicBool,
    keychain: Arc<InMemory>,
}

impl Rules {
    fn pair(turn: u32) -> Value {
        json!({"access_token": format!("eyJ{turn}"), "refresh_token": format!("qr_{turn}"), "expires_in": 900})
    }

    fn refresh(&self, token: &str) -> (u16, Value) {
        self.refreshes.fetch_add(1, Ordering::SeqCst);
        let turn = self.turn.load(Ordering::SeqCst);
        let sent: Option<u32> = token.strip_prefix("qr_").and_then(|it| it.parse().ok());
        if self.over.load(Ordering::SeqCst) {
            return unauthorized();
        }
        match sent {
            Some(sent) if sent == turn => {
                self.turn.store(turn + 1, Ordering::SeqCst);
                (200, Self::pair(turn + 1))
            }
            // The one before: the same successor again.
            Some(sent) if sent + 1 == turn => (200, Self::pair(turn)),
            _ => {
                self.over.store(true, Ordering::SeqCst);
                unauthorized()
            }
        }
    }

    fn answer(&self, path: &str, bearer: &str, body: &Value) -> (u16, Value) {
        match path {
            "/auth/login" => {
                self.turn.fetch_add(1, Ordering::SeqCst);
                self.over.store(false, Ordering::SeqCst);
                let mut answer = Self::pair(self.turn.load(Ordering::SeqCst));
                *self.device.lock() = body["device_token"].clone();
                answer["device_token"] = json!("known-device");
                answer["user"] = json!({"id": ID, "email": "a@b.c", "name": "", "created_at": AT});
                answer["tenant"] =
                    json!({"id": ID, "name": "A", "role": "owner", "time_zone": "UTC"});
                (200, answer)
            }
            "/auth/refresh" => self.refresh(body["refresh_token"].as_str().unwrap_or_default()),
            "/auth/logout" => {
                self.over.store(true, Ordering::SeqCst);
                (204, Value::Null)
            }
            _ => {
                let turn = self.turn.load(Ordering::SeqCst);
                if bearer != format!("Bearer eyJ{turn}") || self.over.load(Ordering::SeqCst) {
                    return unauthorized();
                }
                let beside = format!("qr_{turn}");
                let stored = self.keychain.only();
                if !self.keychain.away.load(Ordering::SeqCst) && stored != Some(beside) {
                    self.too_early.store(true, Ordering::SeqCst);
                }
                (
                    200,
                    json!({"items": [], "next_cursor": null, "total": turn}),
                )
            }
        }
    }
}

const ID: &str = "019ab4e1-7c00-7000-8000-0000000000a1";
const AT: &str = "2026-08-03T06:26:00.000Z";

fn unauthorized() -> (u16, Value) {
    (
        401,
        json!({"type": "https://q.example/problems/unauthorized", "title": "t", "status": 401, "detail": "d", "request_id": ID}),
    )
}

struct World {
    rules: Arc<Rules>,
    keychain: Arc<InMemory>,
    server: Server,
    folder: tempfile::TempDir,
    serving: JoinHandle<()>,
}

impl World {
    async fn new() -> Self {
        let keychain = Arc::new(InMemory::default());
        let rules = Arc::new(Rules {
            keychain: Arc::clone(&keychain),
            ..Rules::default()
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let serving = tokio::spawn(serve(listener, Arc::clone(&rules)));
        Self {
            rules,
            keychain,
            server: Server::parse(&format!("http://{address}")).expect("an address"),
            folder: tempfile::tempdir().expect("a folder"),
            serving,
        }
    }

    /// As another process of the same person would have it.
    fn session(&self) -> Arc<Session> {
        let client = Client::new(self.server.clone()).expect("a client");
        let keychain: Arc<dyn Keychain> = Arc::clone(&self.keychain) as _;
        Arc::new(Session::new(
            client,
            keychain,
            self.folder.path().join("lock"),
        ))
    }

    fn refreshes(&self) -> u32 {
        self.rules.refreshes.load(Ordering::SeqCst)
    }
}

async fn serve(listener: TcpListener, rules: Arc<Rules>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            return;
        };
        let rules = Arc::clone(&rules);
        let answer = service_fn(move |request| respond(Arc::clone(&rules), request));
        tokio::spawn(async move {
            // One request a connection: aborting the listener is then the server going away.
            let mut builder = http1::Builder::new();
            let _ = builder
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), answer)
                .await;
        });
    }
}

async fn respond(
    rules: Arc<Rules>,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let path = request.uri().path().to_owned();
    let bearer = request
        .headers()
        .get("authorization")
        .and_then(|it| it.to_str().ok());
    let bearer = bearer.unwrap_or_default().to_owned();
    let body = request
        .into_body()
        .collect()
        .await
        .map(http_body_util::Collected::to_bytes);
    let body = serde_json::from_slice(&body.unwrap_or_default()).unwrap_or_default();
    let (status, answer) = rules.answer(&path, &bearer, &body);
    let response = Response::builder().status(status);
    let body = if answer.is_null() {
        String::new()
    } else {
        answer.to_string()
    };
    Ok(response.body(Full::from(body)).expect("a response"))
}

fn login() -> Call {
    Call::Login(Login {
        email: "a@b.c".into(),
        password: "p".into(),
        device_token: None,
    })
}

fn list() -> Call {
    Call::ListServiceTokens(PageOf::default())
}

fn is_unauthorized(refusal: &Refusal) -> bool {
    matches!(refusal, Refusal::Problem { problem } if problem.status == 401)
}

#[tokio::test]
async fn a_device_is_known_at_the_next_sign_in_and_the_page_is_not_told() {
    let world = World::new().await;
    let session = world.session();
    let told = session.call(&login()).await.expect("signed in").body;
    assert!(!told.contains("known-device"), "{told}");
    assert_eq!(*world.rules.device.lock(), Value::Null);
    session.call(&Call::Logout).await.expect("signed out");
    // Also by another process, after the session has ended.
    world.session().call(&login()).await.expect("signed in");
    assert_eq!(*world.rules.device.lock(), json!("known-device"));
    // Without a keychain it is a new device, which signs in nevertheless.
    world.keychain.away.store(true, Ordering::SeqCst);
    world.session().call(&login()).await.expect("signed in");
    assert_eq!(*world.rules.device.lock(), Value::Null);
}

#[tokio::test]
async fn the_page_is_told_of_no_token() {
    let world = World::new().await;
    let session = world.session();
    for call in [login(), Call::Refresh, Call::Me, list()] {
        let body = session.call(&call).await.expect("an answer").body;
        assert!(!body.contains("eyJ") && !body.contains("qr_"), "{body}");
    }
    assert_eq!(world.keychain.only().as_deref(), Some("qr_2"));
}

#[tokio::test]
async fn many_calls_that_find_the_token_used_up_send_one_refresh() {
    let world = World::new().await;
    world.session().call(&login()).await.expect("signed in");
    // As after a restart: nothing in memory.
    let session = world.session();
    let calls: Vec<_> = (0..20)
        .map(|_| {
            let session = Arc::clone(&session);
            tokio::spawn(async move { session.call(&list()).await })
        })
        .collect();
    for call in calls {
        call.await.expect("no panic").expect("an answer");
    }
    assert_eq!(world.refreshes(), 1);
    // And so it is when the server says first that the token is used up.
    world.rules.refresh("qr_2");
    let calls: Vec<_> = (0..20)
        .map(|_| {
            let session = Arc::clone(&session);
            tokio::spawn(async move { session.call(&list()).await })
        })
        .collect();
    for call in calls {
        call.await.expect("no panic").expect("an answer");
    }
    assert_eq!(world.refreshes(), 3);
    assert!(!world.rules.too_early.load(Ordering::SeqCst));
}

#[tokio::test]
async fn two_processes_that_refresh_at_once_both_stay_signed_in() {
    let world = World::new().await;
    world.session().call(&login()).await.expect("signed in");
    let processes: Vec<_> = (0..2)
        .map(|_| {
            let session = world.session();
            tokio::spawn(async move {
                for _ in 0..25 {
                    session.call(&Call::Refresh).await.expect("renewed");
                }
                session.call(&list()).await.expect("signed in");
            })
        })
        .collect();
    for process in processes {
        process.await.expect("signed in to the end");
    }
    assert!(!world.rules.over.load(Ordering::SeqCst));
    let turn = world.rules.turn.load(Ordering::SeqCst);
    assert_eq!(world.keychain.only(), Some(format!("qr_{turn}")));
}

#[tokio::test]
async fn a_refresh_token_is_stored_before_the_access_token_beside_it_is_used() {
    let world = World::new().await;
    let session = world.session();
    session.call(&login()).await.expect("signed in");
    for _ in 0..10 {
        let turn = world.rules.turn.load(Ordering::SeqCst);
        // Another device does not share this session: here the server forgets the access token.
        world.rules.refresh(&format!("qr_{turn}"));
        session.call(&list()).await.expect("renewed");
    }
    assert!(!world.rules.too_early.load(Ordering::SeqCst));
}

#[tokio::test]
async fn without_a_keychain_a_session_lives_in_memory_alone() {
    let world = World::new().await;
    world.keychain.away.store(true, Ordering::SeqCst);
    let session = world.session();
    session.look().await;
    assert!(!session.keeps());
    session.call(&login()).await.expect("signed in");
    session.call(&Call::Refresh).await.expect("renewed");
    session.call(&list()).await.expect("an answer");
    assert!(!session.keeps());
    // The lock is the only file, and there is nothing in it.
    let files: Vec<_> = fs::read_dir(world.folder.path())
        .expect("a folder")
        .collect();
    assert_eq!(files.len(), 1);
    assert_eq!(
        fs::read(world.folder.path().join("lock")).expect("a file"),
        b""
    );
    let refused = world
        .session()
        .call(&list())
        .await
        .expect_err("nobody is signed in");
    assert!(is_unauthorized(&refused));
    // It comes back: the next token goes there, and the session is kept from then on.
    world.keychain.away.store(false, Ordering::SeqCst);
    session.call(&Call::Refresh).await.expect("renewed");
    assert!(session.keeps());
    world.session().call(&list()).await.expect("kept");
}

#[tokio::test]
async fn what_was_loaded_stays_readable_while_the_server_is_away() {
    let world = World::new().await;
    let session = world.session();
    session.call(&login()).await.expect("signed in");
    let loaded = session.call(&list()).await.expect("an answer");
    assert_eq!(loaded.loaded_at, None);
    world.serving.abort();
    let _ = world.serving.await;
    let again = session.call(&list()).await.expect("what was loaded");
    assert_eq!(again.body, loaded.body);
    assert!(again.loaded_at.is_some());
    assert_eq!(session.call(&Call::Me).await, Err(Refusal::Unreachable));
    let change = Call::UpdateMe(UpdateMe::default());
    assert_eq!(session.call(&change).await, Err(Refusal::Unreachable));
    // Still signed in, unless a person signs out, which the server is not told.
    assert!(world.keychain.only().is_some());
    let untold = session.call(&Call::Logout).await;
    assert_eq!(untold, Err(Refusal::Unreachable));
    assert_eq!(world.keychain.only(), None);
    let refused = session
        .call(&list())
        .await
        .expect_err("nobody is signed in");
    assert!(is_unauthorized(&refused));
}

#[tokio::test]
async fn a_session_that_is_over_leaves_nothing_behind() {
    let world = World::new().await;
    let session = world.session();
    session.call(&login()).await.expect("signed in");
    world.rules.over.store(true, Ordering::SeqCst);
    let refused = session.call(&list()).await.expect_err("it is over");
    assert!(is_unauthorized(&refused));
    assert_eq!(world.keychain.only(), None);
    session.call(&login()).await.expect("signed in");
    session.call(&Call::Logout).await.expect("signed out");
    assert_eq!(world.keychain.only(), None);
    assert!(world.rules.over.load(Ordering::SeqCst));
}
