//! Form bodies and query strings with brackets, as parsed by Stripe: `a[b][0][c]=d`.

use serde_json::{Map, Value};

/// Parses a form. Every value is a string; objects with the keys `0`, `1`, … become arrays.
pub fn parse(text: &str) -> Value {
    let mut root = Map::new();
    for (key, value) in url::form_urlencoded::parse(text.as_bytes()) {
        let parts: Vec<&str> = key
            .split('[')
            .map(|part| part.trim_end_matches(']'))
            .collect();
        insert(&mut root, &parts, value.into_owned());
    }
    with_arrays(Value::Object(root))
}

fn insert(map: &mut Map<String, Value>, path: &[&str], value: String) {
    let [first, rest @ ..] = path else { return };
    let key = if first.is_empty() {
        map.len().to_string()
    } else {
        (*first).to_owned()
    };
    if rest.is_empty() {
        map.insert(key, Value::String(value));
        return;
    }
    let inner = map.entry(key).or_insert_with(|| Value::Object(Map::new()));
    if let Value::Object(inner) = inner {
        insert(inner, rest, value);
    }
}

fn with_arrays(value: Value) -> Value {
    let Value::Object(map) = value else {
        return value;
    };
    let is_array = !map.is_empty() && (0..map.len()).all(|i| map.contains_key(&i.to_string()));
    if is_array {
        let items = (0..map.len()).map(|i| with_arrays(map[&i.to_string()].clone()));
        return Value::Array(items.collect());
    }
    let fields = map.into_iter().map(|(key, it)| (key, with_arrays(it)));
    Value::Object(fields.collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn brackets_nest() {
        let form = "mode=subscription&line_items[0][price]=p1&line_items[1][price]=p2&metadata[a]=b%26c&x[]=1&x[]=2";
        assert_eq!(
            parse(form),
            json!({
                "mode": "subscription", "line_items": [{"price": "p1"}, {"price": "p2"}],
                "metadata": {"a": "b&c"}, "x": ["1", "2"],
            })
        );
        assert_eq!(parse(""), json!({}));
    }
}
