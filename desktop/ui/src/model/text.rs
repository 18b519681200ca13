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
        0..3600 => count(secs / 60, "minute", "minutes"),
        3600..86_400 => count(secs / 3600, "hour", "hours"),
        _ => count(secs / 86_400, "day", "days"),
    }
}

/// A time, seen from now; both in milliseconds since 1970.
pub fn relative(at: i64, now: i64) -> String {
    let secs = (at - now).unsigned_abs() / 1000;
    match (at > now, secs) {
        (false, 0..60) => "just now".to_owned(),
        (true, 0..60) => "in less than a minute".to_owned(),
        (true, _) => format!("in {}", span(secs)),
        (false, _) => format!("{} ago", span(secs)),
    }
}

/// A time to wait, as a clock would count it down.
pub fn wait(secs: u64) -> String {
    match secs {
        0..120 => format!("{secs} s"),
        120..7200 => format!("{} min {} s", secs / 60, secs % 60),
        7200..172_800 => format!("{} h {} min", secs / 3600, secs % 3600 / 60),
        _ => format!("{} days {} h", secs / 86_400, secs % 86_400 / 3600),
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
        // The files that the server's tests hold with real gateways, without what they say to readers of files.
        let text = match self {
            Self::Caddy => include_str!("../../../../deploy/gateways/Caddyfile"),
            Self::Nginx => include_str!("../../../../deploy/gateways/nginx.conf"),
            Self::Traefik => include_str!("../../../../deploy/gateways/traefik.yml"),
            Self::Curl => {
                "curl https://quota.example.com/v1/check \\\n  -H \"Authorization: Bearer qs_YOUR_SERVICE_TOKEN\" \\\n  \
                 -H \"Content-Type: application/json\" \\\n  -d '{\"key\": \"qk_…\", \"endpoint\": \"GET /orders\"}'"
            }
        };
        let text = match text.split_once("\n\n") {
            Some((_, configuration)) if text.starts_with('#') => configuration.trim_end(),
            _ => text,
        };
        text.replace("https://quota.example.com", origin)
            .replace("quota.example.com", host)
            .replace("qs_YOUR_SERVICE_TOKEN", token)
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
        assert_eq!(relative(now, now), "just now");
        assert_eq!(relative(now - 59_000, now), "just now");
        assert_eq!(relative(now + 59_000, now), "in less than a minute");
        assert_eq!(relative(now - 61_000, now), "1 minute ago");
        assert_eq!(relative(now - 7_200_000, now), "2 hours ago");
        assert_eq!(relative(now + 86_400_000, now), "in 1 day");
    }

    #[test]
    fn a_long_wait_is_not_told_in_seconds() {
        assert_eq!(wait(0), "0 s");
        assert_eq!(wait(119), "119 s");
        assert_eq!(wait(120), "2 min 0 s");
        assert_eq!(wait(40_000), "11 h 6 min");
        assert_eq!(wait(2_000_000), "23 days 3 h");
    }

    #[test]
    fn every_gateway_gets_the_token_and_the_address() {
        for gateway in Gateway::ALL {
            let text = gateway.configuration("http://localhost:8080", "qs_secret");
            assert!(text.contains("qs_secret"), "{text}");
            assert!(
                text.contains("http://localhost:8080") && text.contains("/v1/"),
                "{text}"
            );
            assert!(
                !text.contains("quota.example.com") && !text.starts_with('#'),
                "{text}"
            );
        }
    }
}
