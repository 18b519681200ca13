//! Sessions in cookies, and the console that uses them.

use std::collections::BTreeMap;

use reqwest::{Method, Response, StatusCode, header};
use serde_json::{Value, json};

use crate::support::app::{PASSWORD, TestApp};

/// A client that handles cookies like a browser.
struct Browser<'a> {
    server: &'a TestApp,
    cookies: BTreeMap<String, String>,
    /// The value of `Sec-Fetch-Site`, in which the browser states whether a request comes from the same site.
    site: Option<&'static str>,
    origin: Option<String>,
    csrf: bool,
}

impl<'a> Browser<'a> {
    fn new(server: &'a TestApp) -> Self {
        Self {
            server,
            cookies: BTreeMap::new(),
            site: Some("same-origin"),
            origin: None,
            csrf: true,
        }
    }

    async fn registered(server: &'a TestApp) -> Self {
        let mut browser = Self::new(server);
        let made = browser.register().await;
        assert_eq!(made.status(), 201);
        browser
    }

    async fn register(&mut self) -> Response {
        let email = format!("{}@example.com", uuid::Uuid::now_v7().simple());
        let body = json!({"email": email, "password": PASSWORD});
        self.send(Method::POST, "/auth/register", Some(body)).await
    }

    async fn send(&mut self, method: Method, path: &str, body: Option<Value>) -> Response {
        let mut request = self
            .server
            .http
            .request(method, self.server.url(path))
            .header("x-quota-session", "cookie");
        if let Some(site) = self.site {
            request = request.header("sec-fetch-site", site);
        }
        if let Some(origin) = &self.origin {
            request = request.header(header::ORIGIN, origin);
        }
        if let Some((_, csrf)) = self.cookies.iter().find(|(name, _)| name.ends_with("csrf"))
            && self.csrf
        {
            request = request.header("x-quota-csrf", csrf);
        }
        if !self.cookies.is_empty() {
            let pairs: Vec<String> = self
                .cookies
                .iter()
                .map(|(name, value)| format!("{name}={value}"))
                .collect();
            request = request.header(header::COOKIE, pairs.join("; "));
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await.expect("a response");
        for field in set_cookies(&response) {
            let (pair, attributes) = field.split_once(';').expect("attributes");
            let (name, value) = pair.split_once('=').expect("a pair");
            if attributes.contains("Max-Age=0") {
                self.cookies.remove(name);
            } else {
                self.cookies.insert(name.to_owned(), value.to_owned());
            }
        }
        response
    }

    async fn status(&mut self, method: Method, path: &str, body: Option<Value>) -> StatusCode {
        self.send(method, path, body).await.status()
    }
}

fn set_cookies(response: &Response) -> Vec<String> {
    response
        .headers()
        .get_all(header::SET_COOKIE)
        .iter()
        .map(|field| field.to_str().expect("text").to_owned())
        .collect()
}

fn plan(name: &str) -> Value {
    json!({"name": name, "default_rpm": 60})
}

#[tokio::test(flavor = "multi_thread")]
async fn browser_gets_its_tokens_only_in_cookies() {
    let server = TestApp::start().await;
    let mut browser = Browser::new(&server);
    let made = browser.register().await;
    assert_eq!(made.status(), 201);
    let cookies = set_cookies(&made);
    assert_eq!(cookies.len(), 4, "{cookies:?}");
    for cookie in &cookies {
        assert!(
            cookie.contains("Path=/;") && cookie.contains("SameSite=Lax"),
            "{cookie}"
        );
        assert_eq!(
            cookie.contains("HttpOnly"),
            !cookie.starts_with("quota_csrf="),
            "{cookie}"
        );
        assert!(!cookie.contains("Domain"), "{cookie}");
    }
    let body: Value = made.json().await.expect("JSON");
    assert!(body["user"]["id"].is_string());
    assert!(
        body.get("access_token").is_none() && body.get("refresh_token").is_none(),
        "{body}"
    );
    assert_eq!(browser.status(Method::GET, "/auth/me", None).await, 200);
    assert_eq!(
        browser
            .status(Method::POST, "/admin/plans", Some(plan("One")))
            .await,
        201
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn other_clients_get_tokens_only_in_the_body() {
    let server = TestApp::start().await;
    let body = json!({"email": "ada@example.com", "password": PASSWORD});
    let made = server
        .http
        .post(server.url("/auth/register"))
        .json(&body)
        .send()
        .await
        .expect("a response");
    assert!(set_cookies(&made).is_empty());
    let body: Value = made.json().await.expect("JSON");
    assert!(body["access_token"].is_string() && body["refresh_token"].is_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn cookies_are_bound_to_the_host_behind_tls() {
    let server = TestApp::setup()
        .flag("--public-url=https://quota.example.com")
        .start()
        .await;
    let mut browser = Browser::new(&server);
    let made = browser.register().await;
    for cookie in set_cookies(&made) {
        assert!(
            cookie.starts_with("__Host-quota_") && cookie.contains("; Secure"),
            "{cookie}"
        );
    }
    assert!(
        made.headers()
            .contains_key(header::STRICT_TRANSPORT_SECURITY)
    );
    assert_eq!(browser.status(Method::GET, "/auth/me", None).await, 200);

    // A cookie that a sibling host could have set is ignored.
    let plain = browser
        .cookies
        .iter()
        .map(|(name, value)| (name.trim_start_matches("__Host-").to_owned(), value.clone()))
        .collect();
    browser.cookies = plain;
    assert_eq!(browser.status(Method::GET, "/auth/me", None).await, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_of_other_origins_cannot_change_anything() {
    let server = TestApp::start().await;
    let mut browser = Browser::registered(&server).await;
    for site in ["cross-site", "same-site", "none"] {
        browser.site = Some(site);
        assert_eq!(
            browser
                .status(Method::POST, "/admin/plans", Some(plan(site)))
                .await,
            403,
            "{site}"
        );
        assert_eq!(
            browser
                .status(Method::POST, "/auth/refresh", Some(json!({})))
                .await,
            403
        );
        assert_eq!(
            browser
                .status(Method::POST, "/auth/logout", Some(json!({})))
                .await,
            403
        );
        assert_eq!(browser.register().await.status(), 403, "{site}");
    }
    // A browser that does not send `Sec-Fetch-Site` sends `Origin` instead.
    browser.site = None;
    for origin in [
        None,
        Some("https://evil.example".to_owned()),
        Some("null".to_owned()),
    ] {
        browser.origin = origin;
        assert_eq!(
            browser
                .status(Method::POST, "/admin/plans", Some(plan("x")))
                .await,
            403
        );
    }
    browser.origin = Some(server.url(""));
    assert_eq!(
        browser
            .status(Method::POST, "/admin/plans", Some(plan("own")))
            .await,
        201
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn change_with_cookies_requires_the_csrf_header_of_its_session() {
    let server = TestApp::start().await;
    let other = Browser::registered(&server).await;
    let mut browser = Browser::registered(&server).await;
    browser.csrf = false;
    assert_eq!(browser.status(Method::GET, "/admin/plans", None).await, 200);
    assert_eq!(
        browser
            .status(Method::POST, "/admin/plans", Some(plan("x")))
            .await,
        403
    );
    assert_eq!(
        browser
            .status(Method::POST, "/auth/refresh", Some(json!({})))
            .await,
        403
    );
    browser.csrf = true;
    let own = browser
        .cookies
        .insert("quota_csrf".into(), other.cookies["quota_csrf"].clone())
        .expect("the cookie exists");
    assert_eq!(
        browser
            .status(Method::POST, "/admin/plans", Some(plan("x")))
            .await,
        403
    );
    assert_eq!(
        browser
            .status(Method::POST, "/auth/refresh", Some(json!({})))
            .await,
        401
    );
    browser
        .cookies
        .insert("quota_csrf".into(), format!("{own}x"));
    assert_eq!(
        browser
            .status(Method::POST, "/admin/plans", Some(plan("x")))
            .await,
        403
    );
    browser.cookies.insert("quota_csrf".into(), own);
    assert_eq!(
        browser
            .status(Method::POST, "/admin/plans", Some(plan("x")))
            .await,
        201
    );
    assert_eq!(
        browser
            .status(Method::POST, "/auth/refresh", Some(json!({})))
            .await,
        200
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn two_tabs_that_refresh_concurrently_stay_signed_in() {
    let server = TestApp::start().await;
    let mut first = Browser::registered(&server).await;
    let mut second = Browser::new(&server);
    second.cookies = first.cookies.clone();
    let (a, b) = tokio::join!(
        first.status(Method::POST, "/auth/refresh", Some(json!({}))),
        second.status(Method::POST, "/auth/refresh", Some(json!({}))),
    );
    assert_eq!((a.as_u16(), b.as_u16()), (200, 200));
    assert_eq!(
        first.cookies["quota_refresh"],
        second.cookies["quota_refresh"]
    );
    for tab in [&mut first, &mut second] {
        assert_eq!(tab.status(Method::GET, "/auth/me", None).await, 200);
        assert_eq!(
            tab.status(Method::POST, "/auth/refresh", Some(json!({})))
                .await,
            200
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn signing_out_revokes_the_session_and_deletes_its_cookies() {
    let server = TestApp::start().await;
    let mut browser = Browser::registered(&server).await;
    let before = browser.cookies.clone();
    assert_eq!(
        browser
            .status(Method::POST, "/auth/logout", Some(json!({})))
            .await,
        204
    );
    // The browser remains a known device for the next sign-in.
    let left = browser.cookies.keys().map(String::as_str);
    assert_eq!(left.collect::<Vec<_>>(), ["quota_device"]);
    browser.cookies = before;
    assert_eq!(browser.status(Method::GET, "/auth/me", None).await, 401);
    assert_eq!(
        browser
            .status(Method::POST, "/auth/refresh", Some(json!({})))
            .await,
        401
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn every_response_has_its_security_headers() {
    let server = TestApp::start().await;
    for path in [
        "/",
        "/console",
        "/console/plans",
        "/docs",
        "/nothing",
        "/auth/me",
        "/health/live",
    ] {
        let answer = server
            .http
            .get(server.url(path))
            .send()
            .await
            .expect("a response");
        let headers = answer.headers();
        for (name, value) in [
            ("x-content-type-options", "nosniff"),
            ("x-frame-options", "DENY"),
            ("referrer-policy", "no-referrer"),
            ("cross-origin-opener-policy", "same-origin"),
        ] {
            assert_eq!(
                headers.get(name).map(hyper::http::HeaderValue::as_bytes),
                Some(value.as_bytes()),
                "{path}"
            );
        }
        let policy = headers["content-security-policy"].to_str().expect("text");
        assert!(policy.contains("default-src 'none'"), "{path}");
        assert!(policy.contains("frame-ancestors 'none'"), "{path}");
        let script = policy
            .split(';')
            .find(|it| it.contains("script-src"))
            .unwrap_or_default();
        assert!(
            !script.contains("'unsafe-inline'") && !script.contains("'unsafe-eval'"),
            "{path}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn console_is_served_or_says_how_to_build_it() {
    let server = TestApp::start().await;
    let get = async |path: &str, codings: &str| {
        server
            .http
            .get(server.url(path))
            .header(header::ACCEPT_ENCODING, codings)
            .send()
            .await
            .expect("a response")
    };
    let index = server
        .http
        .get(server.url("/console"))
        .send()
        .await
        .expect("a response");
    assert_eq!(
        (index.status().as_u16(), &index.headers()["cache-control"]),
        (200, &"no-cache".parse().unwrap())
    );
    let index = index.text().await.expect("text");
    if index.contains("cargo xtask console") {
        return;
    }
    // The console's pages exist. The files of an older build do not.
    assert_eq!(get("/console/plans", "gzip").await.status(), 200);
    let old = get("/console/boot-0000000000000000.js", "gzip").await;
    assert_eq!(old.status(), 404);
    let mut files = 0;
    for address in index
        .split('"')
        .filter(|it| it.starts_with("/console/") && it.contains('.'))
    {
        files += 1;
        let mut sizes = Vec::new();
        for (codings, coding) in [
            ("gzip, deflate, br, zstd", Some("br")),
            ("gzip, deflate", Some("gzip")),
            ("identity", None),
        ] {
            let file = get(address, codings).await;
            assert_eq!(file.status(), 200, "{address}");
            let sent = file.headers().get("content-encoding");
            assert_eq!(
                sent.map(|it| it.to_str().expect("text")),
                coding,
                "{address}"
            );
            assert_eq!(file.headers()["vary"], "accept-encoding", "{address}");
            assert_eq!(
                file.headers()["cache-control"],
                "public, max-age=31536000, immutable"
            );
            sizes.push(file.bytes().await.expect("a body").len());
        }
        assert!(
            sizes.is_sorted() && sizes[0] < sizes[2],
            "{address}: {sizes:?}"
        );
    }
    assert!(files >= 4, "{index}");
}

const SECRETS: [&str; 2] = [
    "0123456789abcdef0123456789abcdef",
    "fedcba9876543210fedcba9876543210",
];

impl Browser<'_> {
    /// Returns a browser with the same cookies that sends requests to another server.
    fn on<'b>(&self, server: &'b TestApp) -> Browser<'b> {
        Browser {
            server,
            cookies: self.cookies.clone(),
            site: self.site,
            origin: self.origin.clone(),
            csrf: true,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rotated_secret_keeps_browser_sessions() {
    let [old, new] = SECRETS;
    let before = TestApp::setup()
        .flag(format!("--secret={old}"))
        .start()
        .await;
    let browser = Browser::registered(&before).await;
    let desktop = before.register().await;
    // There are two tabs, one of which has just refreshed and lost the response.
    let mut first_tab = browser.on(&before);
    let refresh = Some(json!({}));
    assert_eq!(
        first_tab
            .status(Method::POST, "/auth/refresh", refresh.clone())
            .await,
        200
    );

    let after = TestApp::setup()
        .database(before.database.clone())
        .flag(format!("--secret={new}"))
        .flag(format!("--secret-previous={old}"))
        .start()
        .await;
    let mut second_tab = browser.on(&after);
    assert_eq!(second_tab.status(Method::GET, "/auth/me", None).await, 200);
    assert_eq!(
        second_tab
            .status(Method::POST, "/admin/plans", Some(plan("One")))
            .await,
        201,
        "the CSRF token of a session from before the rotation"
    );
    assert_eq!(
        second_tab
            .status(Method::POST, "/auth/refresh", refresh.clone())
            .await,
        200,
        "one tab refreshes just after another, across the rotation"
    );
    let mut first_tab = first_tab.on(&after);
    assert_eq!(
        first_tab
            .status(Method::POST, "/auth/refresh", refresh)
            .await,
        200,
        "the session has not ended"
    );
    let renewed = after
        .post(
            "/auth/refresh",
            json!({"refresh_token": desktop.refresh_token}),
        )
        .send()
        .await;
    assert_eq!(renewed.status, 200, "{}", renewed.body);

    // Tokens signed with a secret that is no longer accepted are rejected.
    let forgotten = TestApp::setup()
        .database(before.database.clone())
        .flag("--secret=another-secret-of-32-characters!")
        .start()
        .await;
    let mut third = browser.on(&forgotten);
    assert_eq!(third.status(Method::GET, "/auth/me", None).await, 401);
}

/// By default, nginx sends the name of its upstream as `Host`.
#[tokio::test(flavor = "multi_thread")]
async fn proxy_that_sends_localhost_does_not_weaken_cookies() {
    let server = TestApp::setup().start().await;
    let register = async |fields: &[(&str, &str)]| {
        let email = format!("{}@example.com", uuid::Uuid::now_v7().simple());
        let body = json!({"email": email, "password": PASSWORD});
        let mut request = server
            .http
            .post(server.url("/auth/register"))
            .header("x-quota-session", "cookie")
            .header("sec-fetch-site", "same-origin")
            .json(&body);
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        let response = request.send().await.expect("a response");
        assert_eq!(response.status(), 201);
        set_cookies(&response)
    };
    let proxied: [&[(&str, &str)]; 5] = [
        &[
            ("host", "localhost"),
            ("origin", "https://quota.example.com"),
        ],
        &[("host", "localhost:8080"), ("x-forwarded-proto", "https")],
        &[("host", "localhost"), ("x-forwarded-for", "198.51.100.7")],
        &[("host", "127.0.0.1"), ("forwarded", "for=198.51.100.7")],
        &[("host", "localhost"), ("via", "1.1 proxy")],
    ];
    for fields in proxied {
        for cookie in register(fields).await {
            assert!(
                cookie.starts_with("__Host-quota_") && cookie.contains("; Secure"),
                "{fields:?}: {cookie}"
            );
        }
    }
    // A browser on the same machine without TLS would reject cookies with `Secure`, so it gets cookies without it.
    let local: [&[(&str, &str)]; 3] = [
        &[
            ("host", "localhost:8080"),
            ("origin", "http://localhost:8080"),
        ],
        &[("host", "127.0.0.1:8080")],
        &[("host", "quota.localhost")],
    ];
    for fields in local {
        for cookie in register(fields).await {
            assert!(
                cookie.starts_with("quota_") && !cookie.contains("Secure"),
                "{fields:?}: {cookie}"
            );
        }
    }
}

/// Browsers do not send `Origin` with a GET request, so the server cannot tell that the browser uses TLS. The cookies
/// are read anyway.
#[tokio::test(flavor = "multi_thread")]
async fn cookies_set_through_a_proxy_are_read() {
    let server = TestApp::setup().start().await;
    let mut browser = Browser::new(&server);
    browser.origin = Some("https://quota.example.com".into());
    assert_eq!(browser.register().await.status(), 201);
    assert!(
        browser
            .cookies
            .keys()
            .all(|name| name.starts_with("__Host-"))
    );
    browser.origin = None;
    assert_eq!(browser.status(Method::GET, "/auth/me", None).await, 200);
}

/// Other clients, in the same network or in many networks, do not lock out a browser that has signed in before.
#[tokio::test(flavor = "multi_thread")]
async fn known_browser_signs_in_while_its_network_is_slowed_down() {
    let server = TestApp::setup()
        .flag("--login-free-failures=3")
        .start()
        .await;
    let mut browser = Browser::new(&server);
    let email = format!("{}@example.com", uuid::Uuid::now_v7().simple());
    let credentials = json!({"email": email, "password": PASSWORD});
    let made = browser
        .status(Method::POST, "/auth/register", Some(credentials.clone()))
        .await;
    assert_eq!(made, 201);
    let logout = Some(json!({}));
    assert_eq!(
        browser.status(Method::POST, "/auth/logout", logout).await,
        204
    );
    let mut stranger = Browser::new(&server);
    let wrong = Some(json!({"email": email, "password": "wrong"}));
    let mut statuses = Vec::new();
    for _ in 0..5 {
        let status = stranger
            .status(Method::POST, "/auth/login", wrong.clone())
            .await;
        statuses.push(status.as_u16());
    }
    assert_eq!(statuses, [401, 401, 401, 429, 429]);
    let login = Some(credentials);
    let status = stranger
        .status(Method::POST, "/auth/login", login.clone())
        .await;
    assert_eq!(status, 429, "not even with the right password");
    let status = browser
        .status(Method::POST, "/auth/login", login.clone())
        .await;
    assert_eq!(status, 200);
    assert_eq!(browser.status(Method::GET, "/auth/me", None).await, 200);

    // Someone who steals the device cookie also gets only a few attempts.
    let mut thief = Browser::new(&server);
    thief.cookies = browser.cookies.clone();
    thief.cookies.retain(|name, _| name.ends_with("device"));
    let mut statuses = Vec::new();
    for _ in 0..5 {
        let status = thief
            .status(Method::POST, "/auth/login", wrong.clone())
            .await;
        statuses.push(status.as_u16());
    }
    assert_eq!(statuses, [401, 401, 401, 429, 429]);
    // The device cookie is useless for another account.
    let other = server.register().await;
    let mut thief = Browser::new(&server);
    thief.cookies = browser.cookies.clone();
    let guess = Some(json!({"email": other.email, "password": "wrong"}));
    let mut statuses = Vec::new();
    for _ in 0..4 {
        let status = thief
            .status(Method::POST, "/auth/login", guess.clone())
            .await;
        statuses.push(status.as_u16());
    }
    assert_eq!(statuses, [401, 401, 401, 429]);
}
