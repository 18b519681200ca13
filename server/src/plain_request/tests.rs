use proptest::prelude::*;

use super::*;

const PLAIN: &str = "POST /v1/check?x=1 HTTP/1.1\r\nHost: q\r\nX-API-Key: a\r\nAuthorization: b c\r\n\
    X-Service-Token: d\r\nX-Request-ID: e\r\nX-Forwarded-For: f, g\r\nX-Forwarded-Uri: /h\r\n\
    X-Forwarded-Method: I\r\nContent-Type: j/k\r\nOrigin: l\r\nTraceparent: t\r\n\
    Connection: Keep-Alive\r\nContent-Length: 3\r\n\
    Cookie: m\r\nCookie: n\r\n\r\n";

#[test]
fn plain_request_is_read_with_its_fields_and_body() {
    let bytes = format!("{PLAIN}abcdef");
    let Parsed::Plain(request, length) = parse(bytes.as_bytes()) else {
        panic!("the request is plain")
    };
    assert_eq!(length, PLAIN.len());
    assert_eq!((request.method, request.target), ("POST", "/v1/check?x=1"));
    assert_eq!((request.body_length, request.body), (3, &b"abc"[..]));
    let expected: [(&str, &[u8]); KNOWN] = [
        ("x-api-key", b"a"),
        ("authorization", b"b c"),
        ("x-service-token", b"d"),
        ("x-request-id", b"e"),
        ("x-forwarded-for", b"f, g"),
        ("x-forwarded-uri", b"/h"),
        ("x-forwarded-method", b"I"),
        ("content-type", b"j/k"),
        ("origin", b"l"),
        ("traceparent", b"t"),
    ];
    for (name, value) in expected {
        assert_eq!(request.field(name), Some(value), "{name}");
    }
}

#[test]
fn beginning_of_a_plain_request_is_incomplete() {
    for end in 0..PLAIN.len() {
        assert_eq!(parse(&PLAIN.as_bytes()[..end]), Parsed::Incomplete, "{end}");
    }
    let Parsed::Plain(request, _) = parse(PLAIN.as_bytes()) else {
        panic!("the head is complete")
    };
    assert_eq!((request.body_length, request.body), (3, &b""[..]));
}

#[test]
fn everything_that_leaves_room_for_interpretation_is_other() {
    for line in [
        "Transfer-Encoding: chunked",
        "transfer-encoding: identity",
        "Expect: 100-continue",
        "Upgrade: h2c",
        "HTTP2-Settings: x",
        "TE: trailers",
        "Trailer: x",
        "Content-Encoding: gzip",
        "Proxy-Connection: close",
        "Connection: close",
        "Connection: keep-alive, upgrade",
        "Connection:",
        "Content-Length: 00",
        "Content-Length: 01",
        "Content-Length: +1",
        "Content-Length: -1",
        "Content-Length: 1, 1",
        "Content-Length: 0x1",
        "Content-Length: 1000000000",
        "Content-Length:",
        "Content-Length: 0\r\nContent-Length: 0",
        "Connection: keep-alive\r\nConnection: keep-alive",
        "Host: q",
        "X-API-Key: a\r\nX-API-Key: a",
        "X-Service-Token: a\r\nx-service-token: b",
        "X-Forwarded-For: a\r\nX-Forwarded-For: b",
        "A: b\tc",
        "A: \u{e9}",
        "A: \u{7f}",
        "A : b",
        "A",
        ": b",
        " A: b",
        "A: b\r\n c",
        "A: b\nB: c",
        "A: b\rB: c",
        "A: \0",
    ] {
        let request = format!("GET / HTTP/1.1\r\nHost: q\r\n{line}\r\n\r\n");
        assert_eq!(parse(request.as_bytes()), Parsed::Other, "{line:?}");
    }
    for request in [
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.0\r\nHost: q\r\n\r\n",
        "GET / HTTP/1.1\nHost: q\n\n",
        "GET / HTTP/1.1\r\nHost: q\r\n\n",
        "GET / HTTP/1.1\r\nHost: q\n\r\n",
        "GET  / HTTP/1.1\r\nHost: q\r\n\r\n",
        "GET / HTTP/1.1 \r\nHost: q\r\n\r\n",
        "\r\nGET / HTTP/1.1\r\nHost: q\r\n\r\n",
        "CONNECT q:80 HTTP/1.1\r\nHost: q\r\n\r\n",
        "get / HTTP/1.1\r\nHost: q\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "\u{16}\u{3}\u{1}",
    ] {
        assert_eq!(parse(request.as_bytes()), Parsed::Other, "{request:?}");
    }
}

#[test]
fn long_heads_are_left_to_hyper() {
    let request = |length: usize| {
        let value = "v".repeat(length);
        format!("GET / HTTP/1.1\r\nHost: q\r\nA: {value}\r\n\r\n")
    };
    let overhead = request(0).len();
    let longest = request(HEAD_MAX - overhead);
    assert!(matches!(
        parse(longest.as_bytes()),
        Parsed::Plain(_, HEAD_MAX)
    ));
    let longer = request(HEAD_MAX - overhead + 1);
    assert_eq!(parse(longer.as_bytes()), Parsed::Other);
    assert_eq!(parse(&longer.as_bytes()[..HEAD_MAX]), Parsed::Other);
    let fields = "A: b\r\n".repeat(FIELDS_MAX);
    let many = format!("GET / HTTP/1.1\r\nHost: q\r\n{fields}\r\n");
    assert_eq!(parse(many.as_bytes()), Parsed::Other);
}

/// Returns whether a head strictly follows the grammar of RFC 9112. Does not use httparse.
fn is_strict(head: &str) -> bool {
    let Some(lines) = head.strip_suffix("\r\n\r\n") else {
        return false;
    };
    let is_visible = |byte: u8| (b' '..0x7f).contains(&byte);
    let is_token = |text: &str| {
        !text.is_empty()
            && text
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
    };
    let mut lines = lines.split("\r\n");
    let line = lines.next().unwrap_or_default();
    let is_request_line =
        line.split(' ').count() == 3 && line.ends_with(" HTTP/1.1") && line.bytes().all(is_visible);
    is_request_line
        && lines.all(|line| {
            line.bytes().all(is_visible)
                && line.split_once(':').is_some_and(|(name, _)| is_token(name))
        })
}

fn piece() -> impl Strategy<Value = String> {
    prop_oneof![
        8 => prop::sample::select(vec![
            "Host: q\r\n", "X-API-Key: k\r\n", "A: b\r\n", "Content-Length: 3\r\n", "Connection: keep-alive\r\n",
            "GET / HTTP/1.1\r\n", "\r\n",
        ]).prop_map(str::to_owned),
        1 => prop::sample::select(vec![
            "\n", "\r", " ", "\t", ":", "\0", "A", "A : b\r\n", " b\r\n", "Transfer-Encoding: chunked\r\n", "\u{e9}",
        ]).prop_map(str::to_owned),
    ]
}

proptest! {
    #[test]
    fn plain_heads_are_strict_and_end_at_the_first_empty_line(
        pieces in prop::collection::vec(piece(), 0..8)
    ) {
        let text = format!("GET / HTTP/1.1\r\nHost: p\r\n{}\r\nrest", pieces.concat().replace("Host: q\r\n", ""));
        if let Parsed::Plain(request, length) = parse(text.as_bytes()) {
            let head = &text[..length];
            prop_assert!(is_strict(head), "{head:?}");
            prop_assert_eq!(text.find("\r\n\r\n"), Some(length - 4));
            let lower = head.to_lowercase();
            prop_assert!(!lower.contains("transfer-encoding"));
            let lengths = lower.matches("\r\ncontent-length:").count();
            prop_assert_eq!(request.body_length, 3 * lengths);
        }
    }

    #[test]
    fn parsing_never_panics(bytes: Vec<u8>) {
        parse(&bytes);
    }
}
