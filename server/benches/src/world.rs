//! A server with keys, and the operations that are measured.

use std::{hint::black_box, io, net::IpAddr, num::NonZeroU32, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use http::HeaderMap;
use quota_server::{
    api::limit_headers,
    clock::{Clock as _, SystemClock, TestClock},
    config::LogFormat,
    keys::{KeyRecord, LookupCaller},
    plain_request::{Arrival, DirectEndpoint as _, Parsed, parse},
    router,
    secret_text::{Kind, SecretText, hash_of},
    telemetry::log::Log,
};
use quota_testkit::redis::RedisServer;
use serde_json::json;

use crate::support::app::{Account, Setup, TestApp};

const ONE: NonZeroU32 = NonZeroU32::MIN;
const NO_CALLER: LookupCaller = LookupCaller {
    tenant: None,
    address: None,
};
/// More requests than any run sends.
const UNLIMITED: u32 = 60_000_000;
/// Before the measurement with Redis, requests are sent at this interval. At this pace, a lease is large enough for all
/// measured requests.
const PACE: Duration = Duration::from_micros(1);
/// The number of requests that precede the measurement with Redis.
const PACED: u32 = 200_000;

/// An operation that is measured.
pub struct Operation {
    pub name: &'static str,
    /// Runs the operation the given number of times.
    pub run: Box<dyn FnMut(u64)>,
}

/// A server whose clock stands still during measurements, so that neither cached records nor leases expire.
struct Side {
    app: TestApp,
    clock: TestClock,
    usable: Key,
    /// A key whose requests are denied.
    exhausted: Key,
    service_token: String,
}

struct Key {
    text: String,
    record: Arc<KeyRecord>,
}

pub struct World {
    memory: Side,
    redis: Side,
    _redis: RedisServer,
}

impl Side {
    async fn start(setup: Setup) -> Self {
        let clock = TestClock::at(SystemClock::new().now());
        let log = Log::start_on(io::sink(), LogFormat::Json);
        // Fails for every log after the first one, because a process can have only one.
        let _ = log.install("info");
        let app = setup
            .clock(Arc::new(clock.clone()))
            .log(log)
            .without_jobs()
            .flag("--direct-responses=on")
            .flag("--usage-backlog-max=4294967296")
            .start()
            .await;
        let account = app.register().await;
        let usable = Key::create(&app, &account, UNLIMITED).await;
        let exhausted = Key::create(&app, &account, 1).await;
        let service_token = app.service_token(&account).await;
        // Loads the token into the cache.
        let hash = hash_of(Kind::ServiceToken, service_token.as_bytes()).expect("a token");
        let found = app.state.keys.service_token(hash, NO_CALLER).await;
        assert!(found.expect("the token is found").is_some());
        for _ in 0..2 {
            let policies = &exhausted.record.policies;
            let limiter = &app.state.limiter;
            let decision = limiter.admit(&exhausted.record.handle, policies, ONE).await;
            black_box(decision.expect("the limiter decides"));
        }
        Self {
            app,
            clock,
            usable,
            exhausted,
            service_token,
        }
    }

    /// Sends requests at a constant pace, so that the replica takes a large lease.
    async fn obtain_lease(&self) {
        let Key { record, .. } = &self.usable;
        for _ in 0..PACED {
            self.clock.advance(PACE);
            let decision = self
                .app
                .state
                .limiter
                .admit(&record.handle, &record.policies, ONE);
            assert!(decision.await.expect("the limiter decides").is_allowed());
        }
    }
}

impl Key {
    async fn create(app: &TestApp, account: &Account, limit: u32) -> Self {
        let plan = json!({"default_rpm": limit, "burst": limit});
        let plan = app.plan(account, plan).await;
        let text = app.key(account, &plan).await.text;
        let secret = SecretText::parse(Kind::ApiKey, text.as_bytes()).expect("a key");
        let now = app.state.clock.monotonic();
        let record = app.state.keys.key(secret.hash(), now, NO_CALLER).await;
        Self {
            text,
            record: record.expect("the key is found").expect("the key exists"),
        }
    }
}

impl World {
    pub async fn start() -> Self {
        let server = RedisServer::start().await;
        let redis = TestApp::setup().flag(format!("--redis-url={}", server.url()));
        let redis = Side::start(redis).await;
        redis.obtain_lease().await;
        Self {
            memory: Side::start(TestApp::setup()).await,
            redis,
            _redis: server,
        }
    }

    pub fn operations(&self) -> Vec<Operation> {
        let Self { memory, redis, .. } = self;
        vec![
            parse_key(memory),
            decide("decision in memory, allowed", memory, &memory.usable),
            decide("decision in memory, denied", memory, &memory.exhausted),
            decide("decision with a lease, allowed", redis, &redis.usable),
            decide("decision with Redis, denied again", redis, &redis.exhausted),
            write_headers(memory),
            record_usage(memory),
            respond(
                "direct response, allowed",
                memory,
                echo(&memory.usable.text),
            ),
            respond(
                "direct response, denied",
                memory,
                echo(&memory.exhausted.text),
            ),
            respond(
                "direct response to a check, allowed",
                memory,
                check(&memory.usable.text, &memory.service_token),
            ),
            respond(
                "direct response to a check, denied",
                memory,
                check(&memory.exhausted.text, &memory.service_token),
            ),
            respond(
                "direct response to forward-auth, allowed",
                memory,
                forward_auth(&memory.usable.text, &memory.service_token),
            ),
            respond(
                "direct response to forward-auth, denied",
                memory,
                forward_auth(&memory.exhausted.text, &memory.service_token),
            ),
        ]
    }
}

fn parse_key(side: &Side) -> Operation {
    let text = side.usable.text.clone();
    let run = move |times| {
        for _ in 0..times {
            let secret = SecretText::parse(Kind::ApiKey, black_box(text.as_bytes()));
            black_box(secret.expect("a key").hash());
        }
    };
    Operation {
        name: "key, parse and hash",
        run: Box::new(run),
    }
}

fn decide(name: &'static str, side: &Side, key: &Key) -> Operation {
    let (limiter, record) = (side.app.state.limiter.clone(), Arc::clone(&key.record));
    let run = move |times| {
        for _ in 0..times {
            let decision = limiter.try_admit(&record.handle, &record.policies, ONE);
            black_box(decision.expect("the decision needs no waiting"));
        }
    };
    Operation {
        name,
        run: Box::new(run),
    }
}

fn write_headers(side: &Side) -> Operation {
    let record = Arc::clone(&side.usable.record);
    let decision = side
        .app
        .state
        .limiter
        .peek(&record.handle, &record.policies);
    let mut headers = HeaderMap::with_capacity(16);
    let run = move |times| {
        for _ in 0..times {
            headers.clear();
            limit_headers::write(black_box(&mut headers), &record, &decision);
        }
    };
    Operation {
        name: "headers of a decision",
        run: Box::new(run),
    }
}

fn record_usage(side: &Side) -> Operation {
    let (state, record) = (side.app.state.clone(), Arc::clone(&side.usable.record));
    let decision = state.limiter.peek(&record.handle, &record.policies);
    let id = "019ab4e1-7c00-7000-8000-000000000001";
    let run = move |times| {
        for _ in 0..times {
            let reserved = state.metering.reserve(record.tenant(), "GET /v1/echo", id);
            let reserved = reserved.expect("the disk has space");
            let at = state.clock.monotonic();
            let recorded = state.metering.record(reserved, &record, &decision, 1, at);
            let recorded = recorded.now_or_never().expect("it does not wait");
            recorded.expect("it is recorded");
        }
    };
    Operation {
        name: "usage record",
        run: Box::new(run),
    }
}

/// Returns a request to `/v1/echo`.
fn echo(key: &str) -> String {
    format!(
        "GET /v1/echo HTTP/1.1\r\nHost: quota.example.com\r\nUser-Agent: bench/1.0\r\nAccept: */*\r\n\
         X-API-Key: {key}\r\n\r\n"
    )
}

/// Returns a request to `/v1/check`.
fn check(key: &str, service_token: &str) -> String {
    let body = json!({"key": key, "endpoint": "GET /v1/echo"}).to_string();
    format!(
        "POST /v1/check HTTP/1.1\r\nHost: quota.example.com\r\nUser-Agent: bench/1.0\r\nAccept: */*\r\n\
         Authorization: Bearer {service_token}\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Returns a request to `/v1/forward-auth`, as a gateway sends it.
fn forward_auth(key: &str, service_token: &str) -> String {
    format!(
        "GET /v1/forward-auth HTTP/1.1\r\nHost: quota.example.com\r\nUser-Agent: bench/1.0\r\nAccept: */*\r\n\
         X-API-Key: {key}\r\nX-Service-Token: {service_token}\r\nX-Forwarded-Method: GET\r\n\
         X-Forwarded-Uri: /orders?page=2\r\n\r\n"
    )
}

fn respond(name: &'static str, side: &Side, request: String) -> Operation {
    let direct = router::direct(&side.app.state).expect("direct responses are on");
    let peer = IpAddr::from([127, 0, 0, 1]);
    let mut out = Vec::with_capacity(4096);
    let run = move |times| {
        for _ in 0..times {
            out.clear();
            let Parsed::Plain(request, _) = parse(black_box(request.as_bytes())) else {
                panic!("the request is plain")
            };
            let route = direct.route(&request).expect("the request is accepted");
            let mut context = None;
            let arrival = Arrival {
                peer,
                time: None,
                marks: None,
            };
            let answer = direct.answer(route, &request, arrival, &mut context, &mut out);
            answer
                .now_or_never()
                .expect("the response needs no waiting");
            black_box(&out);
        }
    };
    Operation {
        name,
        run: Box::new(run),
    }
}
