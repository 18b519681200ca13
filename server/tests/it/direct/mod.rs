//! Checks that direct responses equal those of hyper: what a client receives, how many tokens its requests cost, and
//! what is recorded and logged do not depend on `QUOTA_DIRECT_RESPONSES`.

mod corpus;
mod grammar;
mod pair;
mod smuggling;

use std::{
    cell::Cell,
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
    panic::AssertUnwindSafe,
    sync::Arc,
    time::Duration,
};

use futures_util::FutureExt as _;
use quota_server::{
    clock::{Clock, Monotonic, SystemClock, TestClock, UnixNanos},
    plain_request::{Arrival, DirectEndpoint as _, Parsed, parse},
    router,
};
use serde_json::json;

use self::{grammar::case, pair::Pair};
use crate::support::{app::TestApp, locks::wait_for_lock};

const CASES: u64 = 1000;
/// The number of cases after which records are compared.
const ROUND: u64 = 20_000;

/// Reads a number from the environment. For example, `DIFFERENTIAL_CASES=1000000` runs more cases, and
/// `DIFFERENTIAL_FIRST=7` starts with seed 7.
#[expect(
    clippy::disallowed_methods,
    reason = "the length of a test is not a setting of the server"
)]
fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |number| number.parse().expect("a number"))
}

#[tokio::test(flavor = "multi_thread")]
async fn direct_responses_are_those_of_hyper() {
    let (cases, first) = (
        number("DIFFERENTIAL_CASES", CASES),
        number("DIFFERENTIAL_FIRST", 0),
    );
    let pair = Pair::start().await;
    let (mut responses, mut records) = (0, 0);
    let before = pair.direct.direct_responses();
    for seed in first..first + cases {
        let received = pair
            .compare(&format!("seed {seed}"), &case(seed, &pair.world))
            .await;
        responses += received.matches("HTTP/1.1 ").count();
        pair.advance(Duration::from_millis(seed % 40));
        if (seed - first + 1).is_multiple_of(ROUND) {
            records += pair.compare_records().await;
            println!("{} cases", seed - first + 1);
        }
    }
    records += pair.compare_records().await;
    let direct = pair.direct.direct_responses() - before;
    println!(
        "{cases} cases, {responses} responses, {direct} of them direct, {records} usage records"
    );
    assert_eq!(pair.hyper.direct_responses(), 0);
    // Most cases get direct responses and are recorded.
    assert!(direct >= cases / 2, "{direct}");
    assert!(records as u64 >= cases / 2, "{records}");
}

/// While the lookup of a request's service token waits for PostgreSQL, the cached record of the request's key becomes
/// outdated. The request must be rejected, although the record was current when the request arrived.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_revoked_while_a_service_token_is_looked_up_is_rejected() {
    let clock = TestClock::at(SystemClock::new().now());
    // Without jobs, nothing invalidates the record.
    let app = TestApp::setup()
        .clock(Arc::new(clock.clone()))
        .without_jobs()
        .flag("--direct-responses=on")
        .flag("--database-lock-timeout=60s")
        .flag("--database-statement-timeout=60s")
        .start()
        .await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({})).await;
    let key = app.key(&account, &plan).await;
    let forward = async |token: &str| {
        let call = app.get("/v1/forward-auth");
        let call = call.header("X-Service-Token", token);
        call.header("X-API-Key", &key.text).send().await.status
    };
    assert_eq!(forward(&app.service_token(&account).await).await, 200);
    let token = app.service_token(&account).await;
    let before = app.state.metrics.direct_responses.get();

    let (holder, observer) = (app.database.connect().await, app.database.connect().await);
    let lock = "BEGIN; LOCK TABLE service_tokens IN ACCESS EXCLUSIVE MODE";
    holder.batch_execute(lock).await.expect("a lock");
    let revoke = async {
        let waiting = "NOT granted AND relation = 'service_tokens'::regclass";
        wait_for_lock(&observer, waiting).await;
        let revoke = "UPDATE api_keys SET is_active = false WHERE id = $1::text::uuid";
        let revoked = observer.execute(revoke, &[&key.id]).await;
        assert_eq!(revoked.expect("the key is revoked"), 1);
        clock.advance(Duration::from_secs(2));
        holder.batch_execute("COMMIT").await.expect("released");
    };
    let (status, ()) = tokio::join!(forward(&token), revoke);
    assert_eq!(status, 401);
    let direct = app.state.metrics.direct_responses.get() - before;
    assert_eq!(direct, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn response_after_a_panic_is_an_internal_error() {
    let app = TestApp::setup().without_jobs().start().await;
    let direct = router::direct(&app.state).expect("direct responses are on");
    let requests = ["GET /v1/echo", "POST /v1/check", "GET /v1/forward-auth"];
    for request in requests {
        let bytes =
            format!("{request} HTTP/1.1\r\nHost: q\r\nX-Request-Id: request-with-a-panic\r\n\r\n");
        let Parsed::Plain(plain, _) = parse(bytes.as_bytes()) else {
            panic!("{request} is plain");
        };
        let route = direct.route(&plain).expect("the request is accepted");
        let (peer, mut out) = (IpAddr::V4(Ipv4Addr::LOCALHOST), Vec::new());
        direct
            .answer_after_panic(route, &plain, peer, None, &mut out)
            .await;
        let text = String::from_utf8(out).expect("text");
        let (head, body) = text.split_once("\r\n\r\n").expect("a body");
        assert!(
            head.starts_with("HTTP/1.1 500 Internal Server Error\r\n"),
            "{head}"
        );
        assert!(
            head.contains("x-request-id: request-with-a-panic\r\n"),
            "{head}"
        );
        assert_eq!(
            head.contains("x-quota-decision: unavailable\r\n"),
            request.contains("forward-auth"),
            "{head}"
        );
        assert!(body.contains("/problems/internal"), "{body}");
    }
    assert_eq!(app.state.metrics.panics.get(), requests.len() as u64);
}

thread_local! {
    /// The number of calls of [`PanickingClock`] until one panics.
    static CALLS_LEFT: Cell<Option<u32>> = const { Cell::new(None) };
}

/// A clock that can panic on the test's own thread.
#[derive(Debug)]
struct PanickingClock(SystemClock);

impl PanickingClock {
    fn count() {
        let left = CALLS_LEFT.take();
        assert_ne!(left, Some(0), "a defect");
        CALLS_LEFT.set(left.map(|left| left - 1));
    }
}

impl Clock for PanickingClock {
    fn now(&self) -> UnixNanos {
        Self::count();
        self.0.now()
    }

    fn monotonic(&self) -> Monotonic {
        Self::count();
        self.0.monotonic()
    }
}

/// A response without a decision reads the clock after its first headers have been written.
#[tokio::test(flavor = "multi_thread")]
async fn panic_leaves_no_part_of_a_response() {
    let clock = PanickingClock(SystemClock::new());
    let setup = TestApp::setup().clock(Arc::new(clock)).without_jobs();
    let app = setup.start().await;
    let account = app.register().await;
    let token = app.service_token(&account).await;
    let without_key = || {
        let request = app.get("/v1/forward-auth");
        request.header("X-Service-Token", &token).send()
    };
    // The first request loads the token.
    assert_eq!(without_key().await.status, 401);

    let direct = router::direct(&app.state).expect("direct responses are on");
    let bytes =
        format!("GET /v1/forward-auth HTTP/1.1\r\nHost: q\r\nX-Service-Token: {token}\r\n\r\n");
    let Parsed::Plain(request, _) = parse(bytes.as_bytes()) else {
        panic!("the request is plain");
    };
    let route = direct.route(&request).expect("the request is accepted");
    let mut statuses = Vec::new();
    for calls in 0.. {
        let mut out = b"an earlier response".to_vec();
        CALLS_LEFT.set(Some(calls));
        let arrival = Arrival {
            peer: IpAddr::V4(Ipv4Addr::LOCALHOST),
            time: None,
            marks: None,
        };
        let mut context = None;
        let answering = direct.answer(route, &request, arrival, &mut context, &mut out);
        let answered = AssertUnwindSafe(answering).catch_unwind().await;
        CALLS_LEFT.set(None);
        if answered.is_err() {
            continue;
        }
        let text = String::from_utf8(out).expect("text");
        let responses = text.split("HTTP/1.1 ").collect::<Vec<_>>();
        assert_eq!(
            (responses[0], responses.len()),
            ("an earlier response", 2),
            "{text}"
        );
        statuses.push(responses[1][..3].to_owned());
        if statuses.last().is_some_and(|status| status == "401") {
            break;
        }
    }
    assert!(statuses.contains(&"500".to_owned()), "{statuses:?}");
}

/// A panic at each call of the clock covers the time before, during and after the decision.
#[tokio::test(flavor = "multi_thread")]
async fn response_after_a_panic_has_the_id_of_the_recorded_request() {
    let clock = PanickingClock(SystemClock::new());
    // With this setting, the clock is read after the usage has been recorded.
    let app = TestApp::setup()
        .clock(Arc::new(clock))
        .flag("--durability=machine")
        .without_jobs()
        .start()
        .await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({"default_rpm": 60})).await;
    let key = app.key(&account, &plan).await;
    // The first request loads the key.
    let first = app.echo(&key.text).await;
    let first = first.header("x-request-id").expect("an ID");
    let mut ids = BTreeSet::from([first.to_owned()]);

    let direct = router::direct(&app.state).expect("direct responses are on");
    let bytes = format!(
        "GET /v1/echo HTTP/1.1\r\nHost: q\r\nX-Api-Key: {}\r\n\r\n",
        key.text
    );
    let Parsed::Plain(request, _) = parse(bytes.as_bytes()) else {
        panic!("the request is plain");
    };
    let route = direct.route(&request).expect("the request is accepted");
    let peer = IpAddr::V4(Ipv4Addr::LOCALHOST);
    for calls in 0.. {
        let mut out = Vec::new();
        CALLS_LEFT.set(Some(calls));
        let mut context = None;
        let arrival = Arrival {
            peer,
            time: None,
            marks: None,
        };
        let answering = direct.answer(route, &request, arrival, &mut context, &mut out);
        let answered = AssertUnwindSafe(answering).catch_unwind().await;
        CALLS_LEFT.set(None);
        if answered.is_err() {
            out.clear();
            direct
                .answer_after_panic(route, &request, peer, context.take(), &mut out)
                .await;
        }
        let text = String::from_utf8(out).expect("text");
        let (_, id) = text.split_once("x-request-id: ").expect("an ID");
        let id = id[..id.find('\r').expect("a line")].to_owned();
        ids.insert(id.clone());
        if text.starts_with("HTTP/1.1 200 ") {
            // As if a panic had occurred while the response was being written.
            let mut out = Vec::new();
            direct
                .answer_after_panic(route, &request, peer, context, &mut out)
                .await;
            let text = String::from_utf8(out).expect("text");
            assert!(text.starts_with("HTTP/1.1 500 "), "{text}");
            assert!(text.contains(&format!("x-request-id: {id}\r\n")), "{text}");
            break;
        }
        assert!(text.starts_with("HTTP/1.1 500 "), "{text}");
    }
    app.ship_usage().await;
    let client = app.database.connect().await;
    let rows = client.query("SELECT request_id FROM usage_log", &[]).await;
    let rows = rows.expect("the usage is read");
    let recorded = rows.iter().map(|row| row.get(0));
    let recorded = recorded.collect::<BTreeSet<String>>();
    assert!(
        recorded.len() > 2,
        "some request was recorded before a panic"
    );
    assert!(recorded.is_subset(&ids), "{recorded:?} {ids:?}");
}
