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

/// Compares the responses to a case. The case is sent by itself, in one part and in two parts. It is also sent after a
/// plain request, in two parts and byte by byte.
async fn compare(pair: &Pair, name: &str, bytes: &[u8]) {
    let key = &pair.world.keys[0];
    let first = format!(
        "GET /v1/echo HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-first\r\nX-API-Key: {key}\r\n\r\n"
    );
    for before in ["", &first] {
        let all = [before.as_bytes(), bytes].concat();
        let middle = before.len() + bytes.len() / 2;
        let bytewise = (1..all.len()).collect::<Vec<_>>();
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
