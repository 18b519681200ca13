//! Requests to the documented operations, with valid credentials. Most parts of their paths, queries, headers and
//! bodies follow the schemas.

use std::fmt::Write as _;

use fastrand::Rng;
use serde_json::{Value, json};

use crate::support::app::DOCUMENT;

/// A caller's credentials and resources.
pub(super) struct Caller {
    pub(super) access_token: String,
    pub(super) service_token: String,
    pub(super) key: String,
    /// IDs of existing resources.
    pub(super) ids: Vec<String>,
}

/// A request before it is encoded.
pub(super) struct Request {
    pub(super) method: String,
    pub(super) target: String,
    pub(super) fields: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
}

/// The paths to which no requests are sent: those of operations that end sessions, and that of the operation whose
/// response does not end.
const LEFT_OUT: [&str; 4] = [
    "/auth/logout",
    "/auth/sessions/{session_id}",
    "/admin/decisions/stream",
    "/auth/password",
];

const TEXTS: &[&str] = &[
    "",
    " ",
    "a",
    "Plan",
    "owner@example.com",
    "a@b",
    "\u{0}",
    "a\u{0}b",
    "\u{202e}\u{feff}",
    "\u{1f511}\u{1f511}",
    "é",
    "e\u{301}",
    "'; DROP TABLE plans; --",
    "%00%ff",
    "../../etc/passwd",
    "<script>",
    "=1+1",
    "Europe/Berlin",
    "Mars/Olympus",
    "2026-11-24T09:18:42Z",
    "2026-11-24T09:18:42+99:00",
    "9999-12-31T23:59:60Z",
    "-0001-01-01T00:00:00Z",
    "0",
    "-1",
    "https://8.8.8.8/hook",
    "http://[::ffff:127.0.0.1]/",
    "https://user:secret@8.8.8.8:99999/",
    "\r\nX-Injected: 1",
];

const NUMBERS: &[&str] = &[
    "0",
    "1",
    "2",
    "60",
    "100",
    "-1",
    "-0",
    "0.5",
    "1e3",
    "1e999",
    "-1e-999",
    "2147483648",
    "4294967296",
    "9007199254740993",
    "9223372036854775807",
    "18446744073709551616",
    "60000001",
];

fn pick<'a>(random: &mut Rng, from: &[&'a str]) -> &'a str {
    random.choice(from).copied().unwrap_or_default()
}

fn is_usual(random: &mut Rng) -> bool {
    random.u8(..10) < 8
}

fn text(random: &mut Rng) -> String {
    match random.u8(..20) {
        0 => "x".repeat(random.usize(1..5000)),
        1 => "\u{1f511}".repeat(random.usize(1..300)),
        _ => pick(random, TEXTS).to_owned(),
    }
}

/// Returns the schema that `$ref` points to.
fn resolve(schema: &Value) -> &Value {
    let mut schema = schema;
    while let Some(reference) = schema["$ref"].as_str() {
        let pointer = reference.trim_start_matches('#');
        schema = DOCUMENT.pointer(pointer).expect("references have targets");
    }
    schema
}

/// Returns JSON that mostly follows the schema.
fn sample(random: &mut Rng, caller: &Caller, schema: &Value, depth: u8) -> String {
    let schema = resolve(schema);
    if random.u8(..20) == 0 || depth == 0 {
        return match random.u8(..7) {
            0 => "null".into(),
            1 => "{}".into(),
            2 => "[]".into(),
            3 => "true".into(),
            4 => pick(random, NUMBERS).into(),
            5 => format!("{}1{}", "[".repeat(200), "]".repeat(200)),
            _ => json!(text(random)).to_string(),
        };
    }
    for several in ["anyOf", "oneOf", "allOf"] {
        if let Some(schemas) = schema[several].as_array()
            && let Some(one) = random.choice(schemas)
        {
            return sample(random, caller, one, depth - 1);
        }
    }
    if let Some(values) = schema["enum"].as_array()
        && is_usual(random)
        && let Some(value) = random.choice(values)
    {
        return value.to_string();
    }
    match schema["type"].as_str() {
        Some("object") => object(random, caller, schema, depth),
        Some("array") => {
            let items: Vec<String> = (0..random.u8(..4))
                .map(|_| sample(random, caller, &schema["items"], depth - 1))
                .collect();
            format!("[{}]", items.join(","))
        }
        Some("integer" | "number") => {
            if is_usual(random) {
                random.u16(1..200).to_string()
            } else {
                pick(random, NUMBERS).into()
            }
        }
        Some("boolean") => random.bool().to_string(),
        _ => json!(string(random, caller, schema)).to_string(),
    }
}

fn object(random: &mut Rng, caller: &Caller, schema: &Value, depth: u8) -> String {
    let mut members = Vec::new();
    if let Some(properties) = schema["properties"].as_object() {
        let required = schema["required"].as_array();
        for (name, schema) in properties {
            let is_required = required.is_some_and(|it| it.iter().any(|it| it == name));
            if (is_required && random.u8(..20) != 0) || random.u8(..4) == 0 {
                let value = sample(random, caller, schema, depth - 1);
                members.push(format!("{}:{value}", json!(name)));
            }
        }
    }
    match random.u8(..25) {
        0 => members.push("\"unknown\":1".into()),
        1 => members.extend(members.first().cloned()),
        2 => members.push(format!("{}:1", json!(text(random)))),
        _ => {}
    }
    format!("{{{}}}", members.join(","))
}

fn string(random: &mut Rng, caller: &Caller, schema: &Value) -> String {
    if !is_usual(random) {
        return text(random);
    }
    match schema["format"].as_str() {
        Some("uuid") => random
            .choice(&caller.ids)
            .expect("there are IDs")
            .to_owned(),
        Some("date-time") => "2026-11-24T09:18:42Z".into(),
        Some("email") => "owner@example.com".into(),
        Some("uri") => "https://8.8.8.8/hook".into(),
        _ => {
            let example = schema["example"].as_str();
            example.map_or_else(|| text(random), ToOwned::to_owned)
        }
    }
}

/// Encodes text for a path or query. Sometimes returns the text unencoded or encoded incorrectly.
fn encoded(random: &mut Rng, text: &str) -> String {
    match random.u8(..12) {
        0 => text.to_owned(),
        1 => format!("{text}%"),
        2 => "%c0%ae%c0%ae%2f".into(),
        3 => "%ff%fe".into(),
        4 => text.bytes().fold(String::new(), |mut encoded, it| {
            let _ = write!(encoded, "%{it:02X}");
            encoded
        }),
        _ => text
            .bytes()
            .map(|it| {
                if it.is_ascii_alphanumeric() || b"-._~:".contains(&it) {
                    char::from(it).to_string()
                } else {
                    format!("%{it:02x}")
                }
            })
            .collect(),
    }
}

/// Returns a request to a random operation.
pub(super) fn request(random: &mut Rng, caller: &Caller) -> Request {
    let paths = DOCUMENT["paths"].as_object().expect("paths");
    let paths: Vec<_> = paths
        .iter()
        .filter(|(path, _)| !LEFT_OUT.contains(&path.as_str()))
        .collect();
    let (path, operations) = random.choice(&paths).expect("there are paths");
    let operations = operations.as_object().expect("operations");
    let operations: Vec<_> = operations
        .iter()
        .filter(|(_, it)| it["operationId"].is_string())
        .collect();
    let (method, operation) = random.choice(&operations).expect("there are operations");

    let mut target = (*path).clone();
    let mut query = Vec::new();
    let mut fields = credentials(random, caller, operation);
    let parameters = operation["parameters"].as_array();
    for parameter in parameters.into_iter().flatten() {
        let name = parameter["name"].as_str().expect("a name");
        let value = sample(random, caller, &parameter["schema"], 3);
        let value = value.trim_matches('"');
        let is_chosen = random.u8(..3) == 0;
        match parameter["in"].as_str() {
            Some("path") => {
                target = target.replace(&format!("{{{name}}}"), &encoded(random, value));
            }
            Some("query") if is_chosen => {
                query.push(format!("{name}={}", encoded(random, value)));
                if random.u8(..10) == 0 {
                    query.push(format!("{name}=again"));
                }
            }
            Some("header") if is_chosen => fields.push((name.to_owned(), value.to_owned())),
            _ => {}
        }
    }
    if random.u8(..10) == 0 {
        query.push(encoded(random, "unknown=1&=&&a[]"));
    }
    if !query.is_empty() {
        target = format!("{target}?{}", query.join("&"));
    }
    let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
    let mut body = Vec::new();
    if !schema.is_null() {
        body = sample(random, caller, schema, 6).into_bytes();
        damage(random, &mut body);
        if is_usual(random) {
            fields.push(("content-type".into(), "application/json".into()));
        }
    }
    Request {
        method: method.to_uppercase(),
        target,
        fields,
        body,
    }
}

/// Returns the credentials that the operation requires. Sometimes leaves some out.
fn credentials(random: &mut Rng, caller: &Caller, operation: &Value) -> Vec<(String, String)> {
    let mut fields = Vec::new();
    let required = operation["security"].as_array();
    let schemes = required.into_iter().flatten();
    let schemes = schemes
        .filter_map(|it| it.as_object())
        .flat_map(|it| it.keys());
    for scheme in schemes {
        if random.u8(..15) == 0 {
            continue;
        }
        let (name, value) = match scheme.as_str() {
            "AccessToken" => ("authorization", format!("Bearer {}", caller.access_token)),
            "ServiceToken" => ("authorization", format!("Bearer {}", caller.service_token)),
            "GatewayToken" => ("x-service-token", caller.service_token.clone()),
            "ApiKey" => ("x-api-key", caller.key.clone()),
            other => panic!("unknown scheme {other}"),
        };
        fields.push((name.to_owned(), value));
    }
    fields
}

/// Sometimes changes a body. The result is usually not JSON or not UTF-8, or is too long.
fn damage(random: &mut Rng, body: &mut Vec<u8>) {
    if is_usual(random) || body.is_empty() {
        return;
    }
    let at = random.usize(..body.len());
    match random.u8(..8) {
        0 => body.truncate(at),
        1 => body[at] = random.u8(..),
        2 => body.insert(at, 0),
        3 => body.splice(at..at, *b"\"\\ud800\"").for_each(drop),
        4 => body.splice(0..0, *b"\xef\xbb\xbf").for_each(drop),
        5 => body.extend_from_slice(b"{}"),
        6 => body.splice(at..at, *b"\xff\xfe").for_each(drop),
        _ => body.extend(std::iter::repeat_n(b' ', 70_000)),
    }
}

impl Request {
    /// Encodes the request for HTTP/1.1.
    pub(super) fn http1(&self) -> Vec<u8> {
        let mut bytes = format!("{} {} HTTP/1.1\r\nHost: q\r\n", self.method, self.target);
        for (name, value) in &self.fields {
            let _ = write!(bytes, "{name}: {value}\r\n");
        }
        let _ = write!(bytes, "Content-Length: {}\r\n\r\n", self.body.len());
        [bytes.as_bytes(), &self.body].concat()
    }
}
