//! The known ways to make two servers disagree about where a request ends. None of these requests gets a direct
//! response, and no bytes of a body are handled as a request.

use super::{grammar::Case, pair::Pair};

/// The request that an attacker hides in another request. The hidden request must never get a response.
const HIDDEN: &str =
    "GET /v1/echo HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-hidden\r\nX-API-Key: KEY\r\n\r\n";

/// Requests that end with [`HIDDEN`], or contain it.
const CASES: &[(&str, &str)] = &[
    (
        "CL.TE",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nContent-Length: LEN\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE.CL",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\nHEX\r\nHIDDEN\r\n0\r\n\r\n",
    ),
    (
        "TE.TE, one of them odd",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE with a space",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nTransfer-Encoding : chunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE with a vertical tab",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nTransfer-Encoding: \u{b}chunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE on a folded line",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nTransfer-Encoding:\r\n chunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE that is not chunked",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nTransfer-Encoding: xchunked\r\nContent-Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "chunked is not the last coding",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nTransfer-Encoding: chunked, identity\r\nContent-Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "chunk extension",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nTransfer-Encoding: chunked\r\n\r\n2;a=\"\r\nHIDDEN\"\r\n{}\r\n0\r\n\r\n",
    ),
    (
        "two lengths",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nContent-Length: 0\r\nContent-Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "two lengths in one field",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nContent-Length: 0, LEN\r\n\r\nHIDDEN",
    ),
    (
        "signed length",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nContent-Length: +LEN\r\n\r\nHIDDEN",
    ),
    (
        "length with a space",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nContent-Length : LEN\r\n\r\nHIDDEN",
    ),
    (
        "length in hexadecimal",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nContent-Length: 0xHEX\r\n\r\nHIDDEN",
    ),
    (
        "length with a NUL",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nContent-Length: LEN\0\r\n\r\nHIDDEN",
    ),
    (
        "CL.0",
        "GET /v1/echo HTTP/1.1\r\nHost: q\r\nX-API-Key: KEY\r\nContent-Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "CL.0 at forward-auth",
        "GET /v1/forward-auth HTTP/1.1\r\nHost: q\r\nContent-Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "Expect",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nExpect: 100-continue\r\nContent-Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "Upgrade",
        "GET /v1/echo HTTP/1.1\r\nHost: q\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nX-API-Key: KEY\r\nContent-Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "HTTP/1.0",
        "GET /v1/echo HTTP/1.0\r\nX-API-Key: KEY\r\nContent-Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "length named by Connection",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nConnection: Content-Length\r\nContent-Length: LEN\r\n\r\nHIDDEN",
    ),
];

/// Requests with an oddity that other servers may interpret differently. They hide no other request, and get the same
/// responses as from hyper.
const ODD: &[(&str, &str)] = &[
    (
        "bare LF",
        "GET /v1/echo HTTP/1.1\nHost: q\nX-API-Key: KEY\n\n",
    ),
    (
        "one bare LF",
        "GET /v1/echo HTTP/1.1\r\nHost: q\nX-API-Key: KEY\r\n\r\n",
    ),
    (
        "bare LF at the end",
        "GET /v1/echo HTTP/1.1\r\nHost: q\r\nX-API-Key: KEY\r\n\n",
    ),
    (
        "bare CR",
        "GET /v1/echo HTTP/1.1\r\nHost: q\rX-API-Key: KEY\r\n\r\n",
    ),
    (
        "NUL in a value",
        "GET /v1/echo HTTP/1.1\r\nHost: q\r\nX: \0\r\nX-API-Key: KEY\r\n\r\n",
    ),
    (
        "NUL in a name",
        "GET /v1/echo HTTP/1.1\r\nHost: q\r\nX\0: y\r\nX-API-Key: KEY\r\n\r\n",
    ),
    (
        "space before a colon",
        "GET /v1/echo HTTP/1.1\r\nHost: q\r\nX-API-Key : KEY\r\n\r\n",
    ),
    (
        "folded line",
        "GET /v1/echo HTTP/1.1\r\nHost: q\r\nX-API-Key:\r\n KEY\r\n\r\n",
    ),
    (
        "line without a colon",
        "GET /v1/echo HTTP/1.1\r\nHost: q\r\nX\r\nX-API-Key: KEY\r\n\r\n",
    ),
    (
        "two hosts",
        "GET /v1/echo HTTP/1.1\r\nHost: q\r\nHost: p\r\nX-API-Key: KEY\r\n\r\n",
    ),
    ("no host", "GET /v1/echo HTTP/1.1\r\nX-API-Key: KEY\r\n\r\n"),
    (
        "two keys",
        "GET /v1/echo HTTP/1.1\r\nHost: q\r\nX-API-Key: KEY\r\nX-API-Key: KEY\r\n\r\n",
    ),
    (
        "not ASCII",
        "GET /v1/echo HTTP/1.1\r\nHost: q\r\nX: \u{e9}\r\nX-API-Key: KEY\r\n\r\n",
    ),
    (
        "tab",
        "GET /v1/echo HTTP/1.1\r\nHost: q\r\nX-API-Key:\tKEY\r\n\r\n",
    ),
    (
        "empty line first",
        "\r\nGET /v1/echo HTTP/1.1\r\nHost: q\r\nX-API-Key: KEY\r\n\r\n",
    ),
    (
        "two spaces",
        "GET  /v1/echo HTTP/1.1\r\nHost: q\r\nX-API-Key: KEY\r\n\r\n",
    ),
    (
        "absolute target",
        "GET http://q/v1/echo HTTP/1.1\r\nHost: q\r\nX-API-Key: KEY\r\n\r\n",
    ),
    (
        "lowercase method",
        "get /v1/echo HTTP/1.1\r\nHost: q\r\nX-API-Key: KEY\r\n\r\n",
    ),
    (
        "TE after a tab",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nTransfer-Encoding:\tchunked\r\n\r\n0\r\n\r\n",
    ),
    (
        "chunk length with a bare LF",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nTransfer-Encoding: chunked\r\n\r\n0\n\n",
    ),
    (
        "close",
        "GET /v1/echo HTTP/1.1\r\nHost: q\r\nConnection: close\r\nX-API-Key: KEY\r\n\r\n",
    ),
];

fn filled(text: &str, key: &str) -> Vec<u8> {
    let hidden = HIDDEN.replace("KEY", key);
    // The length of the text after the head.
    let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    let length = body.replace("HIDDEN", &hidden).len();
    let text = text
        .replace("HIDDEN", &hidden)
        .replace("LEN", &length.to_string())
        .replace("HEX", &format!("{:x}", hidden.len()))
        .replace("KEY", key);
    text.into_bytes()
}

/// Sends a case in one part, in two parts and byte by byte, first by itself and then after a plain request.
async fn compare(pair: &Pair, name: &str, bytes: &[u8]) {
    let key = &pair.world.keys[0];
    let first = format!(
        "GET /v1/echo HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-first\r\nX-API-Key: {key}\r\n\r\n"
    );
    for before in ["", &first] {
        let all = [before.as_bytes(), bytes].concat();
        let middle = before.len() + bytes.len() / 2;
        for cuts in [vec![], vec![middle], (1..all.len()).collect()] {
            let answered = pair.direct.direct_responses();
            let case = Case {
                bytes: all.clone(),
                cuts,
            };
            let received = pair.compare(name, &case).await;
            // If the plain request is sent byte by byte, it may arrive in so many parts that hyper handles it.
            let direct = pair.direct.direct_responses() - answered;
            assert!(direct <= u64::from(!before.is_empty()), "{name}: {direct}");
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

#[tokio::test(flavor = "multi_thread")]
async fn no_hidden_request_is_answered() {
    let pair = Pair::start().await;
    let key = pair.world.keys[0].clone();
    for (name, text) in CASES.iter().chain(ODD) {
        compare(&pair, name, &filled(text, &key)).await;
    }
    assert!(pair.compare_records().await > CASES.len());
    // The hidden request gets a response if it is sent by itself.
    let request = HIDDEN.replace("KEY", &key);
    let received = pair
        .compare("not hidden", &Case::whole(request.as_bytes()))
        .await;
    assert!(received.starts_with("HTTP/1.1 200 OK\r\n"), "{received}");
    assert!(received.contains("c-hidden"), "{received}");
}
