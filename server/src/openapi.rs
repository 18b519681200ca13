//! The OpenAPI document: what poem-openapi generates from the handlers, completed by [`PASSES`].
//!
//! Extractors and the edge produce errors too, so error responses are derived here from what an operation takes: a
//! caller adds 401, a role 403, a body 400, 413, 415 and 422, an ID in the path 404. The test suite validates every response it
//! receives against the document, so an undocumented status fails a test.

use std::collections::HashMap;

use poem::{endpoint::BoxEndpoint, http::Method};
use poem_openapi::{
    OpenApi, OpenApiService,
    registry::{MetaApi, Registry},
};
use quota_common::ProblemCode;
use serde_json::{Map, Value, json};

use crate::{
    api::{
        allow::Methods,
        api_key::ApiKeyApi,
        audit::AuditApi,
        auth::AuthApi,
        decision::{DecisionApi, Streams},
        health::HealthApi,
        key_limits::KeyLimitsApi,
        limit::LimitApi,
        plan::PlanApi,
        problem,
        service_token::ServiceTokenApi,
        stats::StatsApi,
        usage::UsageApi,
    },
    state::AppState,
};

/// All operations, in no particular order.
pub type Apis = (
    AuthApi,
    PlanApi,
    ApiKeyApi,
    KeyLimitsApi,
    ServiceTokenApi,
    StatsApi,
    UsageApi,
    DecisionApi,
    AuditApi,
    LimitApi,
    HealthApi,
);

const DESCRIPTION: &str = "\
Self-hosted API keys, plans, rate limits and quotas.\n\n\
Requests and responses are JSON. Timestamps are RFC 3339 in UTC. Lists are paginated: pass `limit` and `cursor`; each \
page returns `{items, next_cursor, total}`. Errors are `application/problem+json` (RFC 9457); each `type` links to a \
page that explains the error. Every response includes `X-Request-Id`.\n\n\
Unknown fields are rejected. Requests that create or rotate something accept an `Idempotency-Key`.";

/// The order in which the document lists the groups of operations.
const TAGS: &[&str] = &[
    "Rate limiting",
    "API keys",
    "Plans",
    "Service tokens",
    "Usage",
    "Audit",
    "Auth",
    "Health",
];

pub fn service(state: &AppState) -> OpenApiService<Apis, ()> {
    let state = || state.clone();
    build((
        AuthApi { state: state() },
        PlanApi { state: state() },
        ApiKeyApi { state: state() },
        KeyLimitsApi { state: state() },
        ServiceTokenApi { state: state() },
        StatsApi { state: state() },
        UsageApi { state: state() },
        DecisionApi {
            state: state(),
            streams: Streams::default(),
        },
        AuditApi { state: state() },
        LimitApi,
        HealthApi { state: state() },
    ))
}

fn build<T: OpenApi>(apis: T) -> OpenApiService<T, ()> {
    OpenApiService::new(apis, "Quota", env!("CARGO_PKG_VERSION")).description(DESCRIPTION)
}

/// Returns what poem-openapi generates by itself.
fn generated<T: OpenApi>(service: &OpenApiService<T, ()>) -> Value {
    serde_json::from_str(&service.spec()).unwrap_or_default()
}

/// Returns the document. URLs in it are relative, so it is the same on every server.
pub fn document<T: OpenApi>(service: &OpenApiService<T, ()>) -> String {
    let mut document = generated(service);
    for pass in PASSES {
        pass(&mut document);
    }
    let mut text = serde_json::to_string_pretty(&document).unwrap_or_default();
    text.push('\n');
    text
}

/// Returns the methods that each path accepts.
pub fn methods<T: OpenApi>(service: &OpenApiService<T, ()>) -> Methods {
    Methods::of(&generated(service))
}

/// The operations without a server behind them.
struct Described;

impl OpenApi for Described {
    fn meta() -> Vec<MetaApi> {
        Apis::meta()
    }

    fn register(registry: &mut Registry) {
        Apis::register(registry);
    }

    fn add_routes(self, _: &mut HashMap<String, HashMap<Method, BoxEndpoint<'static>>>) {}
}

/// Returns the document without needing a server, for `quota openapi`.
pub fn text() -> String {
    document(&build(Described))
}

/// The passes that complete the document, in order. Each depends only on those before it.
const PASSES: &[fn(&mut Value)] = &[
    set_servers,
    order_tags,
    describe_empty_responses,
    add_error_responses,
    empty_forward_auth_errors,
    add_response_headers,
    sort_responses,
    add_problem_schemas,
    close_request_bodies,
    describe_optional_bodies,
    describe_idempotency_keys,
];

/// One operation of the document.
struct Operation<'a> {
    path: &'a str,
    value: &'a mut Value,
}

impl Operation<'_> {
    fn id(&self) -> &str {
        self.value["operationId"].as_str().unwrap_or_default()
    }

    fn has_parameter(&self, places: &[&str]) -> bool {
        let parameters = self.value["parameters"].as_array();
        parameters.is_some_and(|all| {
            all.iter()
                .any(|it| places.iter().any(|place| it["in"] == *place))
        })
    }

    fn responses(&mut self) -> Option<&mut Map<String, Value>> {
        self.value["responses"].as_object_mut()
    }
}

fn for_each_operation(document: &mut Value, mut visit: impl FnMut(Operation<'_>)) {
    let paths = document["paths"].as_object_mut().into_iter().flatten();
    for (path, operations) in paths {
        for (_, value) in operations.as_object_mut().into_iter().flatten() {
            visit(Operation { path, value });
        }
    }
}

/// The server is the one that the document was loaded from.
fn set_servers(document: &mut Value) {
    document["servers"] = json!([{"url": "/"}]);
}

/// poem-openapi sorts tags by name.
fn order_tags(document: &mut Value) {
    if let Some(tags) = document["tags"].as_array_mut() {
        tags.sort_by_key(|tag| TAGS.iter().position(|name| tag["name"] == *name));
    }
}

/// Says what a 204 means.
fn describe_empty_responses(document: &mut Value) {
    for_each_operation(document, |mut operation| {
        let description = match operation.id() {
            "logout" => "Signed out",
            "change_password" => "Password changed",
            "end_session" => "Session revoked",
            _ => "Deleted",
        };
        if let Some(empty) = operation.responses().and_then(|all| all.get_mut("204")) {
            empty["description"] = json!(description);
        }
    });
}

const BY_ROLE: &str = "Your role does not allow this action.";
const BY_COOKIE: &str = "Cookie authentication is only accepted from this server's own pages.";
const IN_PROGRESS: &str = "A request with this `Idempotency-Key` is still in progress.";
const BY_ROLE_OR_LIMIT: &str = "Your role does not allow this action, or your organization has reached a limit set by the operator.";
const NO_REFRESH_TOKEN: &str =
    "No refresh token was sent, or it is invalid, expired or already used.";

/// Errors of single operations, beyond those that follow from what an operation takes.
const OWN_ERRORS: &[(&str, &[(ProblemCode, &str)])] = {
    use ProblemCode as P;
    &[
        (
            "register",
            &[
                (
                    P::RegistrationClosed,
                    "Registration is closed, or cookies were requested from a page of another origin.",
                ),
                (P::EmailTaken, "An account with this email already exists."),
            ],
        ),
        (
            "login",
            &[
                (P::WrongCredentials, "Incorrect email or password."),
                (P::Forbidden, BY_COOKIE),
            ],
        ),
        (
            "refresh",
            &[
                (P::Unauthorized, NO_REFRESH_TOKEN),
                (P::Forbidden, BY_COOKIE),
            ],
        ),
        (
            "logout",
            &[
                (P::Unauthorized, NO_REFRESH_TOKEN),
                (P::Forbidden, BY_COOKIE),
            ],
        ),
        (
            "create_plan",
            &[
                (P::Forbidden, BY_ROLE_OR_LIMIT),
                (
                    P::NameTaken,
                    "A plan with this name already exists, or a request with this `Idempotency-Key` is still in progress.",
                ),
            ],
        ),
        (
            "update_plan",
            &[(P::NameTaken, "A plan with this name already exists.")],
        ),
        ("delete_plan", &[(P::PlanInUse, "The plan still has keys.")]),
        (
            "create_api_key",
            &[
                (P::Forbidden, BY_ROLE_OR_LIMIT),
                (P::NotFound, "The plan was not found in your organization."),
                (P::RequestInProgress, IN_PROGRESS),
            ],
        ),
        (
            "update_api_key",
            &[(
                P::NotFound,
                "The key or the plan was not found in your organization.",
            )],
        ),
        (
            "rotate_api_key",
            &[(
                P::PreviousKeyActive,
                "The grace period of an earlier rotation has not ended and `replace_previous` is not true, or a request with this `Idempotency-Key` is still in progress.",
            )],
        ),
        (
            "create_service_token",
            &[
                (P::Forbidden, BY_ROLE_OR_LIMIT),
                (P::RequestInProgress, IN_PROGRESS),
            ],
        ),
        ("update_me", &[(P::Forbidden, BY_ROLE)]),
        ("change_password", &[(P::Forbidden, BY_COOKIE)]),
        ("end_session", &[(P::Forbidden, BY_COOKIE)]),
        (
            "echo",
            &[
                (
                    P::Malformed,
                    "Malformed request, such as two different keys.",
                ),
                (
                    P::QuotaExceeded,
                    "Rate limit or quota exceeded, or limits can't be checked right now. Retry after `Retry-After` seconds.",
                ),
            ],
        ),
    ]
};

/// What an error status means if the operation says nothing more specific.
const ERRORS: &[(ProblemCode, &str)] = {
    use ProblemCode as P;
    &[
        (P::Malformed, "Malformed request. No changes were made."),
        (
            P::Unauthorized,
            "Missing or invalid credentials. Nothing was charged.",
        ),
        (P::Forbidden, BY_ROLE),
        (P::NotFound, "Not found, or not in your organization."),
        (
            P::RequestTimeout,
            "The request body was not received in time.",
        ),
        (P::ContentTooLarge, "The request body is too large."),
        (
            P::UnsupportedMediaType,
            "The request body is not `application/json`.",
        ),
        (P::Invalid, "Validation failed; see `errors`."),
        (
            P::QuotaExceeded,
            "Rate limit exceeded. Retry after `Retry-After` seconds.",
        ),
        (
            P::TooManyRequests,
            "Rate limit exceeded. Retry after `Retry-After` seconds.",
        ),
        (P::Internal, "Internal server error."),
        (
            P::Unavailable,
            "A dependency is unavailable. Retry after `Retry-After` seconds.",
        ),
    ]
};

/// The errors that follow from what an operation takes.
fn derived_errors(operation: &Operation<'_>) -> Vec<ProblemCode> {
    use ProblemCode as P;
    if operation.id() == "live" {
        return vec![P::Internal];
    }
    let mut errors = vec![P::Internal, P::Unavailable];
    if operation.value.get("security").is_some() {
        errors.extend([P::Malformed, P::Unauthorized]);
    }
    if operation.path.starts_with("/admin") {
        errors.push(P::Forbidden);
    }
    if operation.path.starts_with("/auth") || operation.path.starts_with("/admin") {
        errors.push(P::TooManyRequests);
    }
    if operation.value.get("requestBody").is_some() {
        errors.extend([
            P::Malformed,
            P::RequestTimeout,
            P::ContentTooLarge,
            P::UnsupportedMediaType,
            P::Invalid,
        ]);
    }
    if operation.has_parameter(&["path"]) {
        errors.push(P::NotFound);
    }
    if operation.has_parameter(&["query", "header"]) {
        errors.extend([P::Malformed, P::Invalid]);
    }
    if operation.id() == "echo" {
        errors.push(P::QuotaExceeded);
    }
    errors
}

fn add_error_responses(document: &mut Value) {
    for_each_operation(document, |mut operation| {
        let own = OWN_ERRORS.iter().find(|(id, _)| *id == operation.id());
        let own = own.map(|(_, errors)| *errors).unwrap_or_default();
        let derived = derived_errors(&operation);
        let derived = derived.into_iter().map(|code| {
            let general = ERRORS.iter().find(|(it, _)| *it == code);
            (code, general.map_or(code.title(), |(_, text)| *text))
        });
        let all = own.iter().copied().chain(derived).collect::<Vec<_>>();
        if let Some(responses) = operation.responses() {
            for (code, description) in all {
                responses
                    .entry(code.status().to_string())
                    .or_insert_with(|| error_response(code, description));
            }
        }
    });
}

fn error_response(code: ProblemCode, description: &str) -> Value {
    json!({
        "description": description,
        "content": {
            "application/problem+json": {
                "schema": {"$ref": "#/components/schemas/Problem"},
                "example": problem::example(code, "https://quota.example.com"),
            }
        },
    })
}

/// Gateways act on the status and headers of forward-auth. Its 401 and 503 have no body.
fn empty_forward_auth_errors(document: &mut Value) {
    for_each_operation(document, |mut operation| {
        if operation.id() != "forward_auth" {
            return;
        }
        for (status, response) in operation.responses().into_iter().flatten() {
            if let ("401" | "503", Some(response)) = (status.as_str(), response.as_object_mut()) {
                response.remove("content");
            }
        }
    });
}

fn add_response_headers(document: &mut Value) {
    for_each_operation(document, |mut operation| {
        let is_for_gateways = operation.id() == "forward_auth";
        let is_limited = is_for_gateways || operation.id() == "echo";
        for (status, response) in operation.responses().into_iter().flatten() {
            let mut headers = response["headers"].as_object().cloned().unwrap_or_default();
            if is_limited && matches!(status.as_str(), "200" | "403" | "429") {
                headers.extend(limit_headers());
            }
            if is_for_gateways {
                headers.insert("X-Quota-Decision".to_owned(), decision_header());
            }
            headers.extend(headers_of_status(status));
            response["headers"] = Value::Object(headers);
        }
    });
}

fn headers_of_status(status: &str) -> Map<String, Value> {
    let mut headers = Map::new();
    if matches!(status, "429" | "503") {
        headers.insert("Retry-After".into(), json!({
            "description": "Seconds until a retry can succeed, rounded up, at least 1. Absent if the request can never be allowed.",
            "schema": {"type": "integer", "minimum": 1},
        }));
    }
    if status == "401" {
        headers.insert("WWW-Authenticate".into(), json!({
            "description": "`Bearer realm=\"quota\"`, with `error=\"invalid_token\"` if credentials were sent.",
            "schema": {"type": "string"},
        }));
    }
    headers.insert("X-Request-Id".into(), json!({
        "description": "ID of the request: the one that was sent, if it is valid, otherwise a new one.",
        "schema": {"type": "string", "maxLength": 128},
    }));
    headers
}

fn decision_header() -> Value {
    json!({
        "description": "Forward a request only if the status is 200 and this is `allowed`.",
        "schema": {
            "type": "string",
            "enum": ["allowed", "limited", "unauthorized", "payment_required", "unavailable"],
        },
    })
}

fn limit_headers() -> Map<String, Value> {
    let number = |description: &str| json!({"description": description, "schema": {"type": "integer", "minimum": 0}});
    let text = |description: &str, example: &str| json!({"description": description, "schema": {"type": "string"}, "example": example});
    Map::from_iter([
        (
            "X-RateLimit-Limit".to_owned(),
            number("Maximum burst: requests an idle key may send at once."),
        ),
        (
            "X-RateLimit-Remaining".to_owned(),
            number("Requests left in the burst."),
        ),
        (
            "X-RateLimit-Reset".to_owned(),
            number("Unix time, in seconds, at which the full burst is available again."),
        ),
        (
            "RateLimit-Policy".to_owned(),
            text(
                "The key's limits: `q` requests per `w` seconds (draft-ietf-httpapi-ratelimit-headers-11).",
                "\"rpm\";q=600;w=60, \"daily\";q=50000;w=86400, \"monthly\";q=1000000",
            ),
        ),
        (
            "RateLimit".to_owned(),
            text(
                "The limit closest to exhaustion: `r` requests left, fully available again in `t` seconds.",
                "\"rpm\";r=412;t=23",
            ),
        ),
        (
            "X-Quota-Degraded".to_owned(),
            text(
                "Only sent while Redis is unreachable and this replica decides without it.",
                "redis-away",
            ),
        ),
    ])
}

fn sort_responses(document: &mut Value) {
    for_each_operation(document, |mut operation| {
        if let Some(responses) = operation.responses() {
            let sorted = std::mem::take(responses)
                .into_iter()
                .collect::<std::collections::BTreeMap<_, _>>();
            *responses = sorted.into_iter().collect();
        }
    });
}

/// Adds the schemas of errors, which no handler names.
fn add_problem_schemas(document: &mut Value) {
    use poem_openapi::types::Type;
    let mut registry = Registry::new();
    quota_common::Problem::register(&mut registry);
    for name in ["Problem", "FieldError", "PolicyName"] {
        let schema = registry.schemas.get(name).map(serde_json::to_value);
        if let Some(Ok(schema)) = schema {
            document["components"]["schemas"][name] = schema;
        }
    }
}

/// Request bodies reject unknown fields, which poem-openapi does not write down.
fn close_request_bodies(document: &mut Value) {
    let mut bodies = Vec::new();
    for_each_operation(document, |operation| {
        let schema = &operation.value["requestBody"]["content"]["application/json"]["schema"];
        let name = schema["$ref"].as_str().and_then(|it| it.rsplit('/').next());
        bodies.extend(name.map(str::to_owned));
    });
    for name in bodies {
        document["components"]["schemas"][name]["additionalProperties"] = json!(false);
    }
}

/// A body without required fields may be omitted.
fn describe_optional_bodies(document: &mut Value) {
    let schemas = document["components"]["schemas"].take();
    for_each_operation(document, |operation| {
        let schema = &operation.value["requestBody"]["content"]["application/json"]["schema"];
        let name = schema["$ref"].as_str().and_then(|it| it.rsplit('/').next());
        let is_optional = name.is_some_and(|name| {
            let required = schemas[name]["required"].as_array();
            required.is_none_or(Vec::is_empty)
        });
        if is_optional {
            operation.value["requestBody"]["required"] = json!(false);
        }
    });
    document["components"]["schemas"] = schemas;
}

/// The bounds of `Idempotency-Key`, which `idempotency` checks.
fn describe_idempotency_keys(document: &mut Value) {
    for_each_operation(document, |operation| {
        let parameters = operation.value.get_mut("parameters");
        for parameter in parameters
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            if parameter["name"] == "Idempotency-Key" {
                parameter["schema"] = json!({
                    "type": "string",
                    "minLength": 1,
                    "maxLength": 255,
                    "pattern": "^[ -~]+$",
                });
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_with_errors_of_its_own_exists() {
        let document: Value = serde_json::from_str(&text()).unwrap();
        let mut document = document;
        let mut ids = Vec::new();
        for_each_operation(&mut document, |it| ids.push(it.id().to_owned()));
        assert!(ids.len() > 25, "{ids:?}");
        for (id, _) in OWN_ERRORS {
            assert!(ids.iter().any(|it| it == id), "{id}");
        }
    }
}
