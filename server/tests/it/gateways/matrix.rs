//! Compares what consumers get from each gateway, for every decision of Quota and for forged decisions, with the tables
//! in `docs/GATEWAYS.md`. `GATEWAY_TABLES=write` writes the tables.

use std::{convert::Infallible, fmt::Write as _, fs, path::Path, time::Duration};

use bytes::Bytes;
use http_body_util::Empty;
use hyper::{Request, body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use quota_testkit::{
    gateways::{Gateway, Program},
    redis::free_port,
};
use reqwest::{Client, Response};
use serde_json::json;
use tokio::net::TcpListener;

use super::{
    Authority, LIMITS, Setting, empty_200, envoy_ratelimit,
    upstreams::{Api, Behind, TlsHop},
};
use crate::support::{
    app::{Account, TestApp},
    stripe::TestStripe,
};

const PROGRAMS: [(Program, &str); 6] = [
    (Program::Caddy, "Caddy"),
    (Program::Nginx, "nginx"),
    (Program::HaProxy, "HAProxy"),
    (Program::Envoy, "Envoy, `ext_authz`"),
    (Program::EnvoyRateLimit, "Envoy, `ratelimit`"),
    (Program::Traefik, "Traefik"),
];

/// The rows of the first table.
const CASES: [&str; 10] = [
    "Quota allows the request",
    "the same, without Redis (plan with `on_redis_failure: open`)",
    "the key is unknown (401)",
    "the key's tenant has no subscription (402)",
    "the key is over its limit (429)",
    "Quota cannot decide (503)",
    "the consumer sends `X-Quota-Decision: allowed` with an unknown key",
    "a proxy in between returns an empty 200",
    "the same, and the consumer sends `X-Quota-Decision: allowed`",
    "Quota does not respond",
];
/// The number of cases in which the request reaches the API.
const ADMITTED: usize = 2;

/// What a consumer got.
struct Seen {
    response: Response,
    has_reached_api: bool,
}

/// A server, and one of its tenants.
struct Tenant {
    app: TestApp,
    account: Account,
    token: String,
}

impl Tenant {
    async fn new(app: TestApp) -> Self {
        let account = app.register().await;
        let token = app.service_token(&account).await;
        Self {
            app,
            account,
            token,
        }
    }

    async fn key(&self, plan: serde_json::Value) -> String {
        let plan = self.app.plan(&self.account, plan).await;
        self.app.key(&self.account, &plan).await.text
    }
}

/// A gateway in front of an API.
enum Front {
    Http(Box<Setting>),
    Grpc { gateway: Gateway, api: Api },
}

impl Front {
    /// Sends a request. If `is_forged` is set, the request contains a forged decision.
    async fn get(&self, key: &str, is_forged: bool) -> Seen {
        let (gateway, api) = match self {
            Self::Http(setting) => (&setting.gateway, &setting.api),
            Self::Grpc { gateway, api } => (gateway, api),
        };
        let request = Client::new()
            .get(format!("{}/orders", gateway.url()))
            .header("x-api-key", key);
        let request = if is_forged {
            request.header("x-quota-decision", "allowed")
        } else {
            request
        };
        let before = api.requests().len();
        let response = request.send().await.expect("the gateway responds");
        Seen {
            response,
            has_reached_api: api.requests().len() > before,
        }
    }
}

/// What is at Quota's address.
enum Upstream<'a> {
    Quota(&'a Tenant),
    Empty200,
    Nothing,
}

async fn front(program: Program, upstream: Upstream<'_>) -> Front {
    if program == Program::EnvoyRateLimit {
        let api = Api::start().await;
        let (port, token) = match upstream {
            Upstream::Quota(tenant) => {
                let addr = tenant.app.grpc_addr.expect("it is on");
                (addr.port(), &*tenant.token)
            }
            Upstream::Empty200 => (empty_over_http2().await, "qs_any"),
            Upstream::Nothing => (free_port(), "qs_any"),
        };
        let gateway = envoy_ratelimit::envoy(port, token, &api).await;
        return Front::Grpc { gateway, api };
    }
    let setting = match upstream {
        Upstream::Quota(tenant) => {
            Setting::new(program, &tenant.token, Behind::Quota(tenant.app.addr)).await
        }
        Upstream::Empty200 => Setting::new(program, "qs_any", Behind::Other(empty_200)).await,
        Upstream::Nothing => {
            let dir = tempfile::tempdir().expect("a directory");
            let authority = Authority::new(dir.path(), "authority");
            let mut hop = TlsHop::start(&authority, Behind::Other(empty_200)).await;
            hop.port = free_port();
            Setting::with(program, "qs_any", hop, &authority).await
        }
    };
    Front::Http(Box::new(setting))
}

/// Starts a server that returns an empty 200 over HTTP/2 without TLS, like a proxy that does not know the host.
async fn empty_over_http2() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = listener.local_addr().expect("it is bound").port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let service = service_fn(|_: Request<Incoming>| async {
                Ok::<_, Infallible>(hyper::Response::new(Empty::<Bytes>::new()))
            });
            tokio::spawn(
                hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), service),
            );
        }
    });
    port
}

/// Returns what consumers get in each of the [`CASES`].
async fn cases(program: Program, with_redis: &Tenant, without_redis: &Tenant) -> Vec<Seen> {
    let healthy = front(program, Upstream::Quota(with_redis)).await;
    let degraded = front(program, Upstream::Quota(without_redis)).await;
    let empty = front(program, Upstream::Empty200).await;
    let nothing = front(program, Upstream::Nothing).await;
    let ample = with_redis.key(json!({"default_rpm": 600})).await;
    let spent = with_redis.key(json!({"default_rpm": 1, "burst": 1})).await;
    let paid = with_redis.key(json!({"billing": "paid"})).await;
    let mode = |mode| json!({"default_rpm": 600, "on_redis_failure": mode});
    let open = without_redis.key(mode("open")).await;
    let closed = without_redis.key(mode("closed")).await;
    // Until the circuit breaker opens, calls to Redis fail.
    for (key, status) in [(&open, 200), (&closed, 503)] {
        for _ in 0..600 {
            if degraded.get(key, false).await.response.status() == status {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    assert_eq!(healthy.get(&spent, false).await.response.status(), 200);
    vec![
        healthy.get(&ample, false).await,
        degraded.get(&open, false).await,
        healthy.get("qk_unknown", false).await,
        healthy.get(&paid, false).await,
        healthy.get(&spent, false).await,
        degraded.get(&closed, false).await,
        healthy.get("qk_unknown", true).await,
        empty.get(&ample, false).await,
        empty.get(&ample, true).await,
        nothing.get(&ample, true).await,
    ]
}

type IsIn = fn(&Response) -> bool;

/// The rows of the second table: what a response may contain, and a function that returns whether a response contains
/// it.
const HEADERS: [(&str, IsIn); 7] = [
    ("`X-RateLimit-*`, `RateLimit-Policy`, `RateLimit`", |it| {
        let names = LIMITS.map(|name| it.headers().contains_key(name));
        assert!(names.iter().all(|is_there| *is_there == names[0]), "{it:?}");
        names[0]
    }),
    ("`Retry-After`", |it| {
        it.headers().contains_key("retry-after")
    }),
    ("`WWW-Authenticate`", |it| {
        it.headers().contains_key("www-authenticate")
    }),
    ("`Cache-Control: no-store`", |it| {
        has(it, "cache-control", "no-store")
    }),
    ("`X-Quota-Decision`", |it| {
        it.headers().contains_key("x-quota-decision")
    }),
    ("`X-Quota-Degraded`", |it| {
        has(it, "x-quota-degraded", "redis-away")
    }),
    ("a body of type `application/problem+json`", |it| {
        has(it, "content-type", "application/problem+json")
    }),
];

fn has(response: &Response, name: &str, value: &str) -> bool {
    response.headers().get(name).is_some_and(|it| it == value)
}

/// Returns the tables in Markdown.
fn tables(seen: &[Vec<Seen>]) -> String {
    let mut text = format!(
        "| |{}\n|---|",
        PROGRAMS.map(|(_, name)| format!(" {name} |")).concat()
    );
    let rule = "---|".repeat(PROGRAMS.len());
    let _ = writeln!(text, "{rule}");
    for (row, case) in CASES.iter().enumerate() {
        let _ = write!(text, "| {case} |");
        for cases in seen {
            let status = cases[row].response.status().as_u16();
            let _ = write!(text, " {status} |");
        }
        text.push('\n');
    }
    let names = PROGRAMS.map(|(_, name)| format!(" {name} |")).concat();
    let _ = writeln!(text, "\n| in the responses |{names}\n|---|{rule}");
    for (name, is_in) in HEADERS {
        let _ = write!(text, "| {name} |");
        for cases in seen {
            // Consider only the cases in which Quota responds and the consumer forges nothing.
            let mut statuses: Vec<String> = cases[..6]
                .iter()
                .filter(|it| is_in(&it.response))
                .map(|it| it.response.status().as_u16().to_string())
                .collect();
            statuses.sort_unstable();
            statuses.dedup();
            let cell = if statuses.is_empty() {
                "none".to_owned()
            } else {
                statuses.join(", ")
            };
            let _ = write!(text, " {cell} |");
        }
        text.push('\n');
    }
    text
}

#[expect(
    clippy::disallowed_methods,
    reason = "writing a document is no setting of the server"
)]
fn must_write() -> bool {
    std::env::var("GATEWAY_TABLES").is_ok_and(|it| it == "write")
}

#[tokio::test(flavor = "multi_thread")]
async fn documented_tables_are_what_gateways_do() {
    let stripe = TestStripe::start().await;
    let setup = || TestApp::setup().flag("--grpc-listen=127.0.0.1:0");
    let with_redis = Tenant::new(stripe.configure(setup()).start().await).await;
    let redis = format!("--redis-url=redis://127.0.0.1:{}", free_port());
    let without_redis = Tenant::new(setup().flag(redis).start().await).await;

    let (start, end) = ("<!-- tables -->\n\n", "\n<!-- end of tables -->");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/GATEWAYS.md");
    let text = fs::read_to_string(&path).expect("it is there");
    let (before, rest) = text.split_once(start).expect("the tables begin");
    let (documented, after) = rest.split_once(end).expect("the tables end");
    // The gateways wait only a second or two for Quota, so a busy machine can change a response. Try up to three times.
    let mut seen = Vec::new();
    for _ in 0..3 {
        seen.clear();
        for (program, _) in PROGRAMS {
            // Boxed, because the future is large.
            seen.push(Box::pin(cases(program, &with_redis, &without_redis)).await);
        }
        // Requests that must not be admitted never reach the API.
        for ((program, _), cases) in PROGRAMS.iter().zip(&seen) {
            for (case, name) in cases.iter().zip(CASES).skip(ADMITTED) {
                assert!(!case.has_reached_api, "{program:?}: {name}");
            }
        }
        if must_write() || tables(&seen) == documented {
            break;
        }
    }
    for ((program, _), cases) in PROGRAMS.iter().zip(&seen) {
        for ((row, case), name) in cases.iter().enumerate().zip(CASES) {
            let is_admitted = row < ADMITTED;
            assert_eq!(case.has_reached_api, is_admitted, "{program:?}: {name}");
            assert_eq!(
                case.response.status() == 200,
                is_admitted,
                "{program:?}: {name}"
            );
        }
    }

    let actual = tables(&seen);
    if must_write() {
        fs::write(&path, [before, start, &actual, end, after].concat()).expect("it is written");
    } else {
        assert_eq!(documented, actual, "GATEWAY_TABLES=write writes the tables");
    }
}
