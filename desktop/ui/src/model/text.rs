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
    HaProxy,
    Traefik,
    Curl,
}

impl Gateway {
    pub const ALL: [Self; 5] = [
        Self::Caddy,
        Self::Nginx,
        Self::HaProxy,
        Self::Traefik,
        Self::Curl,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Caddy => "Caddy",
            Self::Nginx => "nginx",
            Self::HaProxy => "HAProxy",
            Self::Traefik => "Traefik",
            Self::Curl => "curl",
        }
    }

    /// The configuration for a server at `origin`, such as `https://quota.example.com`.
    pub fn configuration(self, origin: &str, token: &str) -> String {
        // The files that the server's tests run in real gateways, without their introductions.
        let text = match self {
            Self::Caddy => body(include_str!("../../../../deploy/gateways/Caddyfile")).to_owned(),
            Self::Nginx => body(include_str!("../../../../deploy/gateways/nginx.conf")).to_owned(),
            Self::HaProxy => format!(
                "{}\n\n# /etc/haproxy/quota.lua:\n\n{}",
                body(include_str!("../../../../deploy/gateways/haproxy.cfg")),
                include_str!("../../../../deploy/gateways/quota.lua").trim_end(),
            ),
            Self::Traefik => body(include_str!("../../../../deploy/gateways/traefik.yml")).to_owned(),
            Self::Curl => {
                "curl https://quota.example.com/v1/check \\\n  -H \"Authorization: Bearer qs_YOUR_SERVICE_TOKEN\" \\\n  \
                 -H \"Content-Type: application/json\" \\\n  -d '{\"key\": \"qk_…\", \"endpoint\": \"GET /orders\"}'"
                    .to_owned()
            }
        };
        let (scheme, authority) = origin.split_once("://").unwrap_or(("https", origin));
        let default = if scheme == "http" { 80 } else { 443 };
        let (host, address) = match authority.rsplit_once(':') {
            Some((host, port)) if port.bytes().all(|it| it.is_ascii_digit()) => {
                (host, authority.to_owned())
            }
            _ => (authority, format!("{authority}:{default}")),
        };
        // nginx and HAProxy name scheme, address and certificate apart.
        let text = if scheme == "http" {
            text.replace("https://quota/", "http://quota/")
                .lines()
                .map(|line| line.split(" ssl verify required").next().unwrap_or(line))
                .filter(|line| !line.trim_start().starts_with("proxy_ssl_"))
                .collect::<Vec<_>>()
                .join("\n")
        } else {
            text
        };
        text.replace("quota.example.com:443", &address)
            .replace("https://quota.example.com", origin)
            .replace("quota.example.com", host)
            .replace("qs_YOUR_SERVICE_TOKEN", token)
    }
}

/// A file without the comment at its start.
fn body(text: &str) -> &str {
    match text.split_once("\n\n") {
        Some((_, body)) if text.starts_with('#') => body.trim_end(),
        _ => text,
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
                text.contains("localhost:8080") && text.contains("/v1/"),
                "{text}"
            );
            assert!(
                !text.contains("quota.example.com") && !text.starts_with('#'),
                "{text}"
            );
            assert!(!text.contains("https://"), "{text}");
        }
    }

    #[test]
    fn a_gateway_verifies_the_certificate_of_a_server_with_tls() {
        let nginx = Gateway::Nginx.configuration("https://quota.corp.example", "qs_secret");
        for line in [
            "server quota.corp.example:443;",
            "proxy_pass https://quota/v1/forward-auth?deny=403;",
            "proxy_ssl_name quota.corp.example;",
            "proxy_ssl_verify on;",
        ] {
            assert!(nginx.contains(line), "{line} is not in\n{nginx}");
        }
        let haproxy =
            Gateway::HaProxy.configuration("https://quota.corp.example:8443", "qs_secret");
        assert!(
            haproxy.contains("server quota quota.corp.example:8443 ssl verify required")
                && haproxy.contains("verifyhost quota.corp.example\n"),
            "{haproxy}"
        );
        let plain = Gateway::HaProxy.configuration("http://127.0.0.1:8080", "qs_secret");
        assert!(plain.contains("server quota 127.0.0.1:8080\n"), "{plain}");
        let plain = Gateway::Nginx.configuration("http://127.0.0.1:8080", "qs_secret");
        assert!(!plain.contains("ssl"), "{plain}");
    }
}
