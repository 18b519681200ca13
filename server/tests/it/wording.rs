//! Checks the wording of all text that callers of the API read: the OpenAPI document, the error pages and the server's
//! messages.

use std::{fs, path::Path};

use quota_common::ProblemCode;
use serde_json::Value;

use crate::support::app::{DOCUMENT, TestApp};

/// Words and phrases that read like a translation, or that a standard term should replace. They are compared in lower
/// case, as whole words.
const BANNED: &[&str] = &[
    "alone",
    "anew",
    "as the server is set",
    "asks for",
    "at stripe",
    "at the moment",
    "away",
    "chance",
    "come back",
    "comes back",
    "does not answer",
    "exists already",
    "from then on",
    "give back",
    "hands on",
    "hands out",
    "held against",
    "held to",
    "in force",
    "in hand",
    "is made",
    "is no json",
    "is no plan",
    "is no time zone",
    "is none",
    "is taken",
    "is there twice",
    "is unknown here",
    "keep book",
    "lifts",
    "live subscription",
    "lives",
    "just made",
    "make a plan",
    "make an api key",
    "made of",
    "mend",
    "names them",
    "no such thing",
    "nobody",
    "not told",
    "of the own",
    "of yours",
    "on its way",
    "opens nothing",
    "own account",
    "own sessions",
    "plan's choice",
    "quarter of an hour",
    "quarters of an hour",
    "refused",
    "requests a minute",
    "rested",
    "seen to",
    "stays",
    "switched off",
    "tells",
    "that asks",
    "the answer",
    "the own",
    "the page before",
    "the text",
    "told",
    "told apart",
    "turns one around",
    "what is there",
    "wherever",
    "whoever",
    "works on",
];

/// Strings that may contain a banned word.
const ALLOWED: &[&str] = &[
    // A header value that clients compare.
    "redis-away",
];

/// Returns the banned words in a string.
fn banned(text: &str) -> Vec<&'static str> {
    let mut text = text.to_owned();
    for allowed in ALLOWED {
        text = text.replace(allowed, "");
    }
    // Separate words with single spaces, and add a space at either end.
    let words = text
        .to_lowercase()
        .split(|c: char| !c.is_alphanumeric() && c != '\'')
        .filter(|word| !word.is_empty())
        .fold(" ".to_owned(), |words, word| words + word + " ");
    BANNED
        .iter()
        .copied()
        .filter(|phrase| words.contains(&format!(" {phrase} ")))
        .collect()
}

fn strings<'a>(value: &'a Value, path: &str, found: &mut Vec<(String, &'a str)>) {
    match value {
        Value::String(text) => found.push((path.to_owned(), text)),
        Value::Array(items) => {
            for (at, item) in items.iter().enumerate() {
                strings(item, &format!("{path}/{at}"), found);
            }
        }
        Value::Object(fields) => {
            for (name, field) in fields {
                strings(field, &format!("{path}/{name}"), found);
            }
        }
        _ => {}
    }
}

#[test]
fn openapi_document_has_no_banned_words() {
    let mut texts = Vec::new();
    strings(&DOCUMENT, "", &mut texts);
    assert!(texts.len() > 500, "{} texts", texts.len());
    let found = texts
        .iter()
        .flat_map(|(path, text)| {
            let words = banned(text).into_iter();
            words.map(move |word| format!("{path}: {word} in {text:?}"))
        })
        .collect::<Vec<_>>();
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn summaries_are_short_and_descriptions_are_sentences() {
    let paths = DOCUMENT["paths"].as_object().expect("paths");
    for (path, operations) in paths {
        for (method, operation) in operations.as_object().expect("operations") {
            let text = |field: &str| operation[field].as_str().unwrap_or_default().trim();
            let (summary, description) = (text("summary"), text("description"));
            let place = format!("{method} {path}");
            assert!(summary.len() <= 60, "{place}: {summary}");
            assert!(!summary.ends_with('.'), "{place}: {summary}");
            if operation["tags"][0] != "Auth" || !description.is_empty() {
                assert!(description.ends_with('.'), "{place}: {description:?}");
            }
            for parameter in operation["parameters"].as_array().into_iter().flatten() {
                let described = parameter["description"].as_str().unwrap_or_default();
                assert!(
                    parameter["in"] == "path" || described.ends_with(['.', '`']),
                    "{place} {}: {described:?}",
                    parameter["name"]
                );
            }
        }
    }
}

#[test]
fn conflicts_are_named_per_operation() {
    let paths = DOCUMENT["paths"].as_object().expect("paths");
    let mut conflicts = Vec::new();
    for operations in paths.values() {
        for operation in operations.as_object().expect("operations").values() {
            let conflict = &operation["responses"]["409"];
            if conflict.is_object() {
                let id = operation["operationId"].as_str().expect("an id");
                let example = &conflict["content"]["application/problem+json"]["example"];
                conflicts.push((
                    id,
                    example["type"].as_str().expect("a type"),
                    conflict["description"].as_str().expect("a description"),
                ));
            }
        }
    }
    conflicts.sort_unstable();
    let kinds = conflicts
        .iter()
        .map(|(id, kind, _)| (*id, kind.rsplit('/').next().unwrap_or_default()))
        .collect::<Vec<_>>();
    assert_eq!(
        kinds,
        [
            ("create_api_key", "request-in-progress"),
            ("create_plan", "name-taken"),
            ("create_service_token", "request-in-progress"),
            ("create_webhook", "request-in-progress"),
            ("delete_plan", "plan-in-use"),
            ("open_billing_portal", "not-subscribed"),
            ("receive_stripe_event", "billing-off"),
            ("register", "email-taken"),
            ("rotate_api_key", "previous-key-active"),
            ("rotate_webhook_secret", "request-in-progress"),
            ("start_checkout", "already-subscribed"),
            ("update_plan", "name-taken"),
        ]
    );
    for (id, _, description) in conflicts {
        assert!(!description.contains("conflict"), "{id}: {description}");
    }
}

#[test]
fn tags_are_in_reading_order() {
    let tags = DOCUMENT["tags"].as_array().expect("tags");
    let names = tags.iter().map(|tag| tag["name"].as_str().expect("a name"));
    assert_eq!(
        names.collect::<Vec<_>>(),
        [
            "Rate limiting",
            "API keys",
            "Plans",
            "Service tokens",
            "Usage",
            "Alerts",
            "Webhooks",
            "Billing",
            "Audit",
            "Auth",
            "Health"
        ]
    );
    for tag in tags {
        let description = tag["description"].as_str().unwrap_or_default();
        assert!(description.ends_with('.'), "{tag}");
    }
}

/// Returns the string literals of Rust code, without its comments and without the tests at its end.
fn literals(source: &str) -> Vec<String> {
    let source = source.split("#[cfg(test)]").next().unwrap_or_default();
    let mut found = Vec::new();
    for line in source.split('\n') {
        let line = line.trim();
        if line.starts_with("//") || line.starts_with("#[expect") || line.starts_with("reason =") {
            continue;
        }
        let mut rest = line;
        while let Some((_, after)) = rest.split_once('"') {
            let mut end = None;
            let mut escaped = false;
            for (at, c) in after.char_indices() {
                match c {
                    '"' if !escaped => {
                        end = Some(at);
                        break;
                    }
                    c => escaped = c == '\\' && !escaped,
                }
            }
            let Some(end) = end else {
                found.push(after.to_owned());
                break;
            };
            found.push(after[..end].to_owned());
            rest = &after[end + 1..];
        }
    }
    found
}

#[test]
fn messages_have_no_banned_words() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut files = vec![root.join("server/src/auth/password.rs")];
    for folder in ["server/src/api", "common/src"] {
        for entry in fs::read_dir(root.join(folder)).expect("the sources are there") {
            files.push(entry.expect("a readable entry").path());
        }
    }
    files.retain(|path| path.extension().is_some_and(|it| it == "rs"));
    let mut messages = 0;
    let mut found = Vec::new();
    for path in files {
        let source = fs::read_to_string(&path).expect("readable");
        for literal in literals(&source) {
            // Skip names, headers and paths, which are not sentences.
            if !literal.contains(' ') {
                continue;
            }
            messages += 1;
            for word in banned(&literal) {
                found.push(format!("{}: {word} in {literal:?}", path.display()));
            }
        }
    }
    assert!(messages > 100, "{messages} messages");
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn planted_word_is_found() {
    assert_eq!(banned("This API key opens nothing."), ["opens nothing"]);
    assert_eq!(
        banned("Whether the session lives, and told."),
        ["lives", "told"]
    );
    assert_eq!(banned("A remade mendable kite"), Vec::<&str>::new());
    assert_eq!(
        literals("// \"a\"\nf(\"b \\\" c\", \"d\");\n#[cfg(test)]\nx(\"e\")"),
        ["b \\\" c", "d"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn every_error_has_a_page_with_an_example_and_a_retry() {
    let app = TestApp::start().await;
    for code in ProblemCode::ALL {
        let page = app.get(&format!("/problems/{}", code.slug())).send().await;
        assert_eq!(page.status, 200, "{code:?}");
        assert_eq!(
            page.header("content-type"),
            Some("text/html; charset=utf-8")
        );
        let html = page
            .text
            .replace("&quot;", "\"")
            .replace("&gt;", ">")
            .replace("&lt;", "<")
            .replace("&amp;", "&");
        let (_, example) = html
            .split_once("content-type: application/problem+json")
            .expect("an example response");
        let (headers, body) = example.split_once("\n\n").expect("headers, then a body");
        let (body, rest) = body.split_once("</pre>").expect("the example ends");
        let body: Value = serde_json::from_str(body).expect("the example is JSON");
        assert_eq!(body["status"], code.status());
        assert_eq!(body["title"], code.title());
        let has_page =
            body["type"] == format!("{}/problems/{}", app.state.config.public_url, code.slug());
        let is_registered = body["type"]
            .as_str()
            .is_some_and(|it| it.starts_with("https://iana.org/"));
        assert!(has_page || is_registered, "{body}");
        assert_eq!(
            headers.contains("retry-after: "),
            html.contains("get(\"Retry-After\")"),
            "{code:?}"
        );
        assert!(rest.contains("<h2>Retry</h2>"), "{code:?}");
        assert!(
            rest.contains("curl ") || rest.contains("fetch("),
            "{code:?}"
        );
        assert!(!rest.contains("{base}"), "{code:?}");
        assert_eq!(banned(&page.text), Vec::<&str>::new(), "{code:?}");
    }
    for path in ["/", "/problems"] {
        let page = app.get(path).send().await;
        assert_eq!((page.status, banned(&page.text)), (200, vec![]), "{path}");
    }
}
