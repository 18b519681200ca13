//! Checks properties of every operation in the OpenAPI document, so that a new operation cannot be forgotten.

use std::collections::BTreeSet;

use reqwest::{Method, header};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::{
    app::{DOCUMENT, PASSWORD, TestApp, faults},
    stripe::TestStripe,
};

/// The operations that require no credentials, each with its status for a malformed body.
const PUBLIC: &[(&str, u16)] = &[
    ("live", 200),
    ("login", 400),
    ("logout", 400),
    ("ready", 200),
    // Billing is off.
    ("receive_stripe_event", 409),
    ("refresh", 400),
    ("register", 400),
    ("serving", 200),
];

/// Methods that forward-auth accepts, although the document shows only one.
const FORWARD_AUTH: [&str; 7] = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"];

const ROLES: [&str; 5] = ["owner", "admin", "developer", "billing", "viewer"];

/// The permission that an operation requires.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Right {
    /// No permission, because the operation concerns the caller's own account.
    Own,
    Read,
    Usage,
    Bill,
    Manage,
    /// Whether `update_me` requires this permission depends on the body, so the test sends only the document's example.
    Administer,
}

impl Right {
    /// Returns the roles that have the permission, from the table of roles in `docs/OPERATIONS.md`. Does not use
    /// `Role`, which is under test.
    const fn roles(self) -> &'static [&'static str] {
        match self {
            Self::Own | Self::Usage => &ROLES,
            Self::Read => &["owner", "admin", "developer", "viewer"],
            Self::Bill => &["owner", "admin", "billing"],
            Self::Manage => &["owner", "admin", "developer"],
            Self::Administer => &["owner", "admin"],
        }
    }
}

/// The permission that each operation with an access token requires.
const RIGHTS: &[(&str, Right)] = &[
    ("change_password", Right::Own),
    ("create_api_key", Right::Manage),
    ("create_plan", Right::Manage),
    ("create_service_token", Right::Manage),
    ("create_webhook", Right::Manage),
    ("delete_api_key", Right::Manage),
    ("delete_plan", Right::Manage),
    ("delete_service_token", Right::Manage),
    ("delete_webhook", Right::Manage),
    ("end_session", Right::Own),
    ("get_alert_settings", Right::Read),
    ("get_api_key", Right::Read),
    ("get_api_key_limits", Right::Read),
    ("get_billing", Right::Bill),
    ("get_burn_down", Right::Usage),
    ("get_me", Right::Own),
    ("get_plan", Right::Read),
    ("get_service_token", Right::Read),
    ("get_stats", Right::Usage),
    ("get_usage", Right::Usage),
    ("get_webhook", Right::Read),
    ("list_alerts", Right::Usage),
    ("list_api_keys", Right::Read),
    ("list_audit_events", Right::Read),
    ("list_decisions", Right::Usage),
    ("list_plans", Right::Read),
    ("list_service_tokens", Right::Read),
    ("list_sessions", Right::Own),
    ("list_webhook_deliveries", Right::Read),
    ("list_webhooks", Right::Read),
    ("open_billing_portal", Right::Bill),
    ("redeliver_webhook", Right::Manage),
    ("rotate_api_key", Right::Manage),
    ("rotate_webhook_secret", Right::Manage),
    ("start_checkout", Right::Bill),
    ("stream_decisions", Right::Usage),
    ("test_webhook", Right::Manage),
    ("update_alert_settings", Right::Administer),
    ("update_api_key", Right::Manage),
    ("update_me", Right::Administer),
    ("update_plan", Right::Manage),
    ("update_webhook", Right::Manage),
];

/// One operation of the document.
pub(crate) struct Operation {
    pub(crate) method: Method,
    pub(crate) path: &'static str,
    pub(crate) id: &'static str,
    pub(crate) meta: &'static Value,
}

impl Operation {
    pub(crate) fn is_secured(&self) -> bool {
        self.meta["security"]
            .as_array()
            .is_some_and(|it| !it.is_empty())
    }

    /// Returns the schema of the JSON body, if there is one.
    pub(crate) fn body(&self) -> Option<&'static Value> {
        let schema = &self.meta["requestBody"]["content"]["application/json"]["schema"];
        (!schema.is_null()).then(|| resolve(schema))
    }

    pub(crate) fn parameters(&self, place: &str) -> Vec<&'static str> {
        let all = self.meta["parameters"]
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default();
        all.iter()
            .filter(|it| it["in"] == place)
            .map(|it| it["name"].as_str().expect("a parameter has a name"))
            .collect()
    }

    /// Returns the path with each of its parameters replaced by `id`.
    pub(crate) fn path_with(&self, id: &str) -> String {
        let parts = self
            .path
            .split('/')
            .map(|part| if part.starts_with('{') { id } else { part });
        parts.collect::<Vec<_>>().join("/")
    }
}

/// Returns all operations.
pub(crate) fn operations() -> Vec<Operation> {
    let paths = DOCUMENT["paths"].as_object().expect("paths");
    let mut all = Vec::new();
    for (path, operations) in paths {
        for (method, meta) in operations.as_object().expect("operations") {
            all.push(Operation {
                method: method.to_uppercase().parse().expect("a method"),
                path,
                id: meta["operationId"]
                    .as_str()
                    .expect("every operation has an id"),
                meta,
            });
        }
    }
    assert!(all.len() >= 30, "{} operations", all.len());
    all
}

/// Returns the target of a reference, or the schema itself if it is not a reference.
pub(crate) fn resolve(schema: &'static Value) -> &'static Value {
    match schema["$ref"].as_str() {
        Some(reference) => {
            let pointer = reference
                .strip_prefix('#')
                .expect("references are within the document");
            resolve(
                DOCUMENT
                    .pointer(pointer)
                    .unwrap_or_else(|| panic!("{reference} does not exist")),
            )
        }
        None => schema,
    }
}

/// Returns whether the schema or a part of it has an example.
fn has_example(schema: &'static Value) -> bool {
    let schema = resolve(schema);
    let parts = ["allOf", "anyOf", "oneOf"];
    !schema["example"].is_null()
        || (schema["type"] == "array" && has_example(&schema["items"]))
        || parts.iter().any(|name| {
            schema[*name]
                .as_array()
                .is_some_and(|parts| parts.iter().any(has_example))
        })
        || schema["properties"]
            .as_object()
            .is_some_and(|fields| fields.values().any(has_example))
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_credentials_are_401_before_the_body_is_read() {
    let app = TestApp::start().await;
    for operation in operations() {
        let path = operation.path_with(&Uuid::now_v7().to_string());
        let answer = app
            .request(operation.method.clone(), &path)
            .body("application/json", "{\"broken")
            .send()
            .await;
        let public = PUBLIC.iter().find(|(id, _)| *id == operation.id);
        let expected = public.map_or(401, |(_, status)| *status);
        assert_eq!(answer.status, expected, "{}: {}", operation.id, answer.text);
        assert_eq!(
            operation.is_secured(),
            public.is_none(),
            "{}: the document disagrees with PUBLIC",
            operation.id
        );
        if expected == 401 {
            assert_eq!(
                answer.header("www-authenticate"),
                Some("Bearer realm=\"quota\"")
            );
        }
    }
    for method in FORWARD_AUTH {
        let method = method.parse().expect("a method");
        let answer = app.request(method, "/v1/forward-auth").send().await;
        assert_eq!(answer.status, 401, "{}", answer.text);
    }
    for (id, _) in PUBLIC {
        assert!(
            operations().iter().any(|it| it.id == *id),
            "{id} is not in the document"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_credentials_are_401_with_invalid_token() {
    let app = TestApp::start().await;
    let secured = operations().into_iter().filter(Operation::is_secured);
    for operation in secured {
        let path = operation.path_with(&Uuid::now_v7().to_string());
        for credential in [
            "nonsense",
            "qk_00000000000000000000000000000000EXAMPL",
            "a.b.c",
            "..",
        ] {
            let call = app.request(operation.method.clone(), &path);
            let call = if operation.meta["security"][0]["GatewayToken"].is_array() {
                call.header("X-Service-Token", credential)
            } else {
                call.bearer(credential)
            };
            let answer = call.send().await;
            assert_eq!(
                answer.status, 401,
                "{} {credential}: {}",
                operation.id, answer.text
            );
            assert_eq!(
                answer.header("www-authenticate"),
                Some("Bearer realm=\"quota\", error=\"invalid_token\""),
                "{} {credential}",
                operation.id
            );
        }
    }
}

/// Each operation rejects credentials of a kind that it does not accept, such as an API key for a management request.
#[tokio::test(flavor = "multi_thread")]
async fn credentials_of_another_kind_are_401() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({})).await;
    let key = app.key(&account, &plan).await;
    let service_token = app.service_token(&account).await;
    for operation in operations().into_iter().filter(Operation::is_secured) {
        let scheme = operation.meta["security"][0].as_object().expect("a scheme");
        let path = operation.path_with(&Uuid::now_v7().to_string());
        for (kind, credential) in [
            ("AccessToken", &account.access_token),
            ("ApiKey", &key.text),
            ("ServiceToken", &service_token),
            ("RefreshToken", &account.refresh_token),
        ] {
            if scheme.contains_key(kind) {
                continue;
            }
            let answer = app
                .request(operation.method.clone(), &path)
                .bearer(credential)
                .send()
                .await;
            assert_eq!(
                answer.status, 401,
                "{} with {kind}: {}",
                operation.id, answer.text
            );
        }
    }
    let me = app
        .get("/auth/me")
        .bearer(&account.access_token)
        .send()
        .await;
    assert_eq!(me.status, 200, "the right kind works");
}

#[test]
fn every_operation_with_an_access_token_has_a_right() {
    let mut found = operations()
        .iter()
        .filter(|it| it.meta["security"][0]["AccessToken"].is_array())
        .map(|it| it.id)
        .collect::<Vec<_>>();
    found.sort_unstable();
    let listed = RIGHTS.iter().map(|(id, _)| *id).collect::<Vec<_>>();
    assert_eq!(found, listed);
}

/// A user with each role calls each operation that requires an access token. Without the permission, the response is
/// 403 and no row in any table changes, regardless of the ID and the body. With the permission, the operation succeeds.
#[tokio::test(flavor = "multi_thread")]
async fn role_without_the_right_is_403_and_changes_nothing() {
    let stripe = TestStripe::start().await;
    let app = stripe.configure(TestApp::setup()).without_jobs();
    let app = app.flag("--max-webhooks=100").start().await;
    let owner = app.register().await;
    // Create a customer in Stripe, so that its portal can be opened.
    stripe.start_checkout(&app, &owner).await;
    let client = app.database.connect().await;
    let shared_plan = app.plan(&owner, json!({"daily_quota": 1000})).await;
    let mut allowed = 0;
    let mut denied = 0;
    for role in ROLES {
        let member = app.register().await;
        // Move the user from the tenant that was created at registration to the owner's tenant. The user's sessions
        // belong to the old tenant, so delete them. The user signs in again below.
        client
            .execute(
                "DELETE FROM sessions WHERE user_id = $1::text::uuid",
                &[&member.user_id],
            )
            .await
            .expect("sessions are deleted");
        let moved = client
            .execute(
                "UPDATE memberships SET tenant_id = $1::text::uuid, role = $2 WHERE user_id = $3::text::uuid",
                &[&owner.tenant_id, &role, &member.user_id],
            )
            .await
            .expect("a membership moves");
        assert_eq!(moved, 1);
        for (id, right) in RIGHTS {
            let operation = operations().into_iter().find(|it| it.id == *id);
            let operation = operation.expect("the operation exists");
            let login = json!({"email": member.email, "password": PASSWORD});
            let login = app.post("/auth/login", login).send().await;
            let token = login.text("access_token");
            // Each call gets its own resources, because some calls delete them.
            let path_id = if operation.path.contains("{plan_id}") {
                app.plan(&owner, json!({})).await
            } else if operation.path.contains("{key_id}") {
                app.key(&owner, &shared_plan).await.id
            } else if operation.path.contains("{token_id}") {
                let body = json!({"name": "Gateway"});
                let created = app.act(&owner, "POST", "/admin/service-tokens", body).await;
                let id = created.body["service_token"]["id"].as_str();
                id.expect("an id").to_owned()
            } else if operation.path.contains("{webhook_id}") {
                app.webhook(&owner).await
            } else if operation.path.contains("{delivery_id}") {
                let webhook = app.webhook(&owner).await;
                app.webhook_delivery(&owner, &webhook).await
            } else {
                let me = app.get("/auth/me").bearer(&token).send().await;
                me.text("session_id")
            };
            let body = operation.body().map(|schema| {
                let mut body = schema["example"].clone();
                if body["plan_id"].is_string() {
                    body["plan_id"] = json!(shared_plan);
                }
                if *id == "create_plan" {
                    body["name"] = json!(format!("Plan of {role}"));
                }
                if *id == "change_password" {
                    body = json!({"current_password": PASSWORD, "new_password": PASSWORD});
                }
                body
            });
            let send = async |path_id: &str, body: Option<Value>| {
                let path = operation.path_with(path_id);
                let call = app.request(operation.method.clone(), &path).bearer(&token);
                match body {
                    Some(body) => call.json(body).send().await,
                    None => call.send().await,
                }
            };
            if right.roles().contains(&role) {
                allowed += 1;
                let answer = send(&path_id, body).await;
                assert!(
                    answer.status < 300,
                    "{role} {id}: {} {}",
                    answer.status,
                    answer.text
                );
                continue;
            }
            denied += 1;
            let before = app.everything_kept().await;
            let mut bodies = vec![body.clone()];
            if body.is_some() && *right != Right::Administer {
                bodies.push(Some(json!({"surplus": []})));
            }
            let never = Uuid::now_v7().to_string();
            for path_id in [&path_id, &never] {
                for body in &bodies {
                    let answer = send(path_id, body.clone()).await;
                    assert_eq!(
                        (answer.status, answer.problem()),
                        (403, "forbidden"),
                        "{role} {id}: {}",
                        answer.text
                    );
                    assert!(answer.text("detail").contains(role), "{}", answer.text);
                }
            }
            assert_eq!(app.everything_kept().await, before, "{role} {id}");
        }
    }
    assert_eq!(allowed + denied, ROLES.len() * RIGHTS.len());
    assert!(
        allowed >= 99 && denied >= 29,
        "{allowed} allowed, {denied} denied"
    );
}

#[test]
fn every_operation_documents_its_4xx_responses() {
    for operation in operations() {
        let id = operation.id;
        let answers = operation.meta["responses"]
            .as_object()
            .expect("the documented responses");
        let mut needed = Vec::new();
        if operation.is_secured() {
            needed.push("401");
        }
        let by_key = ["echo", "forward_auth"].contains(&id);
        if by_key || operation.path.starts_with("/auth/") || operation.path.starts_with("/admin/") {
            needed.push("429");
        }
        if operation.path.starts_with("/admin/") {
            needed.push("403");
        }
        if operation.body().is_some() {
            needed.extend(["400", "408", "413", "415", "422"]);
        }
        if !operation.parameters("path").is_empty() {
            needed.push("404");
        }
        if !operation.parameters("query").is_empty() || !operation.parameters("header").is_empty() {
            needed.extend(["400", "422"]);
        }
        for status in needed {
            assert!(answers.contains_key(status), "{id} has no {status}");
        }

        assert!(
            answers.keys().any(|it| it.starts_with('2')),
            "{id} never succeeds"
        );
        for (status, answer) in answers {
            let text = answer["description"].as_str().unwrap_or_default();
            assert!(!text.trim().is_empty(), "{id} {status} has no description");
            let names = |field: &str| !answer["headers"][field].is_null();
            assert!(names("X-Request-Id"), "{id} {status} has no X-Request-Id");
            if status == "401" {
                assert!(names("WWW-Authenticate"), "{id} {status}");
            }
            if status == "429" || status == "503" {
                assert!(names("Retry-After"), "{id} {status}");
            }
            if by_key && matches!(status.as_str(), "200" | "429") {
                for field in [
                    "X-RateLimit-Limit",
                    "X-RateLimit-Remaining",
                    "X-RateLimit-Reset",
                    "RateLimit-Policy",
                    "RateLimit",
                ] {
                    assert!(names(field), "{id} {status} has no {field}");
                }
            }
        }
    }
}

#[test]
fn every_operation_has_a_summary_and_examples() {
    for operation in operations() {
        let (id, meta) = (operation.id, operation.meta);
        let text = |field: &str| meta[field].as_str().unwrap_or_default().trim().to_owned();
        assert!(!text("summary").is_empty(), "{id} has no summary");
        assert!(
            meta["tags"].as_array().is_some_and(|it| it.len() == 1),
            "{id} does not have exactly one tag"
        );
        if let Some(schema) = operation.body() {
            let example = &schema["example"];
            assert!(!example.is_null(), "{id}: the body has no example");
            assert_eq!(
                faults(schema, example),
                Vec::<String>::new(),
                "{id}: {example}"
            );
        }
        for (status, answer) in meta["responses"]
            .as_object()
            .expect("the documented responses")
        {
            for (media_type, content) in answer["content"].as_object().into_iter().flatten() {
                let own = &content["example"];
                assert!(
                    !own.is_null() || has_example(&content["schema"]),
                    "{id} {status} {media_type} has no example"
                );
                if !own.is_null() {
                    let found = faults(&content["schema"], own);
                    assert!(found.is_empty(), "{id} {status}: {found:?} in {own}");
                }
                if status.starts_with(['4', '5']) {
                    assert_eq!(media_type, "application/problem+json", "{id} {status}");
                    assert_eq!(own["status"].to_string(), *status, "{id}");
                }
            }
        }
    }
    let schemas = DOCUMENT["components"]["schemas"]
        .as_object()
        .expect("schemas");
    for (name, schema) in schemas {
        let example = &schema["example"];
        if !example.is_null() {
            assert_eq!(
                faults(schema, example),
                Vec::<String>::new(),
                "{name}: {example}"
            );
        }
    }
}

/// A copied example must work.
#[tokio::test(flavor = "multi_thread")]
async fn every_example_body_is_accepted() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({})).await;
    let key = app.key(&account, &plan).await;
    let service_token = app.service_token(&account).await;
    let webhook = app.webhook(&account).await;
    let mut sent = 0;
    for operation in operations() {
        let Some(schema) = operation.body() else {
            continue;
        };
        let id = if operation.path.contains("{plan_id}") {
            &plan
        } else if operation.path.contains("{webhook_id}") {
            &webhook
        } else {
            &key.id
        };
        let credential = if operation.id == "check" {
            &service_token
        } else {
            &account.access_token
        };
        let answer = app
            .request(operation.method.clone(), &operation.path_with(id))
            .bearer(credential)
            .json(schema["example"].clone())
            .send()
            .await;
        // The plan, password and tokens in the examples are not valid on this server, but the server detects this only
        // after it has accepted the body.
        let expected: &[u16] = match operation.id {
            "create_api_key" => &[404],
            "login" | "refresh" | "logout" | "change_password" => &[204, 401, 422],
            _ => &[200, 201, 204],
        };
        assert!(
            expected.contains(&answer.status),
            "{}: {} {}",
            operation.id,
            answer.status,
            answer.text
        );
        sent += 1;
    }
    assert!(sent >= 13, "{sent}");
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_path_is_404_with_a_problem() {
    let app = TestApp::start().await;
    let account = app.register().await;
    for path in [
        "/nope",
        "/health",
        "/health/",
        "/v1",
        "/v1/nope",
        "/v1/echo/",
        "/auth",
        "/auth/nope",
        "/admin",
        "/admin/",
        "/admin/nope",
        "/admin/plans/",
        "/admin/plans/not-an-id",
        "/admin/plans/00000000-0000-0000-0000-00000000000g",
        "/admin/plans/019ab4e1-7c00-7000-8000-0000000000a1/nope",
        "/admin/api-keys/%00",
        "/admin/api-keys/'%20OR%201=1--",
        "/docs/nope.js",
        "/problems/nope",
        "/problems/../../etc/passwd",
        "/metrics",
        "/.env",
        "/%2e%2e/%2e%2e/etc/passwd",
    ] {
        for method in [Method::GET, Method::POST, Method::DELETE] {
            let answer = app
                .request(method.clone(), path)
                .bearer(&account.access_token)
                .send()
                .await;
            if answer.status == 405 && method != Method::GET {
                continue;
            }
            assert_eq!(answer.status, 404, "{method} {path}: {}", answer.text);
            assert_eq!(
                answer.header("content-type"),
                Some("application/problem+json")
            );
            assert_eq!(answer.problem(), "not-found", "{method} {path}");
            assert_eq!(answer.body["status"], 404);
            assert_eq!(
                answer.body["request_id"].as_str(),
                answer.header("x-request-id")
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unsupported_method_is_405_with_allow() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let pages = [
        "/",
        "/docs",
        "/openapi.json",
        "/problems",
        "/problems/not-found",
        "/page.css",
        "/page.js",
        "/icon.svg",
    ];
    let mut paths = operations()
        .iter()
        .map(|it| it.path)
        .collect::<BTreeSet<_>>();
    paths.extend(pages);
    for path in paths {
        let mut has = DOCUMENT["paths"][path].as_object().map_or_else(
            || BTreeSet::from(["GET".to_owned()]),
            |methods| {
                methods
                    .keys()
                    .map(|it| it.to_uppercase())
                    .collect::<BTreeSet<_>>()
            },
        );
        if has.contains("GET") {
            has.insert("HEAD".to_owned());
        }
        let path = path.replace(['{', '}'], "");
        for method in [
            "GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW",
        ] {
            // Forward-auth accepts any method.
            if has.contains(method) || path == "/v1/forward-auth" {
                continue;
            }
            let method: Method = method.parse().expect("a method");
            let answer = app
                .request(method.clone(), &path)
                .bearer(&account.access_token)
                .send()
                .await;
            assert_eq!(answer.status, 405, "{method} {path}: {}", answer.text);
            assert_eq!(answer.problem(), "method-not-allowed", "{method} {path}");
            let allow = answer.header(header::ALLOW.as_str()).expect("Allow");
            let mut allowed = allow
                .split(',')
                .map(|it| it.trim().to_owned())
                .collect::<BTreeSet<_>>();
            // `Allow` may omit HEAD. Every path that accepts GET also accepts HEAD.
            if allowed.contains("GET") {
                allowed.insert("HEAD".to_owned());
            }
            assert_eq!(allowed, has, "{method} {path}");
        }
    }
}
