use serde_json::{Map, Value, json};

use super::operation::for_each_operation;

pub(super) fn add_response_headers(document: &mut Value) {
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
    let retry_after = match status {
        "429" => Some(
            "Seconds to wait before retrying, rounded up, at least 1. Absent if the request can never be allowed.",
        ),
        "503" => Some("Seconds to wait before retrying, rounded up, at least 1."),
        _ => None,
    };
    if let Some(description) = retry_after {
        headers.insert(
            "Retry-After".into(),
            json!({
                "description": description,
                "schema": {"type": "integer", "minimum": 1},
            }),
        );
    }
    if status == "401" {
        headers.insert("WWW-Authenticate".into(), json!({
            "description": "`Bearer realm=\"quota\"`, with `error=\"invalid_token\"` if credentials were sent.",
            "schema": {"type": "string"},
        }));
    }
    headers.insert("X-Request-Id".into(), json!({
        "description": "Request ID: the one sent by the client if it was valid, otherwise a new one.",
        "schema": {"type": "string", "maxLength": 128},
    }));
    headers
}

fn decision_header() -> Value {
    json!({
        "description": "The decision, or why no decision was made. Forward a request only if the status is 200 and this header is `allowed`.",
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
            number(
                "Maximum burst: the number of requests that are allowed immediately for an idle key.",
            ),
        ),
        (
            "X-RateLimit-Remaining".to_owned(),
            number("Number of requests that are still allowed immediately."),
        ),
        (
            "X-RateLimit-Reset".to_owned(),
            number("Unix time, in seconds, at which the full burst is available again."),
        ),
        (
            "RateLimit-Policy".to_owned(),
            text(
                "The limits that apply: `q` requests per `w` seconds or, without `w`, per calendar month (draft-ietf-httpapi-ratelimit-headers-11).",
                "\"rpm\";q=600;w=60, \"daily\";q=50000;w=86400, \"monthly\";q=1000000",
            ),
        ),
        (
            "RateLimit".to_owned(),
            text(
                "The limit that is closest to being used up: `r` requests are left, and the full limit is available again in `t` seconds.",
                "\"rpm\";r=412;t=23",
            ),
        ),
        (
            "X-Quota-Degraded".to_owned(),
            text(
                "Sent only if the decision was made without Redis because Redis was unavailable.",
                "redis-away",
            ),
        ),
    ])
}
