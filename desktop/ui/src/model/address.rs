//! URLs within the console: pages and query strings.

use std::fmt::{self, Write as _};

use quota_common::{ApiKeyId, WebhookId};

use super::role::Right;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConsolePage {
    SignIn,
    Register,
    Home,
    Usage,
    Plans,
    ApiKeys,
    ApiKey(ApiKeyId),
    ServiceTokens,
    Webhooks,
    Webhook(WebhookId),
    Alerts,
    Audit,
    Billing,
    Settings,
    NotFound,
}

impl ConsolePage {
    pub fn of(path: &str) -> Self {
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        match parts[..] {
            ["console"] => Self::Home,
            ["console", "sign-in"] => Self::SignIn,
            ["console", "register"] => Self::Register,
            ["console", "usage"] => Self::Usage,
            ["console", "plans"] => Self::Plans,
            ["console", "api-keys"] => Self::ApiKeys,
            ["console", "api-keys", id] => id.parse().map_or(Self::NotFound, Self::ApiKey),
            ["console", "service-tokens"] => Self::ServiceTokens,
            ["console", "webhooks"] => Self::Webhooks,
            ["console", "webhooks", id] => id.parse().map_or(Self::NotFound, Self::Webhook),
            ["console", "alerts"] => Self::Alerts,
            ["console", "audit"] => Self::Audit,
            ["console", "billing"] => Self::Billing,
            ["console", "settings"] => Self::Settings,
            _ => Self::NotFound,
        }
    }

    /// Returns the right that the page requires, and the name of what the page shows, as in `Your role doesn't have
    /// access to plans`.
    pub const fn right(self) -> (Right, &'static str) {
        match self {
            Self::Plans => (Right::Read, "plans"),
            Self::ApiKeys | Self::ApiKey(_) => (Right::Read, "API keys"),
            Self::ServiceTokens => (Right::Read, "service tokens"),
            Self::Webhooks | Self::Webhook(_) => (Right::Read, "webhooks"),
            Self::Audit => (Right::Read, "the audit log"),
            Self::Billing => (Right::Bill, "billing"),
            Self::SignIn
            | Self::Register
            | Self::Home
            | Self::Usage
            | Self::Alerts
            | Self::Settings
            | Self::NotFound => (Right::Any, ""),
        }
    }
}

/// A decoded query string. `Display` writes the encoded string with a leading `?`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Query(Vec<(String, String)>);

impl Query {
    pub fn read(text: &str) -> Self {
        let pairs = text
            .trim_start_matches('?')
            .split('&')
            .filter(|pair| !pair.is_empty())
            .map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        Self(
            pairs
                .map(|(name, value)| (decoded(name), decoded(value)))
                .collect(),
        )
    }

    /// Returns the value of a parameter. Returns `None` if the parameter is missing or empty.
    pub fn get(&self, name: &str) -> Option<String> {
        self.0
            .iter()
            .find(|(it, _)| it == name)
            .map(|(_, value)| value.clone())
            .filter(|value| !value.is_empty())
    }

    /// Sets a parameter, or removes it if `value` is empty.
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.0.retain(|(it, _)| it != name);
        if !value.is_empty() {
            self.0.push((name.to_owned(), value.to_owned()));
        }
        self
    }
}

impl fmt::Display for Query {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (name, value)) in self.0.iter().enumerate() {
            let separator = if at == 0 { '?' } else { '&' };
            write!(f, "{separator}{}={}", encoded(name), encoded(value))?;
        }
        Ok(())
    }
}

pub fn encoded(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..2).and_then(|two| std::str::from_utf8(two).ok());
        match (
            first,
            digits.and_then(|two| u8::from_str_radix(two, 16).ok()),
        ) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            (b'+', _) => {
                bytes.push(b' ');
                rest = after;
            }
            _ => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_maps_to_its_page() {
        assert_eq!(ConsolePage::of("/console"), ConsolePage::Home);
        assert_eq!(ConsolePage::of("/console/"), ConsolePage::Home);
        assert_eq!(ConsolePage::of("/console/plans"), ConsolePage::Plans);
        assert_eq!(ConsolePage::of("/console/usage"), ConsolePage::Usage);
        let id = "019ab4e1-7c00-7000-8000-0000000000b1";
        let page = ConsolePage::of(&format!("/console/api-keys/{id}"));
        assert_eq!(page, ConsolePage::ApiKey(id.parse().expect("valid ID")));
        assert_eq!(
            ConsolePage::of("/console/api-keys/x"),
            ConsolePage::NotFound
        );
        let page = ConsolePage::of(&format!("/console/webhooks/{id}"));
        assert_eq!(page, ConsolePage::Webhook(id.parse().expect("valid ID")));
        assert_eq!(
            ConsolePage::of("/console/webhooks/x"),
            ConsolePage::NotFound
        );
        assert_eq!(ConsolePage::of("/console/alerts"), ConsolePage::Alerts);
        assert_eq!(ConsolePage::of("/console/plans/x"), ConsolePage::NotFound);
        assert_eq!(ConsolePage::of("/"), ConsolePage::NotFound);
    }

    #[test]
    fn query_survives_a_round_trip() {
        let all = Query::default()
            .with("search", "a & b = ü + %41")
            .with("plan_id", "7");
        assert_eq!(Query::read(&all.to_string()), all);
        assert_eq!(all.get("search").as_deref(), Some("a & b = ü + %41"));
        assert_eq!(all.clone().with("search", "").to_string(), "?plan_id=7");
        assert_eq!(Query::read("").to_string(), "");
    }

    #[test]
    fn malformed_query_is_read_leniently() {
        let query = Query::read("?a=1+2&b&c=%zz%F0&a=3&=&%");
        assert_eq!(query.get("a").as_deref(), Some("1 2"));
        assert_eq!(query.get("b"), None);
        assert_eq!(query.get("c").as_deref(), Some("%zz\u{fffd}"));
    }
}
