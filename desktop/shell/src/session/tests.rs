//! Tests with an in-memory keychain and a fake server that implements only sessions.

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
    ipc::CallError,
};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    task::JoinHandle,
};

use super::Session;
use crate::{
    client::Client,
    keychain::{Keychain, NoKeychain},
    server::Server,
};

/// A keychain that can become unavailable.
#[derive(Default)]
struct InMemory {
    entries: Mutex<HashMap<String, String>>,
    unavailable: AtomicBool,
}

impl InMemory {
    /// Returns the refresh token.
    fn only(&self) -> Option<String> {
        let entries = self.entries.lock();
        let mut tokens = entries.values().filter(|it| it.starts_with("qr_"));
        tokens.next().cloned()
    }

    fn check(&self) -> Result<(), NoKeychain> {
        if self.unavailable.load(Ordering::SeqCst) {
            return Err(NoKeychain);
        }
        Ok(())
    }
}

impl Keychain for InMemory {
    fn get(&self, server: &str) -> Result<Option<SecretString>, NoKeychain> {
        self.check()?;
        Ok(self.entries.lock().get(server).map(|it| it.clone().into()))
    }

    fn set(&self, server: &str, token: &SecretString) -> Result<(), NoKeychain> {
        self.check()?;
        let token = token.expose_secret().to_owned();
        self.entries.lock().insert(server.to_owned(), token);
        Ok(())
    }

    fn delete(&self, server: &str) -> Result<(), NoKeychain> {
        self.check()?;
        self.entries.lock().remove(server);
        Ok(())
    }
}

/// A server with one session and its current tokens.
#[derive(Default)]
struct FakeServer {
    generation: AtomicU32,
    ended: AtomicBool,
    /// The device token sent with the last sign-in.
    device: Mutex<Value>,
    refreshes: AtomicU32,
    /// Whether a client used an access token before storing the refresh token that came with it.
    used_too_early: AtomicBool,
    keychain: Arc<InMemory>,
}

impl FakeServer {
    fn pair(generation: u32) -> Value {
        json!({"access_token": format!("eyJ{generation}"), "refresh_token": format!("qr_{generation}"), "expires_in": 900})
    }

    fn refresh(&self, token: &str) -> (u16, Value) {
        self.refreshes.fetch_add(1, Ordering::SeqCst);
        let generation = self.generation.load(Ordering::SeqCst);
        let sent: Option<u32> = token.strip_prefix("qr_").and_then(|it| it.parse().ok());
        if self.ended.load(Ordering::SeqCst) {
            return unauthorized();
        }
        match sent {
            Some(sent) if sent == generation => {
                self.generation.store(generation + 1, Ordering::SeqCst);
                (200, Self::pair(generation + 1))
            }
            // As with a real server, a request with the previous refresh token gets the same new tokens again.
            Some(sent) if sent + 1 == generation => (200, Self::pair(generation)),
            _ => {
                self.ended.store(true, Ordering::SeqCst);
                unauthorized()
            }
        }
    }

    fn respond(&self, path: &str, bearer: &str, body: &Value) -> (u16, Value) {
        match path {
            "/auth/login" => {
                self.generation.fetch_add(1, Ordering::SeqCst);
                self.ended.store(false, Ordering::SeqCst);
                let mut answer = Self::pair(self.generation.load(Ordering::SeqCst));
                *self.device.lock() = body["device_token"].clone();
                answer["device_token"] = json!("known-device");
                answer["user"] = json!({"id": ID, "email": "a@b.c", "name": "", "created_at": AT});
                answer["tenant"] =
                    json!({"id": ID, "name": "A", "role": "owner", "time_zone": "UTC"});
                (200, answer)
            }
            "/auth/refresh" => self.refresh(body["refresh_token"].as_str().unwrap_or_default()),
            "/auth/logout" => {
                self.ended.store(true, Ordering::SeqCst);
                (204, Value::Null)
            }
            _ => {
                let generation = self.generation.load(Ordering::SeqCst);
                if bearer != format!("Bearer eyJ{generation}") || self.ended.load(Ordering::SeqCst)
                {
                    return unauthorized();
                }
                let expected = format!("qr_{generation}");
                let stored = self.keychain.only();
                if !self.keychain.unavailable.load(Ordering::SeqCst) && stored != Some(expected) {
                    self.used_too_early.store(true, Ordering::SeqCst);
                }
                (
                    200,
                    json!({"items": [], "next_cursor": null, "total": generation}),
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

struct Fixture {
    fake: Arc<FakeServer>,
    keychain: Arc<InMemory>,
    server: Server,
    folder: tempfile::TempDir,
    serving: JoinHandle<()>,
}

impl Fixture {
    async fn new() -> Self {
        let keychain = Arc::new(InMemory::default());
        let fake = Arc::new(FakeServer {
            keychain: Arc::clone(&keychain),
            ..FakeServer::default()
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let serving = tokio::spawn(serve(listener, Arc::clone(&fake)));
        Self {
            fake,
            keychain,
            server: Server::parse(&format!("http://{address}")).expect("an address"),
            folder: tempfile::tempdir().expect("a folder"),
            serving,
        }
    }

    /// Returns a session like that of another process of the same user.
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
        self.fake.refreshes.load(Ordering::SeqCst)
    }
}

async fn serve(listener: TcpListener, fake: Arc<FakeServer>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            return;
        };
        let fake = Arc::clone(&fake);
        let answer = service_fn(move |request| respond(Arc::clone(&fake), request));
        tokio::spawn(async move {
            // Handles one request per connection, so that aborting the listener makes the server unreachable.
            let mut builder = http1::Builder::new();
            let _ = builder
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), answer)
                .await;
        });
    }
}

async fn respond(
    fake: Arc<FakeServer>,
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
    let (status, answer) = fake.respond(&path, &bearer, &body);
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

fn is_unauthorized(error: &CallError) -> bool {
    matches!(error, CallError::Problem { problem } if problem.status == 401)
}

#[tokio::test]
async fn device_is_recognized_at_the_next_sign_in_and_hidden_from_the_page() {
    let fixture = Fixture::new().await;
    let session = fixture.session();
    let body = session.call(&login()).await.expect("signed in").body;
    assert!(!body.contains("known-device"), "{body}");
    assert_eq!(*fixture.fake.device.lock(), Value::Null);
    session.call(&Call::Logout).await.expect("signed out");
    // A new process still finds the device token after the session has ended.
    fixture.session().call(&login()).await.expect("signed in");
    assert_eq!(*fixture.fake.device.lock(), json!("known-device"));
    // Without a keychain, the device counts as new, but the user can still sign in.
    fixture.keychain.unavailable.store(true, Ordering::SeqCst);
    fixture.session().call(&login()).await.expect("signed in");
    assert_eq!(*fixture.fake.device.lock(), Value::Null);
}

#[tokio::test]
async fn page_never_sees_a_token() {
    let fixture = Fixture::new().await;
    let session = fixture.session();
    for call in [login(), Call::Refresh, Call::Me, list()] {
        let body = session.call(&call).await.expect("a response").body;
        assert!(!body.contains("eyJ") && !body.contains("qr_"), "{body}");
    }
    assert_eq!(fixture.keychain.only().as_deref(), Some("qr_2"));
}

async fn list_concurrently(session: &Arc<Session>) {
    let calls: Vec<_> = (0..20)
        .map(|_| {
            let session = Arc::clone(session);
            tokio::spawn(async move { session.call(&list()).await })
        })
        .collect();
    for call in calls {
        call.await.expect("no panic").expect("a response");
    }
}

#[tokio::test]
async fn concurrent_calls_share_one_refresh() {
    let fixture = Fixture::new().await;
    fixture.session().call(&login()).await.expect("signed in");
    // A session after a restart, with nothing in memory.
    let session = fixture.session();
    list_concurrently(&session).await;
    assert_eq!(fixture.refreshes(), 1);
    // Calls also share a refresh if the server rejects the access token.
    fixture.fake.refresh("qr_2");
    list_concurrently(&session).await;
    assert_eq!(fixture.refreshes(), 3);
    assert!(!fixture.fake.used_too_early.load(Ordering::SeqCst));
}

#[tokio::test]
async fn two_processes_can_refresh_concurrently() {
    let fixture = Fixture::new().await;
    fixture.session().call(&login()).await.expect("signed in");
    let processes: Vec<_> = (0..2)
        .map(|_| {
            let session = fixture.session();
            tokio::spawn(async move {
                for _ in 0..25 {
                    session.call(&Call::Refresh).await.expect("refreshed");
                }
                session.call(&list()).await.expect("signed in");
            })
        })
        .collect();
    for process in processes {
        process.await.expect("signed in to the end");
    }
    assert!(!fixture.fake.ended.load(Ordering::SeqCst));
    let generation = fixture.fake.generation.load(Ordering::SeqCst);
    assert_eq!(fixture.keychain.only(), Some(format!("qr_{generation}")));
}

#[tokio::test]
async fn refresh_token_is_stored_before_its_access_token_is_used() {
    let fixture = Fixture::new().await;
    let session = fixture.session();
    session.call(&login()).await.expect("signed in");
    for _ in 0..10 {
        let generation = fixture.fake.generation.load(Ordering::SeqCst);
        // This invalidates the access token on the server.
        fixture.fake.refresh(&format!("qr_{generation}"));
        session.call(&list()).await.expect("refreshed");
    }
    assert!(!fixture.fake.used_too_early.load(Ordering::SeqCst));
}

#[tokio::test]
async fn session_is_in_memory_without_a_keychain() {
    let fixture = Fixture::new().await;
    fixture.keychain.unavailable.store(true, Ordering::SeqCst);
    let session = fixture.session();
    session.probe_keychain().await;
    assert!(!session.has_keychain());
    session.call(&login()).await.expect("signed in");
    session.call(&Call::Refresh).await.expect("refreshed");
    session.call(&list()).await.expect("a response");
    assert!(!session.has_keychain());
    // The only file is the empty lock file.
    let files: Vec<_> = fs::read_dir(fixture.folder.path())
        .expect("a folder")
        .collect();
    assert_eq!(files.len(), 1);
    assert_eq!(
        fs::read(fixture.folder.path().join("lock")).expect("a file"),
        b""
    );
    let rejection = fixture
        .session()
        .call(&list())
        .await
        .expect_err("not signed in");
    assert!(is_unauthorized(&rejection));
    // Once the keychain is available, the next refresh token is stored in it.
    fixture.keychain.unavailable.store(false, Ordering::SeqCst);
    session.call(&Call::Refresh).await.expect("refreshed");
    assert!(session.has_keychain());
    fixture.session().call(&list()).await.expect("stored");
}

#[tokio::test]
async fn keychain_that_works_again_is_noticed() {
    let fixture = Fixture::new().await;
    fixture.keychain.unavailable.store(true, Ordering::SeqCst);
    let session = fixture.session();
    session.probe_keychain().await;
    assert!(!session.has_keychain());
    fixture.keychain.unavailable.store(false, Ordering::SeqCst);
    session.probe_keychain().await;
    assert!(session.has_keychain());

    // A refresh token that is in memory is moved to the keychain.
    fixture.keychain.unavailable.store(true, Ordering::SeqCst);
    session.call(&login()).await.expect("signed in");
    assert!(!session.has_keychain());
    assert_eq!(fixture.keychain.only(), None);
    fixture.keychain.unavailable.store(false, Ordering::SeqCst);
    session.probe_keychain().await;
    assert!(session.has_keychain());
    assert!(fixture.keychain.only().is_some());
    fixture.session().call(&list()).await.expect("stored");
}

#[tokio::test]
async fn loaded_data_is_readable_while_the_server_is_unreachable() {
    let fixture = Fixture::new().await;
    let session = fixture.session();
    session.call(&login()).await.expect("signed in");
    let loaded = session.call(&list()).await.expect("a response");
    assert_eq!(loaded.stored, None);
    fixture.serving.abort();
    let _ = fixture.serving.await;
    let again = session.call(&list()).await.expect("cached data");
    assert_eq!(again.body, loaded.body);
    assert!(again.stored.is_some_and(|it| !it.server_responded));
    assert_eq!(session.call(&Call::Me).await, Err(CallError::Unreachable));
    let change = Call::UpdateMe(UpdateMe::default());
    assert_eq!(session.call(&change).await, Err(CallError::Unreachable));
    // The user remains signed in. Signing out drops the tokens, although the server is not informed.
    assert!(fixture.keychain.only().is_some());
    let result = session.call(&Call::Logout).await;
    assert_eq!(result, Err(CallError::Unreachable));
    assert_eq!(fixture.keychain.only(), None);
    let rejection = session.call(&list()).await.expect_err("not signed in");
    assert!(is_unauthorized(&rejection));
}

/// An incomplete response proves that the server is reachable.
#[tokio::test]
async fn loaded_data_is_readable_after_an_incomplete_response() {
    let fixture = Fixture::new().await;
    let session = fixture.session();
    session.call(&login()).await.expect("signed in");
    let loaded = session.call(&list()).await.expect("a response");
    fixture.serving.abort();
    let _ = fixture.serving.await;
    let address = fixture.server.to_string().replace("http://", "");
    let listener = TcpListener::bind(address).await.expect("the same port");
    let serving = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            let _ = stream.read(&mut [0; 4096]).await;
            let start = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{";
            stream.write_all(start).await.expect("sent");
        }
    });
    let again = session.call(&list()).await.expect("cached data");
    assert_eq!(again.body, loaded.body);
    assert!(again.stored.is_some_and(|it| it.server_responded));
    assert_eq!(session.call(&Call::Me).await, Err(CallError::Incomplete));
    serving.abort();
}

#[tokio::test]
async fn ended_session_leaves_nothing_behind() {
    let fixture = Fixture::new().await;
    let session = fixture.session();
    session.call(&login()).await.expect("signed in");
    fixture.fake.ended.store(true, Ordering::SeqCst);
    let rejection = session
        .call(&list())
        .await
        .expect_err("the session has ended");
    assert!(is_unauthorized(&rejection));
    assert_eq!(fixture.keychain.only(), None);
    session.call(&login()).await.expect("signed in");
    session.call(&Call::Logout).await.expect("signed out");
    assert_eq!(fixture.keychain.only(), None);
    assert!(fixture.fake.ended.load(Ordering::SeqCst));
}
