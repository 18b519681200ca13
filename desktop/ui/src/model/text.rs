//! Formats numbers, times, and names for display.

pub use quota_common::number::grouped as number;
use quota_common::page::TOTAL_MAX;

/// Formats a count with its noun.
pub fn count(n: u64, one: &str, many: &str) -> String {
    format!("{} {}", number(n), if n == 1 { one } else { many })
}

/// Formats the number of items in a list. The server counts only up to [`TOTAL_MAX`].
pub fn list_total(n: u64) -> String {
    let more = if n < TOTAL_MAX { "" } else { "+" };
    format!("{}{more}", number(n))
}

/// Joins items into a list for use in a sentence, such as `a, b and c`.
pub fn enumerated<T: AsRef<str>>(items: &[T]) -> String {
    match items {
        [] => String::new(),
        [only] => only.as_ref().to_owned(),
        [most @ .., last] => {
            let most: Vec<&str> = most.iter().map(AsRef::as_ref).collect();
            format!("{} and {}", most.join(", "), last.as_ref())
        }
    }
}

pub fn capitalized(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| {
        format!("{}{}", first.to_ascii_uppercase(), chars.as_str())
    })
}

/// Quotes a name for use in a sentence: truncates the name, and isolates its text direction from the surrounding text.
pub fn quoted(name: &str) -> String {
    const MAX_CHARS: usize = 60;
    let mut short: String = name.chars().take(MAX_CHARS).collect();
    if name.chars().nth(MAX_CHARS).is_some() {
        short.push('…');
    }
    // Bidirectional control characters could end the isolation and affect the rest of the sentence.
    short.retain(|c| !matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'));
    format!("\"\u{2068}{short}\u{2069}\"")
}

/// Formats a duration in a single unit, such as `3 hours`.
fn duration(secs: u64) -> String {
    match secs {
        0..3600 => count(secs / 60, "minute", "minutes"),
        3600..86_400 => count(secs / 3600, "hour", "hours"),
        86_400..63_115_200 => count(secs / 86_400, "day", "days"),
        _ => count(secs / 31_557_600, "year", "years"),
    }
}

/// Formats a time relative to `now`. Both times are in milliseconds since the Unix epoch.
pub fn relative(at: i64, now: i64) -> String {
    let secs = (at - now).unsigned_abs() / 1000;
    match (at > now, secs) {
        (false, 0..60) => "just now".to_owned(),
        (true, 0..60) => "in less than a minute".to_owned(),
        (true, _) => format!("in {}", duration(secs)),
        (false, _) => format!("{} ago", duration(secs)),
    }
}

/// Formats a time in UTC, such as `25 Nov 2026, 23:12 UTC`. `millis` is in milliseconds since the Unix epoch.
pub fn date_time(millis: i64) -> String {
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let minutes = millis.div_euclid(60_000);
    let (days, minute) = (minutes.div_euclid(1440), minutes.rem_euclid(1440));
    // The algorithm is from Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms". Years start in March, so
    // that a leap day is the last day of its year.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let year = era * 400 + year_of_era + i64::from(month_from_march >= 10);
    let month = usize::try_from((month_from_march + 2) % 12)
        .ok()
        .and_then(|at| MONTHS.get(at))
        .copied()
        .unwrap_or_default();
    format!(
        "{day} {month} {year}, {:02}:{:02} UTC",
        minute / 60,
        minute % 60
    )
}

/// Formats the remaining time of a countdown.
pub fn countdown(secs: u64) -> String {
    match secs {
        0..120 => format!("{secs} s"),
        120..7200 => format!("{} min {} s", secs / 60, secs % 60),
        7200..172_800 => format!("{} h {} min", secs / 3600, secs % 3600 / 60),
        _ => format!("{} days {} h", secs / 86_400, secs % 86_400 / 3600),
    }
}

/// Returns a command that tests a key.
pub fn curl(origin: &str, key: &str) -> String {
    format!("curl -i {origin}/v1/echo -H \"X-API-Key: {key}\"")
}

/// A gateway whose configuration the console shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gateway {
    Caddy,
    Nginx,
    HaProxy,
    Traefik,
    Envoy,
    Curl,
}

impl Gateway {
    pub const ALL: [Self; 6] = [
        Self::Caddy,
        Self::Nginx,
        Self::HaProxy,
        Self::Traefik,
        Self::Envoy,
        Self::Curl,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Caddy => "Caddy",
            Self::Nginx => "nginx",
            Self::HaProxy => "HAProxy",
            Self::Traefik => "Traefik",
            Self::Envoy => "Envoy",
            Self::Curl => "curl",
        }
    }

    /// Returns the configuration for a server at `origin`, such as `https://quota.example.com`. `files` contains the
    /// gateways' configuration files, each below a line with the file's name.
    pub fn configuration(self, files: &str, origin: &str, token: &str) -> String {
        // The server's tests run real gateways with these files. The console does not show the files' leading comments.
        let file = |name: &str| {
            let start = format!("=== {name}\n");
            let text = files.split_once(&*start).map_or("", |(_, text)| text);
            text.split("\n=== ").next().unwrap_or_default()
        };
        let text = match self {
            Self::Caddy => body(file("Caddyfile")).to_owned(),
            Self::Nginx => body(file("nginx.conf")).to_owned(),
            Self::HaProxy => format!(
                "{}\n\n# /etc/haproxy/quota.lua:\n\n{}",
                body(file("haproxy.cfg")),
                file("quota.lua").trim_end(),
            ),
            Self::Traefik => body(file("traefik.yml")).to_owned(),
            Self::Envoy => body(file("envoy.yaml")).to_owned(),
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
        // In nginx, HAProxy and Envoy, the scheme, the address, and the certificate are configured separately.
        let text = if scheme == "http" {
            text.split("\n    transport_socket:")
                .next()
                .unwrap_or_default()
                .replace("https://quota/", "http://quota/")
                .lines()
                .map(|line| line.split(" ssl verify required").next().unwrap_or(line))
                .filter(|line| !line.trim_start().starts_with("proxy_ssl_"))
                .collect::<Vec<_>>()
                .join("\n")
        } else {
            text
        };
        let port = address.rsplit(':').next().unwrap_or_default();
        text.replace("quota.example.com:443", &address)
            .replace(
                "quota.example.com, port_value: 443",
                &format!("quota.example.com, port_value: {port}"),
            )
            .replace("https://quota.example.com", origin)
            .replace("quota.example.com", host)
            .replace("qs_YOUR_SERVICE_TOKEN", token)
    }
}

/// Removes the leading comment.
fn body(text: &str) -> &str {
    match text.split_once("\n\n") {
        Some((_, body)) if text.starts_with('#') => body.trim_end(),
        _ => text.trim_end(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILES: &str = concat!(
        "=== Caddyfile\n",
        include_str!("../../../../deploy/gateways/Caddyfile"),
        "\n=== nginx.conf\n",
        include_str!("../../../../deploy/gateways/nginx.conf"),
        "\n=== haproxy.cfg\n",
        include_str!("../../../../deploy/gateways/haproxy.cfg"),
        "\n=== quota.lua\n",
        include_str!("../../../../deploy/gateways/quota.lua"),
        "\n=== traefik.yml\n",
        include_str!("../../../../deploy/gateways/traefik.yml"),
        "\n=== envoy.yaml\n",
        include_str!("../../../../deploy/gateways/envoy.yaml"),
    );

    #[test]
    fn total_of_a_long_list_is_a_lower_bound() {
        assert_eq!(list_total(9999), "9,999");
        assert_eq!(list_total(10_000), "10,000+");
    }

    #[test]
    fn thousands_are_separated() {
        assert_eq!(number(0), "0");
        assert_eq!(number(999), "999");
        assert_eq!(number(1_234_567), "1,234,567");
    }

    #[test]
    fn quoted_name_cannot_affect_its_sentence() {
        assert_eq!(quoted("Ada"), "\"\u{2068}Ada\u{2069}\"");
        assert_eq!(quoted("a\u{202e}b\u{2069}"), "\"\u{2068}ab\u{2069}\"");
        assert_eq!(quoted(&"x".repeat(200)).chars().count(), 65);
    }

    #[test]
    fn relative_times_use_their_largest_unit() {
        let now = 1_785_738_360_000;
        assert_eq!(relative(now, now), "just now");
        assert_eq!(relative(now - 59_000, now), "just now");
        assert_eq!(relative(now + 59_000, now), "in less than a minute");
        assert_eq!(relative(now - 61_000, now), "1 minute ago");
        assert_eq!(relative(now - 7_200_000, now), "2 hours ago");
        assert_eq!(relative(now + 86_400_000, now), "in 1 day");
        assert_eq!(relative(now + 700 * 86_400_000, now), "in 700 days");
        assert_eq!(relative(now + 62_916 * 86_400_000, now), "in 172 years");
    }

    #[test]
    fn dates_are_in_utc() {
        assert_eq!(date_time(0), "1 Jan 1970, 00:00 UTC");
        assert_eq!(date_time(951_782_399_999), "28 Feb 2000, 23:59 UTC");
        assert_eq!(date_time(951_782_400_000), "29 Feb 2000, 00:00 UTC");
        assert_eq!(date_time(1_785_738_360_000), "3 Aug 2026, 06:26 UTC");
        assert_eq!(date_time(1_798_761_540_000), "31 Dec 2026, 23:59 UTC");
        assert_eq!(date_time(-60_000), "31 Dec 1969, 23:59 UTC");
    }

    #[test]
    fn messages_begin_with_a_capital() {
        assert_eq!(capitalized("must be at least 1"), "Must be at least 1");
        assert_eq!(capitalized(""), "");
    }

    #[test]
    fn long_countdowns_use_larger_units() {
        assert_eq!(countdown(0), "0 s");
        assert_eq!(countdown(119), "119 s");
        assert_eq!(countdown(120), "2 min 0 s");
        assert_eq!(countdown(40_000), "11 h 6 min");
        assert_eq!(countdown(2_000_000), "23 days 3 h");
    }

    #[test]
    fn every_configuration_contains_the_token_and_the_address() {
        for gateway in Gateway::ALL {
            let text = gateway.configuration(FILES, "http://localhost:8080", "qs_secret");
            assert!(text.contains("qs_secret"), "{text}");
            let address = match gateway {
                Gateway::Envoy => "{ address: localhost, port_value: 8080 }",
                _ => "localhost:8080",
            };
            assert!(text.contains(address) && text.contains("/v1/"), "{text}");
            assert!(
                !text.contains("quota.example.com") && !text.starts_with('#'),
                "{text}"
            );
            assert!(!text.contains("https://"), "{text}");
        }
    }

    #[test]
    fn a_gateway_verifies_the_certificate_of_a_server_with_tls() {
        let nginx = Gateway::Nginx.configuration(FILES, "https://quota.corp.example", "qs_secret");
        for line in [
            "server quota.corp.example:443;",
            "proxy_pass https://quota/v1/forward-auth?deny=403;",
            "proxy_ssl_name quota.corp.example;",
            "proxy_ssl_verify on;",
        ] {
            assert!(nginx.contains(line), "{line} is not in\n{nginx}");
        }
        let haproxy =
            Gateway::HaProxy.configuration(FILES, "https://quota.corp.example:8443", "qs_secret");
        assert!(
            haproxy.contains("server quota quota.corp.example:8443 ssl verify required")
                && haproxy.contains("verifyhost quota.corp.example\n"),
            "{haproxy}"
        );
        let plain = Gateway::HaProxy.configuration(FILES, "http://127.0.0.1:8080", "qs_secret");
        assert!(plain.contains("server quota 127.0.0.1:8080\n"), "{plain}");
        let plain = Gateway::Nginx.configuration(FILES, "http://127.0.0.1:8080", "qs_secret");
        assert!(!plain.contains("ssl"), "{plain}");

        let envoy =
            Gateway::Envoy.configuration(FILES, "https://quota.corp.example:8443", "qs_secret");
        for line in [
            "{ address: quota.corp.example, port_value: 8443 }",
            "sni: quota.corp.example\n",
            "matcher: { exact: quota.corp.example }",
        ] {
            assert!(envoy.contains(line), "{line} is not in\n{envoy}");
        }
        let plain = Gateway::Envoy.configuration(FILES, "http://127.0.0.1:8080", "qs_secret");
        assert!(!plain.contains("tls"), "{plain}");
    }
}
