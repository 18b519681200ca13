//! Addresses of servers: which may be asked at all.

use std::fmt;

use url::{Host, Url};

/// A server's origin: over TLS, or on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Server(Url);

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAddress {
    #[error("must be an address such as https://quota.example.com")]
    Malformed,
    #[error("must begin with https://; http:// is for this computer alone")]
    Insecure,
    #[error("must be the server's address alone, without a path or a name in it")]
    NotAnOrigin,
}

impl Server {
    /// Without a scheme, what a person types is taken to be over TLS, or plain on this machine.
    pub fn parse(text: &str) -> Result<Self, InvalidAddress> {
        let text = text.trim();
        let url = if text.contains("://") {
            Url::parse(text)
        } else {
            let guess = Url::parse(&format!("http://{text}"));
            match guess {
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
        let bare = url.username().is_empty()
            && url.password().is_none()
            && matches!(url.path(), "" | "/")
            && url.query().is_none()
            && url.fragment().is_none();
        if bare {
            Ok(Self(url))
        } else {
            Err(InvalidAddress::NotAnOrigin)
        }
    }

    pub fn is_loopback(&self) -> bool {
        is_loopback(&self.0)
    }

    /// An address on this server. `path` is one of ours and begins with a slash.
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

fn is_loopback(url: &Url) -> bool {
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
    fn plain_http_is_for_this_machine_alone() {
        for ours in [
            "http://localhost:8080",
            "http://127.0.0.1:8080",
            "http://[::1]:8080",
        ] {
            assert_eq!(parsed(ours).as_deref(), Ok(ours));
        }
        for theirs in [
            "http://quota.example.com",
            "http://10.0.0.1:8080",
            "http://localhost.example.com",
            "http://127.0.0.1.example.com",
        ] {
            assert_eq!(parsed(theirs), Err(InvalidAddress::Insecure), "{theirs}");
        }
    }

    #[test]
    fn a_scheme_may_be_left_out() {
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
    fn an_address_is_an_origin_and_no_more() {
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
    fn a_path_stays_on_the_server() {
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
