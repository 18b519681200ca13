//! The requests that Stripe accepts: the path and parameters of each operation, as published by Stripe.

use std::{collections::BTreeMap, sync::LazyLock};

use hyper::{
    HeaderMap, Method,
    header::{CONTENT_TYPE, HeaderName},
};
use jsonschema::{Validator, draft202012};
use serde_json::Value;

use crate::state::API_VERSION;

const DOCUMENT: &str = include_str!("../stripe-api/2026-09-30.endive.json");

/// The maximum length of an idempotency key.
const KEY_MAX: usize = 255;

static OPERATIONS: LazyLock<Vec<Operation>> = LazyLock::new(|| {
    let document: BTreeMap<String, Value> =
        serde_json::from_str(DOCUMENT).expect("the document is JSON");
    let operations = document.into_iter().map(|(name, schema)| Operation {
        validator: draft202012::new(&schema).expect("the document contains schemas"),
        name,
        schema,
    });
    operations.collect()
});

/// An operation of the API.
struct Operation {
    /// The method and path, such as `GET /v1/customers/{customer}`.
    name: String,
    schema: Value,
    validator: Validator,
}

impl Operation {
    fn find(method: &Method, path: &str) -> Option<&'static Self> {
        let is_same = |template: &str| {
            let mut parts = path.split('/');
            let matches = template.split('/').all(|part| match parts.next() {
                Some(actual) if part.starts_with('{') => !actual.is_empty(),
                actual => actual == Some(part),
            });
            matches && parts.next().is_none()
        };
        OPERATIONS.iter().find(|it| {
            let (its_method, template) = it.name.split_once(' ').unwrap_or_default();
            its_method == method.as_str() && is_same(template)
        })
    }
}

/// Returns the operation of a request, such as `GET /v1/customers/{customer}`, and what is wrong with the request.
/// `path` begins with a slash. Every parameter is a string, as in a form.
pub fn check(
    method: &Method,
    path: &str,
    headers: &HeaderMap,
    params: &Value,
) -> (Option<&'static str>, Vec<String>) {
    let Some(operation) = Operation::find(method, path) else {
        let unknown = format!("{method} {path}: there is no such operation");
        return (None, vec![unknown]);
    };
    let mut wrong = Vec::new();
    let header = |name: HeaderName| headers.get(name).and_then(|it| it.to_str().ok());
    let version = header(HeaderName::from_static("stripe-version"));
    if version != Some(API_VERSION) {
        wrong.push(format!("Stripe-Version is {version:?}"));
    }
    if method == Method::POST {
        let key = header(HeaderName::from_static("idempotency-key"));
        if key.is_some_and(|it| it.is_empty() || it.len() > KEY_MAX) {
            wrong.push(format!("Idempotency-Key is {key:?}"));
        }
        let kind = header(CONTENT_TYPE);
        let is_empty = params.as_object().is_some_and(serde_json::Map::is_empty);
        if !is_empty && kind != Some("application/x-www-form-urlencoded") {
            wrong.push(format!("Content-Type is {kind:?}"));
        }
    }
    let params = typed(&operation.schema, params);
    let errors = operation.validator.iter_errors(&params);
    wrong.extend(errors.map(|error| format!("{}: {error}", error.instance_path())));
    let wrong = wrong
        .into_iter()
        .map(|it| format!("{}: {it}", operation.name));
    (Some(&operation.name), wrong.collect())
}

/// Converts parameters to the types in the schema where possible. Other parameters remain strings.
fn typed(schema: &Value, value: &Value) -> Value {
    if let Some(options) = schema["anyOf"].as_array() {
        let typed = options.iter().map(|option| (option, typed(option, value)));
        let fitting = typed
            .into_iter()
            .find(|(option, it)| draft202012::is_valid(option, it));
        return fitting.map_or_else(|| value.clone(), |(_, it)| it);
    }
    let converted = match (schema["type"].as_str(), value) {
        (Some("integer"), Value::String(text)) => text.parse::<i64>().ok().map(Value::from),
        (Some("number"), Value::String(text)) => text.parse::<f64>().ok().map(Value::from),
        (Some("boolean"), Value::String(text)) => text.parse::<bool>().ok().map(Value::from),
        (Some("array"), Value::Array(items)) => {
            Some(items.iter().map(|it| typed(&schema["items"], it)).collect())
        }
        (Some("object"), Value::Object(fields)) => {
            let other = &schema["additionalProperties"];
            let properties = &schema["properties"];
            let schema_of = |name: &String| properties.get(name).unwrap_or(other);
            let typed = |(name, it): (&String, &Value)| (name.clone(), typed(schema_of(name), it));
            Some(Value::Object(fields.iter().map(typed).collect()))
        }
        _ => None,
    };
    converted.unwrap_or_else(|| value.clone())
}
