//! The document: what poem-openapi knows of the operations, and what holds for all of them by rule.
//!
//! Errors come from extractors and the edge as much as from handlers, so their answers are added here, from
//! what an operation takes: a caller brings 401, a body 400, 413, 415 and 422, an id in the path 404. That
//! no operation ever answers what is not written here is proved by the tests, which hold every answer of the
//! test suite against the document.

use std::collections::HashMap;

use poem::{endpoint::BoxEndpoint, http::Method};
use poem_openapi::{
    OpenApi, OpenApiService,
    registry::{MetaApi, Registry},
};
use serde_json::{Map, Value, json};

use crate::{
    api::{
        api_key::ApiKeyApi, audit::AuditApi, auth::AuthApi, health::HealthApi, limit::LimitApi,
        plan::PlanApi, service_token::ServiceTokenApi,
    },
    state::AppState,
};

/// All operations.
pub type Apis = (
    AuthApi,
    PlanApi,
    ApiKeyApi,
    ServiceTokenApi,
    AuditApi,
    LimitApi,
    HealthApi,
);

const DESCRIPTION: &str = "\
Quota gives an API its keys, plans, rate limits and quotas, on your own machines.\n\n\
JSON in and out. Times are RFC 3339 in UTC. Lists are paginated: `?limit=` and `?cursor=` answer \
`{items, next_cursor, total}`. Errors are `application/problem+json` (RFC 9457); their `type` leads to a page \
that explains them. Every answer carries `X-Request-Id`.\n\n\
Unknown fields are refused. The POSTs that make something take an `Idempotency-Key`.";

pub fn service(state: &AppState) -> OpenApiService<Apis, ()> {
    let state = || state.clone();
    build((
        AuthApi { state: state() },
        PlanApi { state: state() },
        ApiKeyApi { state: state() },
        ServiceTokenApi { state: state() },
        AuditApi { state: state() },
        LimitApi,
        HealthApi { state: state() },
    ))
}

fn build<T: OpenApi>(apis: T) -> OpenApiService<T, ()> {
    OpenApiService::new(apis, "Quota", env!("CARGO_PKG_VERSION")).description(DESCRIPTION)
}

/// The document, for any server: addresses in it are relative.
pub fn document<T: OpenApi>(service: &OpenApiService<T, ()>) -> String {
    let mut document: Value = serde_json::from_str(&service.spec()).unwrap_or_default();
    complete(&mut document);
    let mut text = serde_json::to_string_pretty(&document).unwrap_or_default();
    text.push('\n');
    text
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

/// The document without a server, for `quota openapi`.
pub fn text() -> String {
    document(&build(Described))
}

/// What an operation may answer beside its success and what follows from its parts.
const MORE: &[(&str, &[u16])] = &[
    ("register", &[403, 409]),
    ("login", &[401, 403]),
    ("refresh", &[401, 403]),
    ("logout", &[401, 403]),
    ("create_plan", &[403, 409]),
    ("update_plan", &[403, 409]),
    ("delete_plan", &[403, 409]),
    ("create_api_key", &[403, 404, 409]),
    ("update_api_key", &[403]),
    ("delete_api_key", &[403]),
    ("rotate_api_key", &[403]),
    ("create_service_token", &[403, 409]),
    ("delete_service_token", &[403]),
    ("update_me", &[403]),
    ("change_password", &[403]),
    ("end_session", &[403]),
    ("echo", &[400]),
    ("check", &[]),
    ("forward_auth", &[]),
    ("ready", &[]),
];

const DESCRIPTIONS: &[(u16, &str)] = &[
    (
        400,
        "The request could not be understood. Nothing was done.",
    ),
    (
        401,
        "No credential was sent, or it opens nothing. Nothing was charged.",
    ),
    (403, "The caller is known and may not do this."),
    (404, "There is no such thing, or it is not the caller's."),
    (408, "The request took too long to arrive."),
    (409, "It conflicts with what is there."),
    (413, "The body is larger than the server takes."),
    (415, "The body is not JSON."),
    (
        422,
        "Some fields are not valid; `errors` names them. Nothing was done.",
    ),
    (
        429,
        "A limit is reached; `Retry-After` tells when to come back. Nothing was charged.",
    ),
    (500, "Something went wrong in the server."),
    (
        503,
        "Something that the server depends on does not answer; `Retry-After` tells when to try again.",
    ),
];

fn example(status: u16) -> Value {
    use quota_common::ProblemCode as P;
    let code = P::ALL
        .iter()
        .find(|code| code.status() == status)
        .copied()
        .unwrap_or(P::Internal);
    let mut example = json!({
        "type": code.type_uri("https://quota.example.com"),
        "title": code.title(),
        "status": status,
        "detail": code.explanation().lines().next().unwrap_or_default().trim(),
        "request_id": "019ab4e1-7c00-7000-8000-000000000001",
    });
    match code {
        P::Invalid => {
            example["errors"] = json!([{"field": "default_rpm", "message": "lower than 1"}]);
        }
        P::QuotaExceeded => example["violated-policies"] = json!(["rpm"]),
        _ => {}
    }
    example
}

fn error_answer(status: u16) -> Value {
    let description = DESCRIPTIONS
        .iter()
        .find(|(it, _)| *it == status)
        .map_or("", |(_, text)| text);
    let mut answer = json!({
        "description": description,
        "content": {
            "application/problem+json": {
                "schema": {"$ref": "#/components/schemas/Problem"},
                "example": example(status),
            }
        },
    });
    let headers = error_fields(status);
    if !headers.is_empty() {
        answer["headers"] = Value::Object(headers);
    }
    answer
}

/// The fields that an answer of this status carries.
fn error_fields(status: u16) -> Map<String, Value> {
    let mut headers = Map::new();
    if matches!(status, 429 | 503) {
        headers.insert("Retry-After".into(), json!({
            "description": "Whole seconds after which to try again: rounded up, at least 1. Absent when the request can never be admitted.",
            "schema": {"type": "integer", "minimum": 1},
        }));
    }
    if status == 401 {
        headers.insert("WWW-Authenticate".into(), json!({
            "description": "`Bearer realm=\"quota\"`, with `error=\"invalid_token\"` when a credential was sent.",
            "schema": {"type": "string"},
        }));
    }
    headers
}

fn limit_fields() -> Map<String, Value> {
    let number = |description: &str| json!({"description": description, "schema": {"type": "integer", "minimum": 0}});
    let text = |description: &str, example: &str| json!({"description": description, "schema": {"type": "string"}, "example": example});
    Map::from_iter([
        (
            "X-RateLimit-Limit".to_owned(),
            number("How many requests a rested key may send at once: the burst."),
        ),
        (
            "X-RateLimit-Remaining".to_owned(),
            number("How many of them are left."),
        ),
        (
            "X-RateLimit-Reset".to_owned(),
            number("Unix seconds at which all of them are there again."),
        ),
        (
            "RateLimit-Policy".to_owned(),
            text(
                "The key's policies: `q` requests in `w` seconds (draft-ietf-httpapi-ratelimit-headers-11).",
                "\"rpm\";q=600;w=60, \"daily\";q=50000;w=86400, \"monthly\";q=1000000",
            ),
        ),
        (
            "RateLimit".to_owned(),
            text(
                "The policy nearest exhaustion: `r` are left, all are back in `t` seconds.",
                "\"rpm\";r=412;t=23",
            ),
        ),
        (
            "X-Quota-Degraded".to_owned(),
            text(
                "Only while Redis is away and this replica decides by itself.",
                "redis-away",
            ),
        ),
    ])
}

/// Neither control characters nor nothing but white space: the rule of names.
const NAME: &str = r"^[^\u0000-\u001F\u007F-\u009F]*[^\u0000-\u0020\u007F-\u00A0\u1680\u2000-\u200A\u2028\u2029\u202F\u205F\u3000][^\u0000-\u001F\u007F-\u009F]*$";

/// What lengths do not say about fields of request bodies. The server's own rules are in `quota_common::bounds`.
const PATTERNS: &[(&str, &str, &str)] = &[
    ("CreatePlan", "name", NAME),
    ("UpdatePlan", "name", NAME),
    ("CreateApiKey", "name", NAME),
    ("UpdateApiKey", "name", NAME),
    ("CreateServiceToken", "name", NAME),
    ("UpdateMe", "name", NAME),
    ("UpdateMe", "tenant_name", NAME),
    ("Register", "tenant_name", NAME),
    (
        "Register",
        "email",
        r"^[^@\u0000-\u0020\u007F-\u00A0\u1680\u2000-\u200A\u2028\u2029\u202F\u205F\u3000]{1,64}@[^@.\u0000-\u0020\u007F-\u00A0\u1680\u2000-\u200A\u2028\u2029\u202F\u205F\u3000]+(\.[^@.\u0000-\u0020\u007F-\u00A0\u1680\u2000-\u200A\u2028\u2029\u202F\u205F\u3000]+)*$",
    ),
    ("Login", "email", r"^[^\u0000]*$"),
    ("Check", "endpoint", r"^[^\u0000-\u001F\u007F-\u009F]*$"),
];

/// Describes what the server accepts of a request beyond the lengths that poem-openapi knows.
fn describe_requests(document: &mut Value) {
    for (schema, field, pattern) in PATTERNS {
        document["components"]["schemas"][*schema]["properties"][*field]["pattern"] =
            json!(pattern);
    }
    let optional = |document: &Value, body: &Value| {
        let reference = body["content"]["application/json"]["schema"]["$ref"].as_str();
        let schema = reference.and_then(|it| document.pointer(it.strip_prefix('#')?));
        schema.is_some_and(|it| it["required"].as_array().is_none_or(Vec::is_empty))
    };
    let mut paths = std::mem::take(&mut document["paths"]);
    let operations = paths
        .as_object_mut()
        .into_iter()
        .flat_map(Map::values_mut)
        .filter_map(Value::as_object_mut)
        .flat_map(Map::values_mut);
    for operation in operations {
        // A body that may be `{}` may be left out.
        if operation.get("requestBody").is_some() && optional(document, &operation["requestBody"]) {
            operation["requestBody"]["required"] = json!(false);
        }
        let parameters = operation
            .get_mut("parameters")
            .and_then(Value::as_array_mut);
        for parameter in parameters.into_iter().flatten() {
            if parameter["name"] == "Idempotency-Key" {
                parameter["schema"] = json!({
                    "type": "string",
                    "minLength": 1,
                    "maxLength": 255,
                    "pattern": "^[ -~]+$",
                });
            }
        }
    }
    document["paths"] = paths;
}

fn decision_field() -> Value {
    json!({
        "description": "Admit a request only on status 200 and `allowed`.",
        "schema": {
            "type": "string",
            "enum": ["allowed", "limited", "unauthorized", "payment_required", "unavailable"],
        },
    })
}

fn complete(document: &mut Value) {
    // Every operation answers from where the document came from.
    document["servers"] = json!([{"url": "/"}]);
    let limited = ["echo", "forward_auth"];
    if let Some(paths) = document["paths"].as_object_mut() {
        for (path, operations) in paths {
            let Some(operations) = operations.as_object_mut() else {
                continue;
            };
            for operation in operations.values_mut() {
                let id = operation["operationId"]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned();
                let base = MORE.iter().map(|(name, _)| *name).find(|name| id == *name);
                let mut statuses = vec![500, 503];
                if operation.get("security").is_some() {
                    statuses.extend([400, 401]);
                }
                if path.starts_with("/auth") || path.starts_with("/admin") {
                    statuses.push(429);
                }
                if operation.get("requestBody").is_some() {
                    statuses.extend([400, 408, 413, 415, 422]);
                }
                let parameters = operation["parameters"]
                    .as_array()
                    .cloned()
                    .unwrap_or_default();
                if parameters.iter().any(|it| it["in"] == "path") {
                    statuses.push(404);
                }
                if parameters
                    .iter()
                    .any(|it| it["in"] == "query" || it["in"] == "header")
                {
                    statuses.extend([400, 422]);
                }
                if base == Some("echo") {
                    statuses.push(429);
                }
                statuses.extend(
                    MORE.iter()
                        .filter(|(name, _)| Some(*name) == base)
                        .flat_map(|(_, more)| *more),
                );
                if id == "live" {
                    statuses.retain(|status| *status == 500);
                }
                let Some(answers) = operation["responses"].as_object_mut() else {
                    continue;
                };
                for status in statuses {
                    answers
                        .entry(status.to_string())
                        .or_insert_with(|| error_answer(status));
                }
                if base.is_some_and(|base| limited.contains(&base)) {
                    for status in ["200", "403", "429"] {
                        if let Some(answer) = answers.get_mut(status) {
                            let mut headers =
                                answer["headers"].as_object().cloned().unwrap_or_default();
                            headers.extend(limit_fields());
                            answer["headers"] = Value::Object(headers);
                        }
                    }
                }
                for (status, answer) in answers.iter_mut() {
                    let mut headers = answer["headers"].as_object().cloned().unwrap_or_default();
                    if base == Some("forward_auth") {
                        headers.insert("X-Quota-Decision".into(), decision_field());
                        if let ("401" | "503", Some(answer)) =
                            (status.as_str(), answer.as_object_mut())
                        {
                            answer.remove("content");
                        }
                    }
                    headers.extend(error_fields(status.parse().unwrap_or_default()));
                    headers.insert("X-Request-Id".into(), json!({
                        "description": "The id of the request: the incoming one where it is a valid id.",
                        "schema": {"type": "string", "maxLength": 128},
                    }));
                    answer["headers"] = Value::Object(headers);
                }
                // Sorted, whatever order they were found in.
                let sorted = std::mem::take(answers)
                    .into_iter()
                    .collect::<std::collections::BTreeMap<_, _>>();
                *answers = sorted.into_iter().collect();
            }
        }
    }
    describe_requests(document);
    let schemas = &mut document["components"]["schemas"];
    for (name, schema) in problem_schemas() {
        schemas[name] = schema;
    }
    if let Some(schemas) = schemas.as_object_mut() {
        for (name, schema) in schemas.iter_mut() {
            let is_request = [
                "Create", "Update", "Rotate", "Register", "Login", "Refresh", "Change", "Check",
            ]
            .iter()
            .any(|start| name.starts_with(start))
                && !name.starts_with("Created")
                && !name.starts_with("CheckResult")
                && !name.starts_with("CheckCode");
            if is_request && schema["type"] == "object" {
                schema["additionalProperties"] = json!(false);
            }
        }
    }
}

/// The schemas of errors, which no operation names in poem-openapi's eyes.
fn problem_schemas() -> Vec<(&'static str, Value)> {
    use poem_openapi::types::Type;
    let mut registry = Registry::new();
    quota_common::Problem::register(&mut registry);
    registry
        .schemas
        .iter()
        .filter_map(|(name, schema)| {
            let name = ["Problem", "FieldError", "PolicyName"]
                .into_iter()
                .find(|it| it == name)?;
            Some((name, serde_json::to_value(schema).ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_added_status_has_its_description() {
        for status in MORE.iter().flat_map(|(_, more)| *more) {
            assert!(DESCRIPTIONS.iter().any(|(it, _)| it == status), "{status}");
        }
    }
}
