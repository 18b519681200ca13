//! Tests that the OpenAPI document is valid, complete and committed, and describes bodies as the server handles them.

use std::{collections::BTreeSet, fs, path::Path};

use quota_server::openapi;
use reqwest::Method;
use serde_json::{Value, json};

use crate::{
    every_endpoint::{Operation, operations, resolve},
    support::app::{Answer, DOCUMENT, TestApp, faults},
};

/// Fields for which a value within the bounds may still be invalid: a short password is easy to guess, the current
/// password must be correct, no time zone has a name that is as short or as long as the bounds allow, and a burst must
/// refill within 31 days.
const MORE_THAN_BOUNDS: &[&str] = &[
    "burst.max",
    "current_password",
    "new_password.min",
    "password.min",
    "time_zone",
];

#[test]
fn document_is_valid_openapi_3_0() {
    let schema = include_str!("openapi-3.0.schema.json");
    let schema: Value = serde_json::from_str(schema).expect("the schema is JSON");
    let validator = jsonschema::draft4::new(&schema).expect("a valid schema");
    let check = |document: &Value| {
        let errors = validator.iter_errors(document);
        errors
            .map(|error| format!("{}: {error}", error.instance_path()))
            .collect::<Vec<_>>()
    };
    let found = check(&DOCUMENT);
    assert!(found.is_empty(), "{found:#?}");

    let mut broken = DOCUMENT.clone();
    broken["paths"]["/v1/echo"]["get"]["responses"] = json!({});
    assert!(
        !check(&broken).is_empty(),
        "the schema rejects an operation without responses"
    );
}

#[test]
fn committed_document_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../openapi.json");
    let committed = fs::read_to_string(path).expect("openapi.json is committed");
    assert!(
        committed == openapi::text(),
        "openapi.json is stale: write it with `quota openapi`"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn server_serves_the_same_document() {
    let app = TestApp::start().await;
    let shown = app.get("/openapi.json").send().await;
    assert_eq!(shown.status, 200);
    assert_eq!(shown.header("content-type"), Some("application/json"));
    assert!(shown.text == openapi::text());
}

/// Without `Vary: Accept-Encoding`, a shared cache might send a compressed document to clients that cannot decompress
/// it.
#[tokio::test(flavor = "multi_thread")]
async fn caches_distinguish_codings_even_if_every_origin_is_allowed() {
    let app = TestApp::setup().flag("--allowed-origins=*").start().await;
    for origin in [None, Some("https://a.example")] {
        let mut request = app.get("/openapi.json").header("Accept-Encoding", "gzip");
        if let Some(origin) = origin {
            request = request.header("Origin", origin);
        }
        let shown = request.send().await;
        assert_eq!(shown.header("content-encoding"), Some("gzip"), "{origin:?}");
        let vary = shown.header("vary").expect("the coding was chosen");
        let mut names = vary.split(',').map(str::trim);
        assert!(
            names.any(|it| it == "accept-encoding"),
            "{origin:?}: {vary}"
        );
    }
}

#[test]
fn operation_ids_are_unique() {
    let mut ids = BTreeSet::new();
    for operation in operations() {
        assert!(ids.insert(operation.id), "{} appears twice", operation.id);
        let plain = operation
            .id
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte == b'_');
        assert!(
            plain,
            "{} is not a valid name in every language",
            operation.id
        );
    }
}

fn references<'a>(value: &'a Value, found: &mut BTreeSet<&'a str>) {
    match value {
        Value::Object(fields) => {
            if let Some(reference) = fields.get("$ref").and_then(Value::as_str) {
                found.insert(reference);
            }
            fields.values().for_each(|value| references(value, found));
        }
        Value::Array(items) => items.iter().for_each(|value| references(value, found)),
        _ => {}
    }
}

#[test]
fn every_reference_resolves_and_every_schema_is_used() {
    let mut named = BTreeSet::new();
    references(&DOCUMENT, &mut named);
    assert!(named.len() > 20, "{named:?}");
    for reference in &named {
        let pointer = reference
            .strip_prefix('#')
            .expect("references are within the document");
        assert!(
            DOCUMENT.pointer(pointer).is_some(),
            "{reference} leads nowhere"
        );
    }
    for name in DOCUMENT["components"]["schemas"]
        .as_object()
        .expect("schemas")
        .keys()
    {
        let reference = format!("#/components/schemas/{name}");
        assert!(named.contains(reference.as_str()), "nothing uses {name}");
    }
    let schemes = DOCUMENT["components"]["securitySchemes"]
        .as_object()
        .expect("schemes");
    let tags = DOCUMENT["tags"].as_array().expect("tags");
    for operation in operations() {
        for scheme in operation.meta["security"].as_array().into_iter().flatten() {
            for name in scheme.as_object().expect("names").keys() {
                assert!(schemes.contains_key(name), "{}: {name}", operation.id);
            }
        }
        let tag = &operation.meta["tags"][0];
        assert!(
            tags.iter().any(|it| it["name"] == *tag),
            "{}: {tag}",
            operation.id
        );
        let in_path = operation
            .path
            .split('/')
            .filter_map(|part| part.strip_prefix('{'));
        let in_path = in_path
            .map(|part| part.trim_end_matches('}'))
            .collect::<BTreeSet<_>>();
        let described = operation
            .parameters("path")
            .into_iter()
            .collect::<BTreeSet<_>>();
        assert_eq!(in_path, described, "{}", operation.id);
    }
}

// Bodies and parameters are checked exactly as documented. -------------------------------

/// A client that sends bodies.
struct Sender {
    app: TestApp,
    token: String,
    service_token: String,
    plan: String,
    key: String,
    webhook: String,
}

impl Sender {
    async fn new() -> Self {
        let app = TestApp::setup().without_jobs().start().await;
        let account = app.register().await;
        let plan = app.plan(&account, json!({})).await;
        let key = app.key(&account, &plan).await.id;
        let service_token = app.service_token(&account).await;
        let webhook = app.webhook(&account).await;
        Self {
            webhook,
            token: account.access_token,
            app,
            service_token,
            plan,
            key,
        }
    }

    /// Returns a valid body for the operation.
    fn body(&self, operation: &Operation) -> Value {
        let mut body = operation.body().expect("the operation has a body")["example"].clone();
        if body["plan_id"].is_string() {
            body["plan_id"] = json!(self.plan);
        }
        // Names must be unique.
        if operation.id == "create_plan" {
            body["name"] = json!(format!("Plan {}", uuid::Uuid::now_v7()));
        }
        body
    }

    async fn send(&self, operation: &Operation, body: &Value) -> Answer {
        let id = if operation.path.contains("{plan_id}") {
            &self.plan
        } else if operation.path.contains("{webhook_id}") {
            &self.webhook
        } else {
            &self.key
        };
        let call = self
            .app
            .request(operation.method.clone(), &operation.path_with(id));
        let token = if operation.id == "check" {
            &self.service_token
        } else {
            &self.token
        };
        call.bearer(token).json(body.clone()).send().await
    }

    async fn refused(&self, operation: &Operation, body: &Value, field: &str) {
        let answer = self.send(operation, body).await;
        let (id, text) = (operation.id, &answer.text);
        assert_eq!(
            answer.status,
            422,
            "{id}.{field}: {text} for {}",
            short(body)
        );
        assert!(
            names(&answer, field),
            "{id}: {field} is not named: {text} for {}",
            short(body)
        );
    }

    async fn accepted(&self, operation: &Operation, body: &Value, field: &str) {
        let answer = self.send(operation, body).await;
        let (id, text) = (operation.id, &answer.text);
        if matches!(id, "refresh" | "logout") && field == "refresh_token" && body[field].is_null() {
            // This field is optional for clients whose tokens are in cookies, but required for this client.
            assert_eq!(answer.status, 401, "{id}: {text}");
            return;
        }
        assert_ne!(
            answer.status,
            400,
            "{id}.{field}: {text} for {}",
            short(body)
        );
        // A rotation within a grace period conflicts, and the error names the field that confirms the rotation.
        assert!(
            !names(&answer, field) || (id, answer.status) == ("rotate_api_key", 409),
            "{id}: {text} for {}",
            short(body)
        );
        // Changing the password makes the current password incorrect in later bodies.
        assert!(
            answer.status != 422 || id == "change_password",
            "{id}.{field}: {text}"
        );
    }
}

fn short(body: &Value) -> String {
    body.to_string().chars().take(300).collect()
}

/// Returns whether an error names the field or a part of it.
fn names(answer: &Answer, field: &str) -> bool {
    let errors = answer.body["errors"].as_array();
    let is_field = |it: &Value| {
        let named = it["field"].as_str().unwrap_or_default();
        named.split('.').next() == Some(field)
    };
    errors.is_some_and(|errors| errors.iter().any(is_field))
}

/// Returns a string of the given length that is valid except perhaps for its length.
fn text(field: &str, length: usize) -> String {
    const LETTERS: &[u8] = b"qZ7xKp2mWv9tRb4nYc6sLd8gHf3jTk5wQz";
    let some = |length: usize| -> String {
        (0..length)
            .map(|i| char::from(LETTERS[i * 7 % LETTERS.len()]))
            .collect()
    };
    match field {
        "url" if length > 22 => format!("https://example.com/{}", some(length - 20)),
        "url" if length >= 9 => format!("https://{}", some(length - 8)),
        // At most 64 characters may precede the @.
        "email" if length > 66 => format!("{}@{}", some(64), some(length - 65)),
        "email" if length >= 3 => format!("a@{}", some(length - 2)),
        _ => some(length),
    }
}

fn integer(bound: &Value) -> i64 {
    // Bounds are written as floating-point numbers, all of them whole and below 2^53.
    #[expect(clippy::cast_possible_truncation, reason = "whole and small")]
    let number = bound.as_f64().expect("a bound is a number") as i64;
    number
}

/// Returns the values at the bounds of a schema and the first values beyond them, each with the name of the bound.
fn around(field: &str, schema: &Value) -> Vec<(&'static str, Value, Option<Value>)> {
    let length = |bound: &Value| usize::try_from(bound.as_u64().expect("a length")).expect("small");
    let mut all = Vec::new();
    if let Some(bound) = schema.get("minimum").map(integer) {
        all.push(("min", json!(bound), Some(json!(bound - 1))));
    }
    if let Some(bound) = schema.get("maximum").map(integer) {
        all.push(("max", json!(bound), Some(json!(bound + 1))));
    }
    if let Some(bound) = schema.get("minLength").map(length) {
        all.push((
            "min",
            json!(text(field, bound)),
            Some(json!(text(field, bound - 1))),
        ));
    }
    if let Some(bound) = schema.get("maxLength").map(length) {
        all.push((
            "max",
            json!(text(field, bound)),
            Some(json!(text(field, bound + 1))),
        ));
    }
    all
}

fn is_more_than_bounds(field: &str, end: &str) -> bool {
    MORE_THAN_BOUNDS
        .iter()
        .any(|it| *it == field || *it == format!("{field}.{end}"))
}

fn fields(operation: &Operation) -> Vec<(&'static str, &'static Value)> {
    let schema = operation.body().expect("the operation has a body");
    let fields = schema["properties"].as_object().expect("a body has fields");
    fields
        .iter()
        .map(|(name, field)| (name.as_str(), resolve(field)))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn documented_bounds_of_bodies_are_enforced() {
    let sender = Sender::new().await;
    let mut bounds = 0;
    for operation in operations().into_iter().filter(|it| it.body().is_some()) {
        for (field, schema) in fields(&operation) {
            for (end, on, beyond) in around(field, schema) {
                bounds += 1;
                let mut body = sender.body(&operation);
                if let Some(beyond) = beyond {
                    body[field] = beyond;
                    sender.refused(&operation, &body, field).await;
                }
                if !is_more_than_bounds(field, end) {
                    body[field] = on;
                    sender.accepted(&operation, &body, field).await;
                }
            }
        }
    }
    assert!(bounds > 50, "{bounds}");
}

/// Returns values found by fuzzing for which the document and the server once disagreed, and similar ones.
fn odd_values() -> Vec<Value> {
    let mut odd = vec![
        json!(-1),
        json!(-99_999_999_999_i64),
        json!(0),
        json!(4_294_967_296_i64),
        json!([]),
        json!({}),
        json!(true),
    ];
    odd.extend(
        [
            "",
            " ",
            "\u{a0}",
            "\u{3000}\u{2003}",
            "\u{a0}D\u{e6}\u{81}*",
            "2\u{7}",
            "a\u{7f}",
            "\u{0}",
            "a\u{85}",
            "plain",
            "a@b",
            "a@b.example",
            "a@b..example",
            "a@.b",
            "a@b.",
            "a@@b",
            "@b",
            "a b@c",
            "a\u{2028}@c",
            "é@é",
        ]
        .map(|text| json!(text)),
    );
    for length in [64, 65, 66, 128, 129, 200, 201, 254, 255, 256, 257] {
        odd.push(json!("é".repeat(length)));
        odd.push(json!("x".repeat(length)));
        odd.push(json!(format!("{}@b", "é".repeat(length))));
    }
    odd
}

/// Returns whether the server checks more about a field than a schema can describe.
fn needs_more_than_the_schema(operation: &Operation, field: &str) -> bool {
    match field {
        // The server also checks how easy the password is to guess, and its length in bytes.
        "password" => operation.id == "register",
        // The server also checks whether the value is strong enough, is the current password, is a time zone, or is in
        // the future.
        "new_password" | "current_password" | "time_zone" | "expires_at" => true,
        _ => false,
    }
}

/// If a schema describes everything that the server checks about a field, the server accepts a value if and only if the
/// schema does.
#[tokio::test(flavor = "multi_thread")]
async fn document_and_server_agree_on_odd_values() {
    let sender = Sender::new().await;
    let (mut fitting, mut others) = (0, 0);
    for operation in operations().into_iter().filter(|it| it.body().is_some()) {
        let schema = operation.body().expect("a body");
        for (field, meta) in fields(&operation) {
            // The validator does not check formats.
            let formatted = matches!(meta["format"].as_str(), Some("uuid" | "date-time"));
            if formatted || needs_more_than_the_schema(&operation, field) {
                continue;
            }
            for value in odd_values() {
                let mut body = sender.body(&operation);
                body[field] = value;
                let answer = sender.send(&operation, &body).await;
                let shown = format!("{}: {} {}", operation.id, short(&body), answer.text);
                let rejected = matches!(answer.status, 400 | 422);
                if faults(schema, &body).is_empty() {
                    fitting += 1;
                    // Another field may be invalid, such as a weak password.
                    assert!(!rejected || !names(&answer, field), "fits: {shown}");
                } else {
                    others += 1;
                    assert!(rejected, "does not fit: {shown}");
                }
            }
        }
    }
    assert!(fitting > 100 && others > 500, "{fitting} {others}");
}

#[tokio::test(flavor = "multi_thread")]
async fn documented_optional_bodies_and_idempotency_keys_are_enforced() {
    let sender = Sender::new().await;
    let (mut optional, mut keys) = (0, 0);
    for operation in operations().into_iter().filter(|it| it.body().is_some()) {
        let id = if operation.path.contains("{plan_id}") {
            &sender.plan
        } else {
            &sender.key
        };
        let path = operation.path_with(id);
        let call = || {
            let token = if operation.id == "check" {
                &sender.service_token
            } else {
                &sender.token
            };
            sender
                .app
                .request(operation.method.clone(), &path)
                .bearer(token)
        };
        let without = call().send().await;
        let required = operation.meta["requestBody"]["required"] == true;
        assert_eq!(
            matches!(without.status, 400 | 422),
            required,
            "{}: {}",
            operation.id,
            without.text
        );
        optional += usize::from(!required);
        if !operation.parameters("header").contains(&"Idempotency-Key") {
            continue;
        }
        let parameters = operation.meta["parameters"].as_array().expect("parameters");
        let parameter = parameters
            .iter()
            .find(|it| it["name"] == "Idempotency-Key")
            .expect("the parameter exists");
        for key in ["", "a b", "é", "a\tb", &"k".repeat(255), &"k".repeat(256)] {
            let body = sender.body(&operation);
            let answer = call()
                .header("Idempotency-Key", key)
                .json(body)
                .send()
                .await;
            assert_eq!(
                matches!(answer.status, 400 | 422),
                !faults(&parameter["schema"], &json!(key)).is_empty(),
                "{} {key:?}: {}",
                operation.id,
                answer.text
            );
            keys += 1;
        }
    }
    assert!(optional >= 5 && keys >= 18, "{optional} {keys}");
}

#[tokio::test(flavor = "multi_thread")]
async fn documented_lengths_count_characters() {
    let sender = Sender::new().await;
    let mut tried = 0;
    for operation in operations().into_iter().filter(|it| it.body().is_some()) {
        for (field, schema) in fields(&operation) {
            if !["name", "tenant_name"].contains(&field) {
                continue;
            }
            tried += 1;
            let length = usize::try_from(schema["maxLength"].as_u64().expect("a bound")).unwrap();
            let mut body = sender.body(&operation);
            if operation.id == "register" {
                body["email"] = json!(format!("{}@example.com", uuid::Uuid::now_v7().simple()));
            }
            body[field] = json!("🦀".repeat(length));
            sender.accepted(&operation, &body, field).await;
            body[field] = json!("🦀".repeat(length + 1));
            sender.refused(&operation, &body, field).await;
        }
    }
    assert!(tried >= 7, "{tried}");
}

#[tokio::test(flavor = "multi_thread")]
async fn documented_types_required_and_nullable_fields_are_enforced() {
    let sender = Sender::new().await;
    for operation in operations().into_iter().filter(|it| it.body().is_some()) {
        let required = operation.body().expect("a body")["required"].clone();
        let required = |name: &str| {
            required
                .as_array()
                .is_some_and(|names| names.iter().any(|it| it == name))
        };
        for (field, schema) in fields(&operation) {
            let mut body = sender.body(&operation);
            body.as_object_mut().expect("an object").remove(field);
            if required(field) {
                sender.refused(&operation, &body, field).await;
            } else {
                sender.accepted(&operation, &body, field).await;
            }
            for wrong in [
                json!([]),
                json!({"a": 1}),
                json!(1.5),
                json!(-1),
                json!(true),
            ] {
                let fits = schema["type"] == "boolean" && wrong.is_boolean()
                    || schema["type"] == "array" && wrong.is_array();
                if !fits {
                    body[field] = wrong;
                    sender.refused(&operation, &body, field).await;
                }
            }
            // Text that PostgreSQL cannot store does not cause a server error.
            body[field] = json!("a\u{0}\u{feff}\u{202e}");
            let odd = sender.send(&operation, &body).await;
            assert!(odd.status < 500, "{}.{field}: {}", operation.id, odd.text);
            body[field] = Value::Null;
            if schema["nullable"] == true {
                sender.accepted(&operation, &body, field).await;
            } else {
                sender.refused(&operation, &body, field).await;
            }
        }
        let mut body = sender.body(&operation);
        body["surplus"] = json!(1);
        sender.refused(&operation, &body, "surplus").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn documented_bounds_of_parameters_are_enforced() {
    let sender = Sender::new().await;
    let mut bounds = 0;
    for operation in operations()
        .into_iter()
        .filter(|it| it.method == Method::GET)
    {
        let parameters = operation.meta["parameters"]
            .as_array()
            .into_iter()
            .flatten();
        for parameter in parameters.filter(|it| it["in"] == "query") {
            let name = parameter["name"].as_str().expect("a name");
            for (_, on, beyond) in around(name, resolve(&parameter["schema"])) {
                bounds += 1;
                let ask = async |value: &Value| {
                    let value = value
                        .as_str()
                        .map_or_else(|| value.to_string(), str::to_owned);
                    let path = operation.path.replace("{webhook_id}", &sender.webhook);
                    let path = format!("{path}?{name}={value}");
                    sender.app.get(&path).bearer(&sender.token).send().await
                };
                if let Some(beyond) = beyond {
                    let answer = ask(&beyond).await;
                    assert_eq!(
                        answer.status, 422,
                        "{}?{name}={beyond}: {}",
                        operation.id, answer.text
                    );
                    assert!(names(&answer, name), "{}: {}", operation.id, answer.text);
                }
                // A string of the maximum length is not a valid cursor.
                let answer = ask(&on).await;
                let expected = if name == "cursor" { 400 } else { 200 };
                assert_eq!(
                    answer.status, expected,
                    "{}?{name}={on}: {}",
                    operation.id, answer.text
                );
            }
        }
    }
    assert!(bounds >= 9, "{bounds}");
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_values_of_enum_parameters_are_rejected() {
    let sender = Sender::new().await;
    let mut tried = Vec::new();
    // Exclude `forward_auth`: its only parameter is `deny`, and the operation checks the service token first.
    let admin = |it: &Operation| it.path.starts_with("/admin/");
    for operation in operations().into_iter().filter(admin) {
        let parameters = operation.meta["parameters"].as_array();
        for parameter in parameters.into_iter().flatten() {
            let Some(values) = resolve(&parameter["schema"])["enum"].as_array() else {
                continue;
            };
            let name = parameter["name"].as_str().expect("a name");
            let values = values.iter().map(|it| it.as_str().expect("a string"));
            let values = values.collect::<Vec<_>>().join(", ");
            let id = match operation.path {
                path if path.contains("{webhook_id}") => &sender.webhook,
                _ => &sender.key,
            };
            for unknown in ["", "unknown"] {
                let path = format!("{}?{name}={unknown}", operation.path_with(id));
                let answer = sender.app.get(&path).bearer(&sender.token).send().await;
                assert_eq!(answer.status, 422, "{path}: {}", answer.text);
                let message = format!("must be one of {values}");
                assert_eq!(
                    answer.body["errors"],
                    json!([{"field": name, "message": message}]),
                    "{path}"
                );
            }
            tried.push((operation.id, name));
        }
    }
    assert!(tried.contains(&("list_api_keys", "status")), "{tried:?}");
    assert!(tried.len() >= 10, "{tried:?}");
}

/// Messages about parameters state the allowed values in terms of the API.
#[tokio::test(flavor = "multi_thread")]
async fn rejected_parameters_get_plain_messages() {
    let sender = Sender::new().await;
    for (query, field, message) in [
        ("api-keys?limit=0", "limit", "must be between 1 and 100"),
        ("api-keys?limit=many", "limit", "must be between 1 and 100"),
        (
            "api-keys?is_active=yes",
            "is_active",
            "must be true or false",
        ),
        ("api-keys?plan_id=7", "plan_id", "must be a UUID"),
        (
            "api-keys?status=disabled",
            "status",
            "must be one of active, expired, inactive",
        ),
        (
            "plans?sort=size",
            "sort",
            "must be one of -created_at, created_at, name, -name",
        ),
        (
            "audit?target_type=plans",
            "target_type",
            "must be one of plan, api_key, service_token, user, session, tenant, subscription, webhook",
        ),
    ] {
        let path = format!("/admin/{query}");
        let answer = sender.app.get(&path).bearer(&sender.token).send().await;
        assert_eq!(answer.status, 422, "{query}: {}", answer.text);
        assert_eq!(
            answer.body["errors"],
            json!([{"field": field, "message": message}]),
            "{query}"
        );
    }
    let long = format!("/admin/api-keys?search={}", "x".repeat(201));
    let answer = sender.app.get(&long).bearer(&sender.token).send().await;
    assert_eq!(
        answer.body["errors"],
        json!([{"field": "search", "message": "must be at most 200 characters"}])
    );
}
