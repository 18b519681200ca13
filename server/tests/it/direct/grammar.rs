//! Generates what a client sends on one connection: valid, odd and hostile check requests, divided into parts.

use fastrand::Rng;

use super::pair::World;

/// The bytes that a client sends on a connection.
pub(super) struct Case {
    pub(super) bytes: Vec<u8>,
    /// The positions at which the bytes are divided.
    pub(super) cuts: Vec<usize>,
}

impl Case {
    pub(super) fn whole(bytes: &[u8]) -> Self {
        Self {
            bytes: bytes.to_vec(),
            cuts: Vec::new(),
        }
    }

    pub(super) fn parts(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(0).chain(self.cuts.iter().copied());
        let ends = self.cuts.iter().copied().chain([self.bytes.len()]);
        starts.zip(ends).map(|(start, end)| &self.bytes[start..end])
    }
}

/// The last request of each case, after which the server closes the connection.
const LAST: &[u8] = b"GET /health/live HTTP/1.1\r\nHost: q\r\nConnection: close\r\n\r\n";

const HARMLESS: &[(&str, &str)] = &[
    ("User-Agent", "quota-it/1.0 (differential)"),
    ("Accept", "*/*"),
    ("Accept-Encoding", "gzip, br"),
    ("Cookie", "a=b; c=\"d\""),
    ("Cookie", "e=f"),
    ("Cache-Control", "no-cache"),
    ("X-Real-IP", "198.51.100.9"),
    ("Forwarded", "for=198.51.100.10"),
    (
        "traceparent",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    ),
    ("Keep-Alive", "timeout=5"),
    ("X-Empty", ""),
    ("Range", "bytes=0-0"),
    ("If-None-Match", "\"x\""),
    ("Accept", "text/html;q=0.1"),
];
/// Header fields that change how a request is parsed or handled, or that look as if they did.
const ODD: &[(&str, &str)] = &[
    ("Transfer-Encoding", "chunked"),
    ("Transfer-Encoding", "identity"),
    ("Transfer-Encoding", "xchunked"),
    ("Transfer_Encoding", "chunked"),
    ("Content-Length", "0"),
    ("Content-Length", "5"),
    ("Content-Length", "00"),
    ("Content-Length", "+1"),
    ("Content-Length", "1, 1"),
    ("Content-Length", "99999999999999999999"),
    ("Content-Length", ""),
    ("Connection", "keep-alive"),
    ("Connection", "close"),
    ("Connection", "Keep-Alive, Upgrade"),
    ("Connection", ""),
    ("Expect", "100-continue"),
    ("Expect", "200-ok"),
    ("Upgrade", "h2c"),
    ("HTTP2-Settings", "AAMAAABkAARAAAAAAAIAAAAA"),
    ("TE", "trailers"),
    ("Trailer", "X-API-Key"),
    ("Proxy-Connection", "close"),
    ("Content-Encoding", "gzip"),
    ("Host", "other"),
    ("Host", ""),
    ("Origin", "https://a.example"),
    ("Origin", "https://evil.example"),
    ("Origin", "null"),
    ("Access-Control-Request-Method", "GET"),
    ("X-Forwarded-For", "198.51.100.7"),
    ("X-Forwarded-For", "1.2.3.4, 198.51.100.7, 127.0.0.9"),
    ("X-Forwarded-For", "unknown, [2001:db8::1]:80"),
    ("X-Forwarded-For", ","),
    ("X-Forwarded-Method", "BREW"),
    ("X-Forwarded-Uri", "/coffee?pot=1#now"),
    ("X-Request-ID", "c-second"),
    ("X-Request-ID", "a b"),
    ("X-Request-ID", ""),
    ("X-HTTP-Method-Override", "POST"),
    ("Authorization", "Basic cTpx"),
    ("Authorization", "Bearer"),
    ("Authorization", "bearer  x "),
    ("X-API-Key", "  "),
    ("X-API-Key", "qk_x"),
    ("X-Service-Token", "qs_x"),
    ("x_api_key", "qk_x"),
    ("Content-Type", "text/plain"),
    ("Content-Type", "application/json; charset=utf-16"),
    ("Content-Type", "application/json;charset=UTF-8"),
    ("Content-Type", ""),
    ("X-Text", "caf\u{e9}"),
    ("X-Text", "a\tb"),
    ("X-API-Key", "\u{1f511}"),
    ("", "x"),
    ("A B", "x"),
    ("A(", "x"),
];
const METHODS: &[&str] = &[
    "GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE", "CONNECT", "get", "BREW",
    "PRI", "G\0T",
];
const TARGETS: &[&str] = &[
    "/v1/echo",
    "/v1/check",
    "/v1/forward-auth",
    "/v1/forward-auth?",
    "/v1/forward-auth?deny=403",
    "/v1/forward-auth?deny=429",
    "/v1/forward-auth?deny=404",
    "/v1/forward-auth?deny=403&deny=429",
    "/v1/forward-auth#deny",
    "/v1/echo?",
    "/v1/echo?key=qk_x",
    "/v1/echo/",
    "//v1/echo",
    "/v1/ech%6f",
    "http://q/v1/echo",
    "*",
    "q:80",
    "/v1/check?x",
    "/health/live",
    "/nothing",
    "/v1/forward-auth/x",
];
const VERSIONS: &[&str] = &[
    "HTTP/1.0",
    "HTTP/2.0",
    "HTTP/1.2",
    "http/1.1",
    "HTTP/1.1 ",
    "",
];
const ENDS: &[&str] = &["\n", "\r", "\r\r\n", "\n\r", " \r\n", "", "\r\n ", "\r\n\t"];
const SEPARATORS: &[&str] = &[":", ":  ", " : ", ":\t", "", ": \0"];
const BODIES: &[&str] = &[
    "",
    "{}",
    "[]",
    "{",
    "null",
    "{\"key\":1}",
    "{\"key\":\"qk_\",\"cost\":0}",
    "{\"key\":\"x\",\"key\":\"y\"}",
    "{\"key\":\"x\",\"other\":1}",
    "\u{feff}{}",
    "{\"key\":\"\\ud800\"}",
    "0\r\n\r\n",
    "2\r\n{}\r\n0\r\n\r\n",
    "{\"key\":\"x\",\"cost\":1e999}",
    "{\"key\":\"x\",\"endpoint\":\"\\u0001\"}",
];

fn pick<T: Copy>(random: &mut Rng, from: &[T]) -> T {
    from[random.usize(..from.len())]
}

fn one_in(random: &mut Rng, of: u32) -> bool {
    random.u32(..of) == 0
}

/// Returns whether a request may have a body. If a server responds before it has received the whole body, hyper reads
/// the rest or closes the connection, depending on when the rest arrives. A case with such a request is sent in one
/// part, so that both servers behave the same.
fn may_have_body(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes).to_lowercase();
    text.contains("content-length") || text.contains("transfer") || text.contains("expect")
}

/// Returns the case for a seed.
pub(super) fn case(seed: u64, world: &World) -> Case {
    let mut random = Rng::with_seed(seed);
    let mut bytes = Vec::new();
    for n in 0..random.u32(1..=4) {
        bytes.extend(request(&mut random, world, &format!("c-{seed}-{n}")));
    }
    bytes.extend_from_slice(LAST);
    if one_in(&mut random, 12) {
        for _ in 0..random.u8(1..4) {
            let at = random.usize(..bytes.len());
            match random.u8(..3) {
                0 => bytes[at] = random.u8(..),
                1 => {
                    bytes.remove(at);
                }
                _ => bytes.insert(at, random.u8(..)),
            }
        }
    }
    let cuts = match random.u8(..10) {
        _ if may_have_body(&bytes) => Vec::new(),
        0 => (1..bytes.len()).collect(),
        1..=4 => {
            let mut cuts = (0..random.u8(1..6))
                .map(|_| random.usize(1..bytes.len()))
                .collect::<Vec<_>>();
            cuts.sort_unstable();
            cuts.dedup();
            cuts
        }
        _ => Vec::new(),
    };
    Case { bytes, cuts }
}

/// Returns a valid request, or a request that differs from a valid one in a few places.
fn request(random: &mut Rng, world: &World, id: &str) -> Vec<u8> {
    let key = pick(random, &world.keys.each_ref());
    let token = match random.u8(..8) {
        0 => pick(random, &world.bad_tokens.each_ref()),
        _ => &world.token,
    };
    let mut fields = vec![("Host".to_owned(), "q".to_owned())];
    let mut add = |name: &str, value: &str| fields.push((name.to_owned(), value.to_owned()));
    let (mut method, mut target, mut body) = match random.u8(..6) {
        0..=2 => {
            match random.u8(..4) {
                0 => add("Authorization", &format!("Bearer {key}")),
                _ => add("X-API-Key", key),
            }
            ("GET", "/v1/echo", String::new())
        }
        3 | 4 => {
            add("X-Service-Token", token);
            add("X-API-Key", key);
            if random.bool() {
                add("X-Forwarded-Method", "GET");
                add("X-Forwarded-Uri", "/orders/7?x=1");
            }
            let target = pick(random, &TARGETS[2..6]);
            (pick(random, &METHODS[..6]), target, String::new())
        }
        _ => {
            if random.bool() {
                add("Authorization", &format!("Bearer {token}"));
            } else {
                add("X-Service-Token", token);
            }
            let body = match random.u8(..4) {
                0 => format!("{{\"key\":\"{key}\"}}"),
                1 => format!("{{\"key\":\"{key}\",\"cost\":{}}}", random.u8(..9)),
                2 => format!("{{ \"key\" : \"{key}\", \"endpoint\": \"GET /orders\" }}"),
                _ => pick(random, BODIES).to_owned(),
            };
            if !one_in(random, 10) {
                add("Content-Type", "application/json");
            }
            add("Content-Length", &body.len().to_string());
            ("POST", "/v1/check", body)
        }
    };
    if random.bool() {
        add("X-Request-ID", id);
    }
    for _ in 0..random.u8(..4) {
        let (name, value) = pick(random, HARMLESS);
        add(name, value);
    }
    let mut version = "HTTP/1.1";
    let mut bad_line = None;
    if one_in(random, 3) {
        match random.u8(..12) {
            0 => method = pick(random, METHODS),
            1 => target = pick(random, TARGETS),
            2 => version = pick(random, VERSIONS),
            3 => bad_line = Some(random.usize(..=fields.len())),
            4 => {
                // Repeat a field.
                let field = fields[random.usize(..fields.len())].clone();
                fields.insert(random.usize(..=fields.len()), field);
            }
            5 => drop(fields.remove(random.usize(..fields.len()))),
            6 => {
                let at = random.usize(..fields.len());
                fields[at].0 = fields[at].0.to_uppercase();
            }
            7 => body += pick(random, BODIES),
            8 if one_in(random, 4) => {
                let value = "v".repeat(random.usize(1000..20_000));
                fields.push(("X-Long".to_owned(), value));
            }
            _ => {
                let (name, value) = pick(random, ODD);
                let at = random.usize(..=fields.len());
                fields.insert(at, (name.to_owned(), value.to_owned()));
            }
        }
    }
    let mut line = 0;
    let mut end = |random: &mut Rng| {
        line += 1;
        if bad_line == Some(line - 1) {
            pick(random, ENDS)
        } else {
            "\r\n"
        }
    };
    let mut text = [method, " ", target, " ", version, end(random)].concat();
    for (name, value) in &fields {
        let separator = if one_in(random, 60) {
            pick(random, SEPARATORS)
        } else {
            ": "
        };
        for part in [name.as_str(), separator, value.as_str(), end(random)] {
            text.push_str(part);
        }
    }
    text.push_str("\r\n");
    text.push_str(&body);
    text.into_bytes()
}
