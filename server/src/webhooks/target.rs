//! Determines where webhooks may be sent.
//!
//! Tenants choose the URLs. Without checks, tenants could reach services that are accessible only from this machine or
//! its network. For each connection, the host is resolved once, all of its addresses are checked, and one of the
//! checked addresses is used. Therefore, changing a host's address between the check and the connection has no effect.
//! Redirects are not followed.
//!
//! Public addresses are allowed, except those of this machine and those of the host in `QUOTA_PUBLIC_URL`. That host is
//! excluded separately, because in a container, no interface has the machine's public address. If that host cannot be
//! looked up, its addresses cannot be excluded. Tenants do not learn whether a host is unknown or has an address that
//! is not allowed, since that would reveal the names in a private network.
//!
//! The operator can allow more networks (`QUOTA_WEBHOOK_PRIVATE_NETWORKS`). In these networks, every address is
//! allowed, even this machine's. Only hosts in these networks may have `http://` URLs.

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use futures_util::future::BoxFuture;
use ipnet::IpNet;
use nix::ifaddrs::getifaddrs;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

/// Resolves host names. Tests use their own resolver.
pub trait Lookup: fmt::Debug + Send + Sync + 'static {
    fn lookup(&self, host: String) -> BoxFuture<'static, io::Result<Vec<IpAddr>>>;
}

/// The operating system's resolver.
#[derive(Debug)]
pub struct SystemLookup;

impl Lookup for SystemLookup {
    fn lookup(&self, host: String) -> BoxFuture<'static, io::Result<Vec<IpAddr>>> {
        Box::pin(async move {
            let found = tokio::net::lookup_host((host, 0)).await?;
            Ok(found.map(|addr| addr.ip()).collect())
        })
    }
}

/// The host cannot be looked up, or has an address that webhooks may not be sent to.
#[derive(Debug, thiserror::Error)]
#[error("the host has no address to which webhooks may be sent")]
pub struct UnusableHost;

/// The addresses that webhooks may be sent to.
#[derive(Debug, Clone)]
pub struct Targets {
    private: Arc<[IpNet]>,
    /// The host of the server's public URL.
    public_host: Option<Host>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    Https,
    /// HTTP is not encrypted, so it is allowed only in the operator's networks.
    Http,
}

impl Targets {
    pub fn new(private: &[IpNet]) -> Self {
        Self {
            private: private.into(),
            public_host: None,
        }
    }

    /// Also excludes the addresses of the host of `public_url`, except those in the operator's networks.
    #[must_use]
    pub fn without_host_of(self, public_url: &str) -> Self {
        let url = Url::parse(public_url).ok();
        Self {
            public_host: url.and_then(|url| url.host().map(|host| host.to_owned())),
            ..self
        }
    }

    /// Parses a URL, and checks it as far as possible without a DNS lookup.
    ///
    /// # Errors
    ///
    /// Returns a message that says what is wrong with the URL, for use as a field's error.
    pub fn parse(&self, text: &str) -> Result<(Url, Scheme), &'static str> {
        let url = Url::parse(text).map_err(|_| "must be a URL that starts with https://")?;
        let scheme = match url.scheme() {
            "https" => Scheme::Https,
            "http" if !self.private.is_empty() => Scheme::Http,
            "http" => return Err("must start with https://"),
            _ => return Err("must be a URL that starts with https://"),
        };
        if !url.username().is_empty() || url.password().is_some() {
            return Err("must not contain a user name or password");
        }
        if url.fragment().is_some() {
            return Err("must not contain a fragment");
        }
        if url.port() == Some(0) {
            return Err("must not have port 0");
        }
        let literal = match url.host() {
            None => return Err("must have a host"),
            Some(Host::Domain(_)) => None,
            Some(Host::Ipv4(ip)) => Some(IpAddr::V4(ip)),
            Some(Host::Ipv6(ip)) => Some(IpAddr::V6(ip)),
        };
        match literal {
            Some(ip) if !self.allows(scheme, ip, &own_addresses()) => {
                Err("must have a public address")
            }
            _ => Ok((url, scheme)),
        }
    }

    /// Returns whether webhooks may be sent to this address.
    fn allows(&self, scheme: Scheme, ip: IpAddr, own: &[IpAddr]) -> bool {
        let ip = ip.to_canonical();
        if self.private.iter().any(|network| network.contains(&ip)) {
            return true;
        }
        scheme == Scheme::Https && is_public(ip) && !own.contains(&ip)
    }

    /// Returns the addresses of this machine and of the public URL's host.
    async fn own_addresses(&self, lookup: &dyn Lookup) -> Vec<IpAddr> {
        let mut own = own_addresses();
        match &self.public_host {
            None => {}
            Some(Host::Ipv4(ip)) => own.push(IpAddr::V4(*ip)),
            Some(Host::Ipv6(ip)) => own.push(IpAddr::V6(*ip)),
            Some(Host::Domain(name)) => {
                let found = lookup.lookup(name.clone()).await.unwrap_or_default();
                own.extend(found.into_iter().map(|ip| ip.to_canonical()));
            }
        }
        own
    }

    /// Checks a URL whose host is an IP address. The resolver does not check such a URL, because the host is not looked
    /// up.
    pub async fn check_literal(
        &self,
        url: &Url,
        scheme: Scheme,
        lookup: &dyn Lookup,
    ) -> Result<(), UnusableHost> {
        let ip = match url.host() {
            Some(Host::Ipv4(ip)) => IpAddr::V4(ip),
            Some(Host::Ipv6(ip)) => IpAddr::V6(ip),
            _ => return Ok(()),
        };
        let own = self.own_addresses(lookup).await;
        if self.allows(scheme, ip, &own) {
            Ok(())
        } else {
            Err(UnusableHost)
        }
    }

    /// Returns a resolver that fails if any address of the host is not allowed.
    pub fn resolver(&self, scheme: Scheme, lookup: Arc<dyn Lookup>) -> CheckedResolver {
        CheckedResolver {
            targets: self.clone(),
            scheme,
            lookup,
        }
    }
}

/// A resolver that fails if any address of a host is not allowed.
#[derive(Debug)]
pub struct CheckedResolver {
    targets: Targets,
    scheme: Scheme,
    lookup: Arc<dyn Lookup>,
}

impl Resolve for CheckedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let (targets, scheme) = (self.targets.clone(), self.scheme);
        let lookup = self.lookup.clone();
        let found = lookup.lookup(name.as_str().to_owned());
        Box::pin(async move {
            let found = found.await.map_err(|_| UnusableHost)?;
            let own = targets.own_addresses(&*lookup).await;
            // A single forbidden address is enough to reject a host: no host has a legitimate reason to mix forbidden
            // and allowed addresses.
            let is_allowed = |ip: &IpAddr| targets.allows(scheme, *ip, &own);
            if found.is_empty() || !found.iter().all(is_allowed) {
                return Err(UnusableHost.into());
            }
            // The port is 0, because the URL determines it.
            let found = found.into_iter().map(|ip| SocketAddr::new(ip, 0));
            Ok(Box::new(found) as Addrs)
        })
    }
}

/// Returns the addresses of this machine's interfaces. They may be public, but webhooks must not reach the services on
/// this machine.
fn own_addresses() -> Vec<IpAddr> {
    let interfaces = getifaddrs().into_iter().flatten();
    let addresses = interfaces.filter_map(|it| {
        let address = it.address?;
        let v4 = address.as_sockaddr_in().map(|it| IpAddr::V4(it.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|it| IpAddr::V6(it.ip())))
    });
    addresses.collect()
}

/// Returns whether the address is globally reachable, according to the IANA registries of special-purpose addresses.
fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => is_public_v4(ip),
        IpAddr::V6(ip) => is_public_v6(ip),
    }
}

fn is_public_v4(ip: Ipv4Addr) -> bool {
    /// Networks, each as its address and its prefix length.
    const SPECIAL: &[([u8; 4], u32)] = &[
        ([0, 0, 0, 0], 8),
        ([10, 0, 0, 0], 8),
        // Carrier-grade NAT.
        ([100, 64, 0, 0], 10),
        ([127, 0, 0, 0], 8),
        // Link-local, including the metadata services of cloud providers.
        ([169, 254, 0, 0], 16),
        ([172, 16, 0, 0], 12),
        ([192, 0, 0, 0], 24),
        ([192, 0, 2, 0], 24),
        // 6to4 relays.
        ([192, 88, 99, 0], 24),
        ([192, 168, 0, 0], 16),
        // Benchmarks.
        ([198, 18, 0, 0], 15),
        ([198, 51, 100, 0], 24),
        ([203, 0, 113, 0], 24),
        // Multicast, reserved, and broadcast addresses.
        ([224, 0, 0, 0], 3),
    ];
    let bits = ip.to_bits();
    !SPECIAL
        .iter()
        .any(|(network, length)| (bits ^ u32::from_be_bytes(*network)) >> (32 - length) == 0)
}

fn is_public_v6(ip: Ipv6Addr) -> bool {
    // Only 2000::/3 is for global unicast. Addresses outside it include loopback, addresses with an embedded IPv4
    // address (::/96, ::ffff:0:0/96, NAT64 in 64:ff9b::/96 and 64:ff9b:1::/48), local addresses (fc00::/7, fe80::/10),
    // and multicast (ff00::/8).
    let [first, second, ..] = ip.segments();
    let is_global = first & 0xe000 == 0x2000;
    let is_special = match first {
        // Addresses for protocol assignments, including Teredo, and for documentation.
        0x2001 => second < 0x0200 || second == 0x0db8,
        // 6to4, which embeds an IPv4 address.
        0x2002 => true,
        // Documentation.
        0x3fff => second < 0x1000,
        _ => false,
    };
    is_global && !is_special
}

#[cfg(test)]
mod tests {
    use super::*;

    fn https(private: &[&str], ip: &str) -> bool {
        let private: Vec<IpNet> = private.iter().map(|it| it.parse().unwrap()).collect();
        Targets::new(&private).allows(Scheme::Https, ip.parse().unwrap(), &[])
    }

    #[test]
    fn addresses_that_are_not_public_are_refused() {
        for ip in [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "10.255.255.255",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.255.254",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.1.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.7",
            "203.0.113.7",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::7f00:1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::ffff:169.254.169.254",
            "64:ff9b::7f00:1",
            "64:ff9b::808:808",
            "64:ff9b:1::1",
            "100::1",
            "2001::1",
            "2001:0:5ef5:79fd::1",
            "2001:2::1",
            "2001:10::1",
            "2001:20::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "2002:a00:1::1",
            "3fff::1",
            "3fff:fff::1",
            "4000::1",
            "5f00::1",
            "fc00::1",
            "fd12:3456::1",
            "fe80::1",
            "fec0::1",
            "ff02::1",
        ] {
            assert!(!https(&[], ip), "{ip}");
        }
    }

    #[test]
    fn public_addresses_are_allowed() {
        for ip in [
            "1.1.1.1",
            "8.8.8.8",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "126.255.255.255",
            "128.0.0.0",
            "169.253.255.255",
            "172.15.255.255",
            "172.32.0.0",
            "192.0.1.1",
            "192.167.255.255",
            "198.17.255.255",
            "198.20.0.0",
            "223.255.255.255",
            "::ffff:8.8.8.8",
            "2001:200::1",
            "2001:4860:4860::8888",
            "2003::1",
            "2606:4700::1111",
            "3fff:1000::1",
        ] {
            assert!(https(&[], ip), "{ip}");
        }
    }

    #[test]
    fn networks_of_the_operator_are_allowed_and_only_they_without_encryption() {
        let it = Targets::new(&["10.1.0.0/16".parse().unwrap(), "::1/128".parse().unwrap()]);
        let allows = |scheme, ip: &str| it.allows(scheme, ip.parse().unwrap(), &[]);
        for ip in ["10.1.2.3", "::ffff:10.1.2.3", "::1"] {
            assert!(
                allows(Scheme::Https, ip) && allows(Scheme::Http, ip),
                "{ip}"
            );
        }
        for ip in ["10.2.0.1", "127.0.0.1", "::2"] {
            assert!(!allows(Scheme::Https, ip), "{ip}");
        }
        assert!(allows(Scheme::Https, "8.8.8.8"));
        assert!(!allows(Scheme::Http, "8.8.8.8"));
    }

    #[test]
    fn own_addresses_are_refused_even_if_they_are_public() {
        let own: IpAddr = "8.8.8.8".parse().unwrap();
        let it = Targets::new(&[]);
        assert!(it.allows(Scheme::Https, own, &[]));
        assert!(!it.allows(Scheme::Https, own, &[own]));
        assert!(own_addresses().contains(&IpAddr::V4(Ipv4Addr::LOCALHOST)));
    }

    #[test]
    fn urls_are_checked_without_a_lookup() {
        let it = Targets::new(&[]);
        for url in [
            "https://hooks.example.com/a?b=c",
            "https://hooks.example.com:8443",
            "https://8.8.8.8/",
            "https://[2606:4700::1111]/",
        ] {
            assert!(it.parse(url).is_ok(), "{url}");
        }
        for (url, message) in [
            (
                "hooks.example.com",
                "must be a URL that starts with https://",
            ),
            (
                "ftp://hooks.example.com",
                "must be a URL that starts with https://",
            ),
            ("http://hooks.example.com", "must start with https://"),
            (
                "https://user@hooks.example.com",
                "must not contain a user name or password",
            ),
            (
                "https://:pw@hooks.example.com",
                "must not contain a user name or password",
            ),
            (
                "https://hooks.example.com/#a",
                "must not contain a fragment",
            ),
            ("https://hooks.example.com:0/", "must not have port 0"),
            ("https://127.0.0.1/", "must have a public address"),
            // Other spellings of 127.0.0.1.
            ("https://2130706433/", "must have a public address"),
            ("https://0x7f.1/", "must have a public address"),
            ("https://127.1/", "must have a public address"),
            ("https://[::1]/", "must have a public address"),
            ("https://[::ffff:10.0.0.1]/", "must have a public address"),
            (
                "https://169.254.169.254/latest/meta-data",
                "must have a public address",
            ),
        ] {
            assert_eq!(it.parse(url).map(drop), Err(message), "{url}");
        }
        let private = Targets::new(&["127.0.0.0/8".parse().unwrap()]);
        let parsed = private.parse("http://127.0.0.1:9/").unwrap();
        assert_eq!(parsed.1, Scheme::Http);
        assert!(private.parse("http://10.0.0.1/").is_err());
    }
}
