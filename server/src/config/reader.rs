//! How one setting is read, and what is said of it when it is wrong.

use std::{net::SocketAddr, ops::RangeInclusive, time::Duration};

use ipnet::IpNet;
use secrecy::SecretString;
use url::Url;

/// Collects faults while reading on, so that all are told at once.
pub(super) struct Reader(pub(super) Vec<String>);

impl Reader {
    pub(super) fn read<T>(
        &mut self,
        variable: &str,
        text: &str,
        fallback: T,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> T {
        match parse(text.trim()) {
            Ok(value) => value,
            Err(message) => {
                self.0.push(format!("{variable}: {message}, is {text:?}"));
                fallback
            }
        }
    }

    pub(super) fn number(
        &mut self,
        variable: &str,
        text: &str,
        range: std::ops::RangeInclusive<u64>,
    ) -> u64 {
        self.read(variable, text, *range.start(), |text| {
            text.parse()
                .ok()
                .filter(|n| range.contains(n))
                .ok_or_else(|| {
                    format!(
                        "must be a whole number from {} to {}",
                        range.start(),
                        range.end()
                    )
                })
        })
    }

    pub(super) fn count(
        &mut self,
        variable: &str,
        text: &str,
        range: RangeInclusive<u64>,
    ) -> usize {
        usize::try_from(self.number(variable, text, range)).unwrap_or(usize::MAX)
    }

    pub(super) fn per_minute(&mut self, variable: &str, text: &str) -> u32 {
        u32::try_from(self.number(variable, text, 0..=1_000_000)).unwrap_or_default()
    }

    /// In seconds.
    pub(super) fn duration(
        &mut self,
        variable: &str,
        text: &str,
        range: RangeInclusive<u64>,
    ) -> Duration {
        let range = Duration::from_secs(*range.start())..=Duration::from_secs(*range.end());
        self.duration_within(variable, text, range)
    }

    pub(super) fn duration_within(
        &mut self,
        variable: &str,
        text: &str,
        range: RangeInclusive<Duration>,
    ) -> Duration {
        self.read(variable, text, *range.start(), |text| {
            duration(text)
                .filter(|it| range.contains(it))
                .ok_or_else(|| {
                    format!(
                        "must be a duration such as 5s or 500ms, from {:?} to {:?}",
                        range.start(),
                        range.end()
                    )
                })
        })
    }

    pub(super) fn secret(&mut self, variable: &str, text: &str) -> Option<SecretString> {
        if text.is_empty() {
            return None;
        }
        if text.len() < 32 {
            // Its value is not shown: it may be most of the real one.
            self.0.push(format!(
                "{variable}: must be at least 32 characters long, has {}",
                text.len()
            ));
        }
        Some(SecretString::from(text))
    }
}

pub(super) fn duration(text: &str) -> Option<Duration> {
    let (number, unit) = if let Some(number) = text.strip_suffix("ms") {
        (number, 1)
    } else if let Some(number) = text.strip_suffix('s') {
        (number, 1000)
    } else {
        (text.strip_suffix('m')?, 60_000)
    };
    let millis = number.trim().parse::<u64>().ok()?.checked_mul(unit)?;
    Some(Duration::from_millis(millis))
}

/// How to reach a database as `postgres://…` or in the keywords of libpq.
pub(super) fn database_url(text: &str) -> Result<(), String> {
    text.parse::<tokio_postgres::Config>()
        .map(drop)
        .map_err(|error| {
            // Neither the value nor the parser's quote of it: both can hold the password.
            let _ = error;
            "must be a PostgreSQL address such as postgres://user:password@host/database".to_owned()
        })
}

pub(super) fn public_url(text: &str) -> Result<String, String> {
    let url = Url::parse(text)
        .ok()
        .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    let url = url.ok_or("must be an http or https address")?;
    if url.query().is_some() || url.fragment().is_some() {
        return Err("must have no query and no fragment".into());
    }
    Ok(url.as_str().trim_end_matches('/').to_owned())
}

pub(super) fn origin(text: &str) -> Result<String, String> {
    if text == "*" {
        return Ok(text.to_owned());
    }
    let url = Url::parse(text)
        .map_err(|_| format!("{text:?} is no origin such as https://app.example.com"))?;
    let origin = url.origin();
    if !origin.is_tuple() || url.path() != "/" || url.query().is_some() {
        return Err(format!(
            "{text:?} is no origin such as https://app.example.com"
        ));
    }
    Ok(origin.ascii_serialization())
}

pub(super) fn list<T>(
    text: &str,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<Vec<T>, String> {
    text.split(',')
        .map(str::trim)
        .filter(|item| !item.is_empty())
        .map(parse)
        .collect()
}

pub(super) fn prefix(text: &str) -> Result<String, String> {
    // No braces: what stands in them decides where a cluster keeps a key.
    let fits = |c: char| c.is_ascii_alphanumeric() || "_-.:".contains(c);
    if (1..=64).contains(&text.len()) && text.chars().all(fits) {
        Ok(text.to_owned())
    } else {
        Err("must be 1 to 64 letters, digits, _, -, . or :".into())
    }
}

pub(super) fn boolean(text: &str) -> Result<bool, String> {
    text.parse().map_err(|_| "must be true or false".to_owned())
}

pub(super) fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| "must be an address and a port such as 127.0.0.1:8080".to_owned())
}

pub(super) fn network(text: &str) -> Result<IpNet, String> {
    text.parse::<IpNet>()
        .or_else(|_| text.parse::<std::net::IpAddr>().map(IpNet::from))
        .map_err(|_| format!("{text:?} is no network such as 10.0.0.0/8"))
}
