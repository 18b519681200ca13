//! The OpenAPI document: what poem-openapi generates from the handlers, completed by [`PASSES`].
//!
//! Extractors and middleware produce errors too, so error responses are derived from what an operation takes: a caller
//! adds 401, a role 403, a body 400, 413, 415 and 422, an ID in the path 404. Tests validate every response they receive
//! against the document, so an undocumented status fails a test.

mod errors;
mod headers;
mod operation;

use std::collections::HashMap;

use poem::{endpoint::BoxEndpoint, http::Method};
use poem_openapi::{
    OpenApi, OpenApiService,
    registry::{MetaApi, Registry},
};
use serde_json::{Value, json};

use self::operation::for_each_operation;
use crate::{
    api::{
        allow::Methods,
        api_key::ApiKeyApi,
        audit::AuditApi,
        auth::AuthApi,
        billing::BillingApi,
        decision::{DecisionApi, Streams},
        health::HealthApi,
        key_limits::KeyLimitsApi,
        limit::LimitApi,
        plan::PlanApi,
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
    BillingApi,
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
    "Billing",
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
        BillingApi { state: state() },
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

/// The operations, without handlers.
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

/// Returns the document without a running server, for `quota openapi`.
pub fn text() -> String {
    document(&build(Described))
}

/// The passes that complete the document, in order. Each depends only on those before it.
const PASSES: &[fn(&mut Value)] = &[
    set_servers,
    order_tags,
    describe_empty_responses,
    errors::add_error_responses,
    errors::empty_forward_auth_errors,
    headers::add_response_headers,
    sort_responses,
    add_problem_schemas,
    close_request_bodies,
    describe_optional_bodies,
    describe_idempotency_keys,
];

/// URLs are relative to the server that the document was loaded from.
fn set_servers(document: &mut Value) {
    document["servers"] = json!([{"url": "/"}]);
}

/// poem-openapi sorts tags by name.
fn order_tags(document: &mut Value) {
    if let Some(tags) = document["tags"].as_array_mut() {
        tags.sort_by_key(|tag| TAGS.iter().position(|name| tag["name"] == *name));
    }
}

/// Describes what a 204 means for each operation.
fn describe_empty_responses(document: &mut Value) {
    for_each_operation(document, |mut operation| {
        let description = match operation.id() {
            "logout" => "Signed out",
            "change_password" => "Password changed",
            "end_session" => "Session revoked",
            "receive_stripe_event" => "Stored",
            _ => "Deleted",
        };
        if let Some(empty) = operation.responses().and_then(|all| all.get_mut("204")) {
            empty["description"] = json!(description);
        }
    });
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

/// Request bodies reject unknown fields, which poem-openapi does not state.
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
