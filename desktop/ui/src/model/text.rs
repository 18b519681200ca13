//! Numbers and times for people.

/// With a narrow space between thousands.
pub fn number(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

/// A number of things.
pub fn count(n: u64, one: &str, many: &str) -> String {
    format!("{} {}", number(n), if n == 1 { one } else { many })
}

/// A name within a sentence: whatever is in it stays in it, and much of it is left out.
pub fn named(name: &str) -> String {
    const MOST: usize = 60;
    let mut short: String = name.chars().take(MOST).collect();
    if name.chars().nth(MOST).is_some() {
        short.push('…');
    }
    // Overrides of the text's direction would reach beyond an isolate that they close.
    short.retain(|c| !matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'));
    format!("\u{2068}{short}\u{2069}")
}

/// How long a time of seconds is, in its largest unit.
fn span(secs: u64) -> String {
    match secs {
        0..60 => count(secs, "second", "seconds"),
        60..3600 => count(secs / 60, "minute", "minutes"),
        3600..86_400 => count(secs / 3600, "hour", "hours"),
        _ => count(secs / 86_400, "day", "days"),
    }
}

/// A time, seen from now; both in milliseconds since 1970.
pub fn relative(at: i64, now: i64) -> String {
    let secs = (at - now).unsigned_abs() / 1000;
    match (at > now, secs) {
        (_, 0..5) => "just now".to_owned(),
        (true, _) => format!("in {}", span(secs)),
        (false, _) => format!("{} ago", span(secs)),
    }
}

/// The line to try a key with.
pub fn curl(origin: &str, key: &str) -> String {
    format!("curl -i {origin}/v1/echo -H \"X-API-Key: {key}\"")
}

/// A gateway's configuration, ready to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gateway {
    Caddy,
    Nginx,
    Traefik,
    Curl,
}

impl Gateway {
    pub const ALL: [Self; 4] = [Self::Caddy, Self::Nginx, Self::Traefik, Self::Curl];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Caddy => "Caddy",
            Self::Nginx => "nginx",
            Self::Traefik => "Traefik",
            Self::Curl => "curl",
        }
    }

    /// `origin`: the server's, such as `https://quota.example.com`.
    pub fn configuration(self, origin: &str, token: &str) -> String {
        let host = origin.rsplit("://").next().unwrap_or(origin);
        match self {
            Self::Caddy => format!(
                "api.example.com {{\n\tforward_auth {origin} {{\n\t\turi /v1/forward-auth\n\t\theader_up Host {host}\n\t\t\
                 header_up X-Service-Token {token}\n\t}}\n\treverse_proxy 127.0.0.1:3000\n}}"
            ),
            Self::Nginx => format!(
                "location / {{\n    auth_request /_quota;\n    error_page 403 = @limited;\n    proxy_pass http://127.0.0.1:3000;\n}}\n\
                 location = /_quota {{\n    internal;\n    proxy_pass {origin}/v1/forward-auth?deny=403;\n    proxy_pass_request_body off;\n    \
                 proxy_set_header Content-Length \"\";\n    proxy_set_header Host {host};\n    proxy_set_header X-Service-Token {token};\n}}\n\
                 location @limited {{\n    return 429;\n}}"
            ),
            Self::Traefik => format!(
                "http:\n  middlewares:\n    quota-token:\n      headers:\n        customRequestHeaders:\n          \
                 X-Service-Token: \"{token}\"\n    quota:\n      forwardAuth:\n        address: \"{origin}/v1/forward-auth\"\n        \
                 authRequestHeaders: [\"X-API-Key\", \"X-Service-Token\"]\n  routers:\n    api:\n      rule: \"Host(`api.example.com`)\"\n      \
                 middlewares: [quota-token, quota]\n      service: api"
            ),
            Self::Curl => format!(
                "curl {origin}/v1/check \\\n  -H \"Authorization: Bearer {token}\" \\\n  -H \"Content-Type: application/json\" \\\n  \
                 -d '{{\"key\": \"qk_…\", \"endpoint\": \"GET /orders\"}}'"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_set_apart() {
        assert_eq!(number(0), "0");
        assert_eq!(number(999), "999");
        assert_eq!(number(1_234_567), "1\u{202f}234\u{202f}567");
    }

    #[test]
    fn a_name_stays_within_its_sentence() {
        assert_eq!(named("Ada"), "\u{2068}Ada\u{2069}");
        assert_eq!(named("a\u{202e}b\u{2069}"), "\u{2068}ab\u{2069}");
        assert_eq!(named(&"x".repeat(200)).chars().count(), 63);
    }

    #[test]
    fn times_are_told_in_their_largest_unit() {
        let now = 1_785_738_360_000;
        assert_eq!(relative(now - 2_000, now), "just now");
        assert_eq!(relative(now - 61_000, now), "1 minute ago");
        assert_eq!(relative(now - 7_200_000, now), "2 hours ago");
        assert_eq!(relative(now + 86_400_000, now), "in 1 day");
    }

    #[test]
    fn every_gateway_gets_the_token_and_the_address() {
        for gateway in Gateway::ALL {
            let text = gateway.configuration("https://quota.example.com", "qs_secret");
            assert!(text.contains("qs_secret"), "{text}");
            assert!(
                text.contains("https://quota.example.com/v1/")
                    || text.contains("uri /v1/forward-auth"),
                "{text}"
            );
        }
    }
}
