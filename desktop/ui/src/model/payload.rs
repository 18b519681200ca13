//! Formats JSON for people to read.

use serde_json::Value;

use super::audit::compact;

/// The fields to show first, because they come first in the body of a webhook. The API returns fields in alphabetical
/// order.
const FIRST: [&str; 2] = ["type", "timestamp"];

/// Formats the body of an event, one field per line.
pub fn pretty(payload: &Value) -> String {
    let mut out = String::new();
    write(payload, 0, &mut out);
    out
}

fn write(value: &Value, depth: usize, out: &mut String) {
    let start = |out: &mut String, depth: usize| {
        out.push('\n');
        out.push_str(&"  ".repeat(depth));
    };
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            let is_first = |name: &str| depth == 0 && FIRST.contains(&name);
            let first = FIRST.iter().filter(|_| depth == 0);
            let first = first.filter_map(|name| fields.get_key_value(*name));
            let rest = fields.iter().filter(|(name, _)| !is_first(name));
            out.push('{');
            for (at, (name, value)) in first.chain(rest).enumerate() {
                if at > 0 {
                    out.push(',');
                }
                start(out, depth + 1);
                out.push_str(&string(name));
                out.push_str(": ");
                write(value, depth + 1, out);
            }
            start(out, depth);
            out.push('}');
        }
        Value::Array(items) if !items.is_empty() => {
            out.push('[');
            for (at, item) in items.iter().enumerate() {
                if at > 0 {
                    out.push(',');
                }
                start(out, depth + 1);
                write(item, depth + 1, out);
            }
            start(out, depth);
            out.push(']');
        }
        Value::String(text) => out.push_str(&string(text)),
        other => out.push_str(&compact(other)),
    }
}

fn string(text: &str) -> String {
    serde_json::to_string(text).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn type_and_time_come_first() {
        let payload = json!({"data": {"type": "x", "empty": {}, "list": [1, {"a": null}]}, "type": "webhook.test", "timestamp": "t"});
        let text = pretty(&payload);
        assert_eq!(
            text,
            "{\n  \"type\": \"webhook.test\",\n  \"timestamp\": \"t\",\n  \"data\": {\n    \"empty\": {},\n    \"list\": [\n      1,\n      {\n        \"a\": null\n      }\n    ],\n    \"type\": \"x\"\n  }\n}"
        );
        assert_eq!(serde_json::from_str::<Value>(&text).ok(), Some(payload));
    }

    #[test]
    fn text_is_escaped() {
        let payload = json!({"data": {"key_name": "a \"b\" \\ \n\u{1} <c>"}});
        let text = pretty(&payload);
        assert_eq!(serde_json::from_str::<Value>(&text).ok(), Some(payload));
    }
}
