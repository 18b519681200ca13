//! Tests of `quota loadtest`, against a real server.

use std::{fs, process::Command};

use reqwest::Client;
use serde_json::json;

use crate::support::quota::{Quota, data_dir};

fn run(arguments: &[&str]) -> (bool, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_quota"))
        .arg("loadtest")
        .args(arguments)
        .output()
        .expect("the binary runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (
        output.status.success(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

/// Returns the number that precedes a word in the text.
fn number(text: &str, word: &str) -> u64 {
    let before = text.split(word).next().expect("some text").trim_end();
    let digits = before.rsplit(|c: char| !c.is_ascii_digit()).next();
    digits
        .and_then(|it| it.parse().ok())
        .unwrap_or_else(|| panic!("no number before {word}: {text}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn loadtest_sends_at_the_requested_rate_and_compares_with_the_limit() {
    let (data, http) = (data_dir(), Client::new());
    let quota = Quota::start(data.path());
    let plan = json!({"name": "limited", "default_rpm": 600, "burst": 50});
    let key = quota.key_on(&http, plan).await;
    let keys = data.path().join("keys");
    fs::write(&keys, format!("{key}\n\n")).expect("written");
    let (url, keys) = (
        format!("http://{}", quota.addr),
        keys.to_str().expect("UTF-8"),
    );

    let (passed, out, progress) = run(&[&url, "--keys", keys, "--rate", "100", "--seconds", "3"]);
    assert!(passed, "{out}{progress}");
    assert_eq!(number(&out, " requests in"), 300, "{out}");
    let (allowed, denied) = (number(&out, " allowed,"), number(&out, " denied,"));
    assert_eq!(allowed + denied, 300, "{out}");
    // The burst of 50, plus 10 tokens per second for 3 s. On a slow machine, the load lasts longer. The output rounds
    // its duration to tenths of a second.
    let (_, took) = out.split_once(" requests in ").expect("a duration");
    let (took, _) = took.split_once(" s: ").expect("a duration");
    let tenths = took.replace('.', "").parse::<u64>().expect("a number");
    assert!((75..=50 + tenths + 2).contains(&allowed), "{out}");
    assert!(
        out.contains("(600 per minute, burst 50)") && out.contains(": ok"),
        "{out}"
    );
    assert!(out.contains("p99.9") && out.contains('█'), "{out}");
    assert!(progress.contains("of 300: "), "{progress}");
    quota.stop();

    // Without a server, every request fails for the same reason.
    let (passed, out, error) = run(&[&url, "--keys", keys, "--rate", "10", "--seconds", "1"]);
    assert!(!passed);
    assert!(out.contains("failed 10 times: "), "{out}");
    assert!(error.contains("no request got a decision"), "{error}");
    let (passed, _, error) = run(&[&url, "--keys", "/nowhere"]);
    assert!(!passed && error.contains("cannot read /nowhere"), "{error}");
}
