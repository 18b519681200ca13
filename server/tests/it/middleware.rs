//! Tests the middleware in `deploy/middleware`: the Rust crate, and the unchanged files for FastAPI and Express in
//! running applications. All three have to behave in the same way.

mod programs;
mod substitute;

use std::collections::BTreeSet;

use reqwest::{Client, RequestBuilder, Response};
use serde_json::{Value, json};

use self::{
    programs::{Api, Program, Setting},
    substitute::Substitute,
};
use crate::{
    gateways::upstreams::{Behind, TlsHop},
    support::{app::TestApp, authority::Authority, test_with_each_program},
};

const LIMITS: [&str; 5] = [
    "x-ratelimit-limit",
    "x-ratelimit-remaining",
    "x-ratelimit-reset",
    "ratelimit-policy",
    "ratelimit",
];

const MISSING: &str = "Bearer realm=\"quota\"";
const INVALID: &str = "Bearer realm=\"quota\", error=\"invalid_token\"";

fn field<'a>(response: &'a Response, name: &str) -> Option<&'a str> {
    let mut values = response.headers().get_all(name).iter();
    let value = values.next()?;
    assert!(values.next().is_none(), "{name} twice: {response:?}");
    Some(value.to_str().expect("fields are text"))
}

async fn send(request: RequestBuilder) -> Response {
    request.send().await.expect("the API responds")
}

/// Returns the problem in a response. Asserts that the problem matches the response, and that caches must not store the
/// response.
async fn problem(response: Response, status: u16) -> Value {
    assert_eq!(response.status(), status, "{response:?}");
    assert_eq!(
        field(&response, "content-type"),
        Some("application/problem+json")
    );
    assert_eq!(field(&response, "cache-control"), Some("no-store"));
    let problem: Value = response.json().await.expect("a problem");
    assert_eq!(problem["status"], status, "{problem}");
    for text in ["type", "title", "detail"] {
        assert!(problem[text].is_string(), "{problem}");
    }
    problem
}

impl Api {
    fn get(&self, http: &Client, key: &str) -> RequestBuilder {
        http.get(format!("{}/orders/7?a=b", self.url))
            .header("x-api-key", key)
    }
}

/// Tests allowed and denied requests, with Quota behind TLS.
async fn enforces_decisions(program: Program) {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = json!({"name": "Starter", "default_rpm": 1, "burst": 3});
    let plan = app.plan(&account, plan).await;
    let key = app.key(&account, &plan).await.text;
    let token = app.service_token(&account).await;
    let stranger = app.register().await;
    let plan = app.plan(&stranger, json!({})).await;
    let strangers_key = app.key(&stranger, &plan).await.text;

    let dir = tempfile::tempdir().expect("a directory");
    let authority = Authority::new(dir.path(), "authority");
    let hop = TlsHop::start(&authority, Behind::Quota(app.addr)).await;
    let setting = Setting {
        url: format!("https://localhost:{}", hop.port),
        token,
        root: Some(authority.root),
        allow_if_unavailable: false,
    };
    let api = program.start(&setting).await;
    let http = Client::new();

    for (request, challenge) in [
        (http.get(format!("{}/orders/7", api.url)), MISSING),
        (api.get(&http, &key).header("x-api-key", &key), MISSING),
        (api.get(&http, &key).bearer_auth(&strangers_key), MISSING),
        (api.get(&http, &strangers_key), INVALID),
        (api.get(&http, "qk_unknown"), INVALID),
        (api.get(&http, "two words"), INVALID),
        (api.get(&http, &"k".repeat(257)), INVALID),
    ] {
        let response = send(request).await;
        assert_eq!(field(&response, "www-authenticate"), Some(challenge));
        problem(response, 401).await;
    }

    let bearer = http.get(format!("{}/orders/7", api.url)).bearer_auth(&key);
    let own = api.get(&http, &key).header("x-request-id", "own-id");
    // If the middleware passed on this request ID, Quota would reject the check because of the length of its headers.
    // Node.js itself rejects such long headers, so its middleware gets an ID that is just longer than Quota accepts.
    let length = if program == Program::TypeScript {
        129
    } else {
        40_000
    };
    let both = api.get(&http, &key).bearer_auth(&key);
    let both = both.header("x-request-id", "i".repeat(length));
    for (request, remaining) in [(bearer, "2"), (own, "1"), (both, "0")] {
        let response = send(request).await;
        assert_eq!(response.status(), 200, "{response:?}");
        assert_eq!(field(&response, "x-ratelimit-remaining"), Some(remaining));
        for name in LIMITS {
            assert!(field(&response, name).is_some(), "{name}: {response:?}");
        }
        let body: Value = response.json().await.expect("JSON");
        assert_eq!(body, json!({"order": "7", "plan": "Starter"}));
    }

    let denied = send(api.get(&http, &key)).await;
    for name in LIMITS {
        assert!(field(&denied, name).is_some(), "{name}: {denied:?}");
    }
    assert_eq!(field(&denied, "x-ratelimit-remaining"), Some("0"));
    let wait: u64 = field(&denied, "retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&wait), "{wait}");
    let denied = problem(denied, 429).await;
    let kind = "https://iana.org/assignments/http-problem-types#quota-exceeded";
    assert_eq!(denied["type"], kind);
    assert_eq!(denied["violated-policies"], json!(["rpm"]));
    let detail = denied["detail"].as_str().expect("text");
    assert!(detail.contains(&format!(" {wait} second")), "{detail}");

    let connections = hop.connections();
    assert!((1..=2).contains(&connections), "{connections}");

    app.ship_usage().await;
    let decisions = "/admin/decisions?limit=100";
    let decisions = app.act(&account, "GET", decisions, Value::Null).await;
    let items = decisions.body["items"].as_array().expect("items");
    assert_eq!(items.len(), 4, "{items:?}");
    let strings = |name: &str| {
        let texts = items.iter().map(|it| it[name].as_str().expect("text"));
        texts.collect::<BTreeSet<_>>()
    };
    assert_eq!(strings("endpoint"), [program.endpoint()].into());
    let ids = strings("request_id");
    assert!(ids.contains("own-id"), "{ids:?}");
    let denied_id = denied["request_id"].as_str().expect("an ID");
    assert!(ids.contains(denied_id), "{denied_id} {ids:?}");
}

/// Tests that exactly as many requests are admitted as the quota allows, no matter how many are sent at the same time.
async fn admits_exactly_the_quota(program: Program) {
    const QUOTA: usize = 50;
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = json!({"default_rpm": 60_000, "monthly_quota": QUOTA});
    let plan = app.plan(&account, plan).await;
    let key = app.key(&account, &plan).await.text;
    let setting = Setting {
        url: app.url(""),
        token: app.service_token(&account).await,
        root: None,
        allow_if_unavailable: false,
    };
    let api = program.start(&setting).await;
    let http = Client::new();
    let sent = (0..10).map(|_| {
        let request = api.get(&http, &key);
        tokio::spawn(async move {
            let mut statuses = Vec::new();
            for _ in 0..15 {
                let request = request.try_clone().expect("no body");
                statuses.push(send(request).await.status().as_u16());
            }
            statuses
        })
    });
    let mut statuses = Vec::new();
    for sent in sent.collect::<Vec<_>>() {
        statuses.extend(sent.await.expect("the task ends"));
    }
    let count = |status| statuses.iter().filter(|it| **it == status).count();
    let (allowed, denied, late) = (count(200), count(429), count(503));
    assert_eq!(allowed + denied + late, 150, "{statuses:?}");
    // On a busy machine, the response to a check may be late. The request may still count against the quota.
    assert!(allowed <= QUOTA && allowed + late >= QUOTA, "{statuses:?}");
    assert!(allowed > QUOTA / 2, "{statuses:?}");
}

/// Tests failures and responses that are not a decision, from Quota or from another server at Quota's address.
async fn without_a_decision_the_setting_applies(program: Program) {
    let quota = Substitute::start().await;
    let mut setting = Setting {
        url: quota.url(),
        token: "qs_service".to_owned(),
        root: None,
        allow_if_unavailable: false,
    };
    let denying = program.start(&setting).await;
    setting.allow_if_unavailable = true;
    let allowing = program.start(&setting).await;
    let http = Client::new();
    let decision = |code: &str, allowed: bool| {
        let body = json!({
            "allowed": allowed, "code": code, "key_id": null, "plan": "Starter", "limits": [], "retry_after": null,
            "headers": {"X-Own": "1"},
        });
        substitute::response("200 OK", "", &body.to_string())
    };
    let status = |line: &str, fields: &str| substitute::response(line, fields, "");
    let undecided = [503, 200];
    for (response, statuses) in [
        (decision("allowed", true), [200; 2]),
        (decision("payment_required", false), [402; 2]),
        (decision("inactive_key", false), [401; 2]),
        (decision("reduced_capacity", false), [429; 2]),
        (decision("a_new_reason", false), [429; 2]),
        (decision("quota_exceeded", true), undecided),
        (decision("allowed", false), undecided),
        (status("200 OK", ""), undecided),
        (substitute::response("200 OK", "", "<html>"), undecided),
        (
            substitute::response("200 OK", "", r#"{"allowed":true}"#),
            undecided,
        ),
        (status("401 Unauthorized", ""), undecided),
        (status("500 Internal Server Error", ""), undecided),
        (
            status("503 Service Unavailable", "retry-after: 1\r\n"),
            undecided,
        ),
        (
            status("307 Temporary Redirect", "location: /v1/check\r\n"),
            undecided,
        ),
        ("not HTTP\r\n\r\n".to_owned(), undecided),
        (String::new(), undecided),
        (substitute::SILENCE.to_owned(), undecided),
        // A request that Quota itself rejects is never passed on.
        (status("400 Bad Request", ""), [503; 2]),
        (status("422 Unprocessable Content", ""), [503; 2]),
        (
            status(
                "503 Service Unavailable",
                "x-quota-degraded: redis-away\r\n",
            ),
            [503; 2],
        ),
    ] {
        quota.respond_with(&response);
        for (api, status) in [&denying, &allowing].into_iter().zip(statuses) {
            let before = quota.checks();
            let received = send(api.get(&http, "qk_any")).await;
            assert_eq!(quota.checks(), before + 1, "one check: {response:?}");
            assert_eq!(received.status(), status, "{response:?}");
            check_undecided(received, statuses).await;
        }
    }
    quota.stop().await;
    for (api, status) in [(&denying, 503), (&allowing, 200)] {
        let received = send(api.get(&http, "qk_any")).await;
        assert_eq!(received.status(), status, "without Quota");
        check_undecided(received, undecided).await;
        let missing = send(http.get(format!("{}/orders/7", api.url))).await;
        problem(missing, 401).await;
    }
}

async fn check_undecided(received: Response, statuses: [u16; 2]) {
    let status = received.status().as_u16();
    if status == 200 {
        let is_unchecked = statuses == [503, 200];
        let degraded = is_unchecked.then_some("unchecked");
        assert_eq!(field(&received, "x-quota-degraded"), degraded);
        let plan = if is_unchecked {
            Value::Null
        } else {
            "Starter".into()
        };
        let body: Value = received.json().await.expect("JSON");
        assert_eq!(body["plan"], plan);
    } else {
        let wait = field(&received, "retry-after");
        assert_eq!(wait, (status == 503).then_some("1"), "{received:?}");
        problem(received, status).await;
    }
}

/// Tests that no check is sent to a server whose certificate is not trusted.
async fn requires_a_trusted_certificate(program: Program) {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({})).await;
    let key = app.key(&account, &plan).await.text;
    let dir = tempfile::tempdir().expect("a directory");
    let (right, wrong) = (
        Authority::new(dir.path(), "right"),
        Authority::new(dir.path(), "wrong"),
    );
    let hop = TlsHop::start(&right, Behind::Quota(app.addr)).await;
    let http = Client::new();
    for (root, status) in [(right.root, 200), (wrong.root, 503)] {
        let setting = Setting {
            url: format!("https://localhost:{}", hop.port),
            token: app.service_token(&account).await,
            root: Some(root),
            allow_if_unavailable: false,
        };
        let api = program.start(&setting).await;
        assert_eq!(send(api.get(&http, &key)).await.status(), status);
    }
    assert_eq!(hop.connections(), 1);
}

test_with_each_program! {
    { rust: Rust, python: Python, typescript: TypeScript, }
    {
        enforces_decisions
        admits_exactly_the_quota
        without_a_decision_the_setting_applies
        requires_a_trusted_certificate
    }
}
