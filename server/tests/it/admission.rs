//! Checks which requests are admitted under load: requests with keys whose plan was just changed, requests with keys
//! that are not in memory yet, and requests on many connections from one address. In one test, an unauthenticated
//! client also sends keys that do not exist.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::Duration,
};

use futures_util::future::join_all;
use quota_server::secret_text::{Kind, SecretText};
use quota_testkit::proxy::{Fault, FaultProxy};
use reqwest::{Client, Method};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use crate::{
    outage::through_proxy,
    support::app::{Account, Key, TestApp},
};

/// The latency of a remote PostgreSQL, in each direction.
const FAR: Fault = Fault::Delay(Duration::from_millis(15));
/// A latency with which the test's lookups take longer than a request may take, unless one statement serves many of
/// them: 120 transactions on two connections, each with three round trips of 100 ms, take 18 s.
const VERY_FAR: Fault = Fault::Delay(Duration::from_millis(50));
const AT_MOST: Duration = Duration::from_secs(10);
/// The connection table treats connections differently once they are a second old. A step that takes longer than this
/// is repeated from another network.
const SHORT: Duration = Duration::from_millis(900);

struct World {
    app: Arc<TestApp>,
    account: Account,
    plan: String,
    keys: Vec<Key>,
}

async fn world(keys: usize, lookups: usize) -> World {
    let app = TestApp::setup()
        .flag(format!("--key-lookups={lookups}"))
        .start()
        .await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({"default_rpm": 60_000})).await;
    let mut all = Vec::new();
    for _ in 0..keys {
        all.push(app.key(&account, &plan).await);
    }
    World {
        app: Arc::new(app),
        account,
        plan,
        keys: all,
    }
}

impl World {
    /// Starts a replica that has nothing in memory and uses a remote PostgreSQL.
    async fn cold_replica(&self, lookups: usize) -> (Arc<TestApp>, FaultProxy) {
        let (proxy, url) = through_proxy(&self.app.database).await;
        let cold = TestApp::setup()
            .database(Arc::clone(&self.app.database))
            .url(url)
            .flag(format!("--key-lookups={lookups}"))
            .flag("--database-connect-timeout=30s")
            .start()
            .await;
        proxy.set(FAR);
        (Arc::new(cold), proxy)
    }
}

async fn echo(app: &TestApp, http: &Client, key: &str) -> u16 {
    let call = http.get(app.url("/v1/echo")).header("x-api-key", key);
    call.send()
        .await
        .expect("the server responds")
        .status()
        .as_u16()
}

async fn echo_all(app: &TestApp, keys: &[Key]) -> Vec<u16> {
    join_all(keys.iter().map(|key| echo(app, &app.http, &key.text))).await
}

fn count(statuses: &[u16], status: u16) -> usize {
    statuses.iter().filter(|it| **it == status).count()
}

/// Starts `at_once` tasks that send keys that do not exist, from a separate address, for four seconds.
fn stranger(app: &Arc<TestApp>, at_once: usize) -> Vec<JoinHandle<Vec<u16>>> {
    let from = IpAddr::V4(Ipv4Addr::new(127, 0, 3, 1));
    let http = Client::builder().local_address(from).build();
    let http = http.expect("a client");
    let until = Instant::now() + Duration::from_secs(4);
    let ask = |_| {
        let (app, http) = (app.clone(), http.clone());
        tokio::spawn(async move {
            let mut answers = Vec::new();
            while Instant::now() < until {
                let made_up = SecretText::generate(Kind::ApiKey).expect("random bytes");
                answers.push(echo(&app, &http, &made_up.reveal()).await);
            }
            answers
        })
    };
    (0..at_once).map(ask).collect()
}

async fn answers(stranger: Vec<JoinHandle<Vec<u16>>>) -> Vec<u16> {
    let all = join_all(stranger).await.into_iter();
    all.flat_map(|answers| answers.expect("a response"))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_in_use_keep_working_when_their_plan_is_renamed() {
    const KEYS: usize = 60;
    let world = world(KEYS, 5).await;
    let (app, _proxy) = world.cold_replica(5).await;
    for key in &world.keys {
        assert_eq!(echo(&app, &app.http, &key.text).await, 200);
    }
    let deleted = format!("/admin/api-keys/{}", world.keys[0].id);
    let path = format!("/admin/plans/{}", world.plan);
    let token = &world.account.access_token;
    let renamed = app.request(Method::PATCH, &path).bearer(token);
    let renamed = renamed.json(json!({"name": "Renamed"})).send().await;
    assert_eq!(renamed.status, 200, "{}", renamed.body);
    let statuses = echo_all(&app, &world.keys).await;
    assert_eq!(count(&statuses, 200), KEYS, "{statuses:?}");
    assert!(app.metric("quota_key_loads_total").await >= 2.0 * 60.0);

    // Deleting or deactivating a key still takes effect immediately.
    let gone = app.request(Method::DELETE, &deleted).bearer(token);
    assert_eq!(gone.send().await.status, 204);
    let statuses = echo_all(&app, &world.keys).await;
    assert_eq!((count(&statuses, 401), statuses[0]), (1, 401));
    let path = format!("/admin/api-keys/{}", world.keys[1].id);
    let off = app.request(Method::PATCH, &path).bearer(token);
    let off = off.json(json!({"is_active": false})).send().await;
    assert_eq!(off.status, 200);
    assert_eq!(echo(&app, &app.http, &world.keys[1].text).await, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn starting_replica_serves_many_keys_at_once() {
    const KEYS: usize = 120;
    let world = world(KEYS, 1000).await;
    let (app, proxy) = world.cold_replica(1000).await;
    proxy.set(VERY_FAR);
    let began = Instant::now();
    let statuses = echo_all(&app, &world.keys).await;
    println!("{KEYS} keys in {:?}", began.elapsed());
    assert_eq!(count(&statuses, 200), KEYS, "{statuses:?}");
    // An unknown key is still rejected.
    let made_up = SecretText::generate(Kind::ApiKey).expect("random bytes");
    assert_eq!(echo(&app, &app.http, &made_up.reveal()).await, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn lookups_of_invented_keys_do_not_starve_others() {
    const KEYS: usize = 40;
    let world = world(KEYS, 20).await;
    let service_token = world.app.service_token(&world.account).await;
    let (app, _proxy) = world.cold_replica(20).await;
    let flood = stranger(&app, 60);
    sleep(Duration::from_millis(500)).await;

    let check = app.http.post(app.url("/v1/check"));
    let check = check.bearer_auth(&service_token);
    let check = check.json(&json!({"key": world.keys[0].text}));
    let status = check.send().await.expect("the server responds").status();
    assert_eq!(status, 200, "the service token and a key");
    // Send five requests at a time: fewer than the client's share of the concurrent lookups.
    let mut statuses = Vec::new();
    for some in world.keys.chunks(5) {
        statuses.extend(echo_all(&app, some).await);
    }
    assert_eq!(count(&statuses, 200), KEYS, "{statuses:?}");

    let strangers = answers(flood).await;
    let (looked_up, refused) = (count(&strangers, 401), count(&strangers, 503));
    println!("the stranger: {looked_up} looked up, {refused} refused");
    assert_eq!(looked_up + refused, strangers.len());
    assert!(looked_up >= 5 && refused >= 5, "{looked_up} and {refused}");
}

async fn connect_from(network: u8, app: &TestApp) -> TcpStream {
    let socket = TcpSocket::new_v4().expect("a socket");
    let source = Ipv4Addr::new(127, 0, network, 1);
    socket.bind((source, 0).into()).expect("loopback");
    socket.connect(app.addr).await.expect("the server listens")
}

/// Returns the status of the response, or `None` if the connection was closed instead.
async fn ask(stream: &mut TcpStream, path: &str, key: &str) -> Option<u16> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: q\r\nX-API-Key: {key}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut answer = vec![0; 8192];
    let read = timeout(AT_MOST, stream.read(&mut answer)).await;
    let length = read
        .expect("the server responds or closes the connection")
        .ok()?;
    let answer = String::from_utf8_lossy(&answer[..length]).into_owned();
    answer.split(' ').nth(1)?.parse().ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn gateway_may_have_more_connections_than_the_limit_per_address() {
    const LIMIT: usize = 20;
    let app = TestApp::setup()
        .flag(format!("--connections-per-address={LIMIT}"))
        .start()
        .await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({"default_rpm": 60_000})).await;
    let key = app.key(&account, &plan).await;

    // All connections are opened at the same time, and each sends a request immediately.
    let mut opened = None;
    for network in 40..60 {
        let began = Instant::now();
        let mut streams = join_all((0..LIMIT * 3 / 2).map(|_| connect_from(network, &app))).await;
        let asked = streams
            .iter_mut()
            .map(|stream| ask(stream, "/v1/echo", &key.text));
        let statuses = join_all(asked).await;
        if began.elapsed() < SHORT {
            assert!(statuses.iter().all(|it| *it == Some(200)), "{statuses:?}");
            opened = Some((network, streams));
            break;
        }
    }
    let (network, mut gateway) = opened.expect("the machine is too busy");
    // Many more connections follow one after another while the first connections are idle.
    sleep(Duration::from_millis(1200)).await;
    for _ in 0..3 * LIMIT {
        let mut stream = connect_from(network, &app).await;
        assert_eq!(ask(&mut stream, "/v1/echo", &key.text).await, Some(200));
        gateway.push(stream);
    }
    for stream in &mut gateway {
        assert_eq!(ask(stream, "/v1/echo", &key.text).await, Some(200));
    }

    // Unauthenticated connections are limited.
    let mut limited = None;
    for network in 70..90 {
        let began = Instant::now();
        let mut strangers = Vec::new();
        let mut refused = 0;
        for _ in 0..3 * LIMIT {
            let mut stream = connect_from(network, &app).await;
            match ask(&mut stream, "/health/live", "").await {
                Some(200) => strangers.push(stream),
                _ => refused += 1,
            }
        }
        assert!(strangers.len() >= LIMIT, "{}", strangers.len());
        if began.elapsed() < SHORT {
            assert!(refused >= LIMIT / 2, "{refused}");
            limited = Some((network, strangers));
            break;
        }
    }
    let (network, _strangers) = limited.expect("the machine is too busy");
    // A new connection replaces a connection that has been idle for a while.
    sleep(Duration::from_millis(1500)).await;
    let mut newcomer = connect_from(network, &app).await;
    assert_eq!(ask(&mut newcomer, "/health/live", "").await, Some(200));
    for stream in &mut gateway {
        assert_eq!(ask(stream, "/v1/echo", &key.text).await, Some(200));
    }
}
