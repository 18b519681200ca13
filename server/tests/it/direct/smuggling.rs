//! Tests requests that are meant to make two servers disagree about where a request ends. Such requests get no direct
//! responses, unless they are plain. No bytes of a body are handled as a request, and the responses are those of hyper.

use super::{grammar::Case, pair::Pair};
use crate::smuggling::cases::{Attacker, HIDING, Hidden, ODD, filled, not_hidden};

/// The cases that are plain requests, because their unusual header fields do not affect how a request is parsed.
const IS_PLAIN: [&str; 4] = [
    "TE with an underscore",
    "length with a method override",
    "response before the body: no token",
    "host with a user",
];

/// Returns the length of a request's head, including the empty line at its end.
fn head_length(bytes: &[u8]) -> usize {
    let is_head = |length: &usize| {
        let head = &bytes[..*length];
        head.ends_with(b"\n\r\n") || head.ends_with(b"\n\n")
    };
    (1..=bytes.len()).find(is_head).unwrap_or(bytes.len())
}

/// Compares the responses to a case. The case is sent by itself, in one part and in two parts. It is also sent after a
/// plain request, in two parts and byte by byte.
///
/// For the comparison, only the head is divided. The end of the head is sent together with the rest: if a body arrived
/// after its head, whether a server closes the connection would depend on how much later it arrives.
async fn compare(pair: &Pair, name: &str, bytes: &[u8]) {
    let key = &pair.world.keys[0];
    let first = format!(
        "GET /v1/echo HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-first\r\nX-API-Key: {key}\r\n\r\n"
    );
    for before in ["", &first] {
        let all = [before.as_bytes(), bytes].concat();
        let head = head_length(bytes);
        let middle = before.len() + head / 2;
        let bytewise = (1..before.len() + head).collect::<Vec<_>>();
        for cuts in [
            vec![middle],
            if before.is_empty() { vec![] } else { bytewise },
        ] {
            let answered = pair.direct.direct_responses();
            let case = Case {
                bytes: all.clone(),
                cuts,
            };
            let received = pair.compare(name, &case).await;
            // If the plain request is sent byte by byte, it may arrive in so many parts that hyper handles it.
            let direct = pair.direct.direct_responses() - answered;
            let most = u64::from(!before.is_empty()) + u64::from(IS_PLAIN.contains(&name));
            assert!(direct <= most, "{name}: {direct}");
            assert!(!received.contains("c-hidden"), "{name}: {received}");
            if !before.is_empty() {
                assert!(
                    received.contains("x-request-id: c-first"),
                    "{name}: {received}"
                );
            }
        }
    }
}

/// Sends a case to a server with direct responses. The body arrives in one part after the head. After a plain request, it
/// arrives byte by byte.
async fn divide_body(pair: &Pair, name: &str, bytes: &[u8]) {
    let key = &pair.world.keys[0];
    let first = format!("GET /v1/echo HTTP/1.1\r\nHost: q\r\nX-API-Key: {key}\r\n\r\n");
    for before in ["", &first] {
        let all = [before.as_bytes(), bytes].concat();
        let begin = before.len() + head_length(bytes);
        let cuts = if before.is_empty() {
            vec![begin]
        } else {
            (begin..all.len()).collect()
        };
        let answered = pair.direct.direct_responses();
        let received = pair.direct.responses(&Case { bytes: all, cuts }).await;
        let direct = pair.direct.direct_responses() - answered;
        let most = u64::from(!before.is_empty()) + u64::from(IS_PLAIN.contains(&name));
        assert!(direct <= most, "{name}: {direct}");
        assert!(!received.contains("c-hidden"), "{name}: {received}");
    }
}

/// Compares the responses to `cases`. Also checks that there are more usage records than cases.
async fn compare_all(cases: &[(&str, &str)]) {
    let pair = Pair::start().await;
    let attacker = Attacker {
        key: &pair.world.keys[0],
        token: &pair.world.token,
    };
    for (name, text) in cases {
        let bytes = filled(text, Hidden::Request, &attacker).concat();
        compare(&pair, name, &bytes).await;
    }
    assert!(pair.compare_records().await > cases.len());
    // The hidden request gets a response if it is sent by itself.
    let case = Case::whole(&not_hidden(&attacker));
    let received = pair.compare("not hidden", &case).await;
    assert!(received.starts_with("HTTP/1.1 200 OK\r\n"), "{received}");
    assert!(received.contains("c-hidden"), "{received}");
    // These requests are sent to one server only, so they come after the comparison.
    for (name, text) in cases {
        let bytes = filled(text, Hidden::Request, &attacker).concat();
        divide_body(&pair, name, &bytes).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_hidden_with_an_encoding_is_answered() {
    compare_all(&HIDING[..HIDING.len() / 2]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_hidden_with_a_length_or_chunks_is_answered() {
    compare_all(&HIDING[HIDING.len() / 2..]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_requests_are_answered_as_by_hyper() {
    compare_all(ODD).await;
}
