use std::fmt;

use url::{Host, Url};

/// A server's origin, which must use HTTPS unless the server is on this computer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Server(Url);

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAddress {
    #[error("Enter an address such as https://quota.example.com")]
    Malformed,
    #[error("Use https://. http:// is only allowed for localhost")]
    Insecure,
    #[error("Enter only the server's address, without a path or user name")]
    NotAnOrigin,
}

impl Server {
    /// Parses an address that the user has typed. If the address has no scheme, assumes HTTP for this computer and
    /// HTTPS for others.
    pub fn parse(text: &str) -> Result<Self, InvalidAddress> {
        let text = text.trim();
        let url = if text.contains("://") {
            Url::parse(text)
        } else {
            let plain = Url::parse(&format!("http://{text}"));
            match plain {
                Ok(url) if is_loopback(&url) => Ok(url),
                _ => Url::parse(&format!("https://{text}")),
            }
        };
        let url = url.map_err(|_| InvalidAddress::Malformed)?;
        match url.scheme() {
            "https" => {}
            "http" if is_loopback(&url) => {}
            "http" => return Err(InvalidAddress::Insecure),
            _ => return Err(InvalidAddress::Malformed),
        }
        let is_origin = url.username().is_empty()
            && url.password().is_none()
            && matches!(url.path(), "" | "/")
            && url.query().is_none()
            && url.fragment().is_none();
        if is_origin {
            Ok(Self(url))
        } else {
            Err(InvalidAddress::NotAnOrigin)
        }
    }

    pub fn is_loopback(&self) -> bool {
        is_loopback(&self.0)
    }

    /// Returns the URL of a path on this server. `path` must start with a slash.
    pub fn at(&self, path: &str) -> Url {
        let mut url = self.0.clone();
        url.set_path(path);
        url
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.origin().ascii_serialization())
    }
}

/// Returns whether a URL points to this computer.
pub fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(Host::Ipv4(ip)) => ip.is_loopback(),
        Some(Host::Ipv6(ip)) => ip.is_loopback(),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<String, InvalidAddress> {
        Server::parse(text).map(|server| server.to_string())
    }

    #[test]
    fn plain_http_is_allowed_only_on_this_computer() {
        for local in [
            "http://localhost:8080",
            "http://127.0.0.1:8080",
            "http://[::1]:8080",
        ] {
            assert_eq!(parsed(local).as_deref(), Ok(local));
        }
        for remote in [
            "http://quota.example.com",
            "http://10.0.0.1:8080",
            "http://localhost.example.com",
            "http://127.0.0.1.example.com",
        ] {
            assert_eq!(parsed(remote), Err(InvalidAddress::Insecure), "{remote}");
        }
    }

    #[test]
    fn scheme_is_optional() {
        assert_eq!(
            parsed(" quota.example.com/ ").as_deref(),
            Ok("https://quota.example.com")
        );
        assert_eq!(
            parsed("localhost:8080").as_deref(),
            Ok("http://localhost:8080")
        );
        assert_eq!(
            parsed("Quota.Example.com:8443").as_deref(),
            Ok("https://quota.example.com:8443")
        );
    }

    #[test]
    fn address_must_be_an_origin() {
        for text in [
            "https://user@quota.example.com",
            "https://a:b@quota.example.com",
            "https://quota.example.com/api",
            "https://quota.example.com/?x",
            "https://quota.example.com/#x",
        ] {
            assert_eq!(parsed(text), Err(InvalidAddress::NotAnOrigin), "{text}");
        }
        for text in [
            "",
            "https://",
            "ftp://quota.example.com",
            "file:///etc/passwd",
            "javascript://x",
        ] {
            assert_eq!(parsed(text), Err(InvalidAddress::Malformed), "{text}");
        }
    }

    #[test]
    fn path_cannot_change_the_host() {
        let server = Server::parse("https://quota.example.com").expect("an address");
        assert_eq!(
            server.at("/docs").as_str(),
            "https://quota.example.com/docs"
        );
        assert_eq!(
            server.at("//evil.example").host_str(),
            Some("quota.example.com")
        );
    }
}
