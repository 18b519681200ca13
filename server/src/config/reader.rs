//! Parses one setting at a time and collects errors. Error messages never contain a secret.

use std::{
    fs::File,
    io::{self, Read as _},
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    path::Path,
    time::Duration,
};

use ipnet::IpNet;
use secrecy::{ExposeSecret as _, SecretString};
use tokio_postgres::config::Host;
use url::Url;

/// Collects errors, so that they can all be reported together.
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
                self.0
                    .push(format!("{variable}: {message}, got {}", quoted(text)));
                fallback
            }
        }
    }

    /// Reads a setting with fixed choices. If the value is invalid, records an error and returns the first choice.
    pub(super) fn choice<T: Copy, const N: usize>(
        &mut self,
        variable: &str,
        text: &str,
        choices: &[(&str, T); N],
    ) -> T {
        self.read(variable, text, choices[0].1, |text| {
            let choice = choices.iter().find(|(name, _)| *name == text);
            choice.map(|(_, value)| *value).ok_or_else(|| {
                let names = choices.iter().map(|(name, _)| *name).collect::<Vec<_>>();
                format!("must be {}", names.join(" or "))
            })
        })
    }

    pub(super) fn number(&mut self, variable: &str, text: &str, range: RangeInclusive<u64>) -> u64 {
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

    /// Reads a number. Returns `None` for an empty string.
    pub(super) fn optional_number(
        &mut self,
        variable: &str,
        text: &str,
        range: RangeInclusive<u64>,
    ) -> Option<u64> {
        (!text.trim().is_empty()).then(|| self.number(variable, text, range))
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

    /// Reads a number of days.
    pub(super) fn days(
        &mut self,
        variable: &str,
        text: &str,
        range: RangeInclusive<u64>,
    ) -> Duration {
        Duration::from_secs(self.number(variable, text, range) * 24 * 60 * 60)
    }

    /// Reads a duration. `range` is in seconds.
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

    /// Reads a value from its variable, or from the file that the `…_FILE` variable names. Also returns the name of the
    /// variable that was used, for error messages.
    pub(super) fn or_file(&mut self, variable: &str, text: &str, path: &str) -> Sourced {
        let value = |text: &str| (!text.is_empty()).then(|| SecretString::from(text));
        let path = path.trim();
        if path.is_empty() {
            return Sourced {
                variable: variable.to_owned(),
                value: value(text.trim()),
            };
        }
        let from_file = format!("{variable}_FILE");
        if !text.trim().is_empty() {
            self.0.push(format!(
                "{from_file}: {variable} is also set; set only one of them"
            ));
            return Sourced {
                variable: variable.to_owned(),
                value: value(text.trim()),
            };
        }
        let text = read_secret(Path::new(path)).unwrap_or_else(|message| {
            self.0.push(format!("{from_file}: {message}"));
            String::new()
        });
        Sourced {
            variable: from_file,
            value: value(&text),
        }
    }

    pub(super) fn secret(
        &mut self,
        variable: &str,
        text: &str,
        path: &str,
    ) -> Option<SecretString> {
        let Sourced { variable, value } = self.or_file(variable, text, path);
        let length = value.as_ref()?.expose_secret().len();
        if length < 32 {
            // The value is not shown, because it may be a truncated secret.
            self.0.push(format!(
                "{variable}: must be at least 32 characters long, but has {length}"
            ));
        }
        value
    }
}

/// Returns a value in quotation marks. Does not return a URL that may contain a password, or a part of such a URL.
fn quoted(text: &str) -> String {
    let authority = text.split_once("://").map_or("", |(_, rest)| rest);
    let authority = authority.split(['/', '?', '#']).next().unwrap_or_default();
    let has_port = |it: &str| it.bytes().all(|it| it.is_ascii_digit());
    let has_password = match authority.rsplit_once(':') {
        // An IPv6 address is in brackets.
        Some((_, rest)) => !has_port(rest) && !authority.ends_with(']'),
        None => false,
    };
    if has_password || text.contains(':') && text.contains('@') {
        "a URL with a user or password".to_owned()
    } else {
        format!("{text:?}")
    }
}

/// A value, and the name of the variable that contains the value or the path of its file.
pub(super) struct Sourced {
    pub(super) variable: String,
    pub(super) value: Option<SecretString>,
}

/// The maximum size of a file with a secret, in bytes. A larger file is most likely the wrong file.
const SECRET_FILE_MAX: u64 = 64 * 1024;

/// Returns a file's content without surrounding whitespace, such as the line break that editors add. Errors do not
/// contain the path, which may be a secret that was set in the wrong variable.
fn read_secret(path: &Path) -> Result<String, String> {
    if path.to_string_lossy().contains("://") {
        return Err("must be the path of a file, not a URL".to_owned());
    }
    let read = || {
        let mut bytes = Vec::new();
        File::open(path)?
            .take(SECRET_FILE_MAX + 1)
            .read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().map_err(|error: io::Error| format!("cannot read the file: {error}"))?;
    if bytes.len() as u64 > SECRET_FILE_MAX {
        return Err("the file is larger than 64 KiB".to_owned());
    }
    let text = String::from_utf8(bytes).map_err(|_| "the file is not UTF-8 text".to_owned())?;
    let text = text.trim();
    if text.is_empty() {
        return Err("the file is empty".to_owned());
    }
    Ok(text.to_owned())
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

/// Accepts `postgres://…` URLs and libpq's keyword format.
pub(super) fn database_url(text: &str) -> Result<(), String> {
    // The parser's message may contain the password.
    let config = text.parse::<tokio_postgres::Config>().map_err(
        |_| "must be a PostgreSQL address such as postgres://user:password@host/database",
    )?;
    // The parser ends the password at the first `@`, so the rest of a password with an unencoded `@` becomes part of
    // the host or database name.
    let is_cut = |host: &Host| matches!(host, Host::Tcp(name) if name.contains('@'));
    let address = text.split_once("://").map_or("", |(_, rest)| rest);
    let address = address.split('?').next().unwrap_or_default();
    if config.get_hosts().iter().any(is_cut) || address.matches('@').count() > 1 {
        return Err("must percent-encode special characters, such as @ in passwords".into());
    }
    Ok(())
}

pub(super) fn public_url(text: &str) -> Result<String, String> {
    let url = Url::parse(text)
        .ok()
        .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    let url = url.ok_or("must be an http or https address")?;
    if url.query().is_some() || url.fragment().is_some() {
        return Err("must not have a query or fragment".into());
    }
    Ok(url.as_str().trim_end_matches('/').to_owned())
}

pub(super) fn origin(text: &str) -> Result<String, String> {
    if text == "*" {
        return Ok(text.to_owned());
    }
    let bad = || {
        format!(
            "{} is not an origin such as https://app.example.com",
            quoted(text)
        )
    };
    let url = Url::parse(text).map_err(|_| bad())?;
    let origin = url.origin();
    if !origin.is_tuple() || url.path() != "/" || url.query().is_some() {
        return Err(bad());
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
    // Braces are not allowed, because Redis Cluster would hash only the part of a key between them.
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

/// Parses an address. Returns `None` for `off` or an empty string.
pub(super) fn optional_address(text: &str) -> Result<Option<SocketAddr>, String> {
    match text {
        "off" | "" => Ok(None),
        text => address(text).map(Some),
    }
}

pub(super) fn network(text: &str) -> Result<IpNet, String> {
    text.parse::<IpNet>()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .map_err(|_| format!("{} is not a network such as 10.0.0.0/8", quoted(text)))
}
