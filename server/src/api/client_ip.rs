//! Determines the client's address.
//!
//! The client's address is the peer's address, unless the peer is a trusted proxy. If the peer is a trusted proxy, the
//! client's address is the rightmost address in `X-Forwarded-For` that does not belong to a trusted proxy or, if all
//! addresses belong to trusted proxies, the leftmost address. `X-Real-IP` and `Forwarded` are ignored, because a proxy
//! that does not set them forwards the client's values. The search stops at an address that cannot be parsed, because
//! the client could have written everything to its left.

use std::net::IpAddr;

use ipnet::IpNet;
use poem::{Addr, Request};

use super::fields::{Fields, text};

/// Returns the peer's address in canonical form. Returns `None` for a peer without an address, such as a Unix socket.
pub fn peer_ip(request: &Request) -> Option<IpAddr> {
    match &request.remote_addr().0 {
        Addr::SocketAddr(addr) => Some(addr.ip().to_canonical()),
        _ => None,
    }
}

/// Returns whether a peer is a trusted proxy. The address must be in canonical form.
pub fn is_trusted(peer: IpAddr, trusted: &[IpNet]) -> bool {
    trusted.iter().any(|network| network.contains(&peer))
}

/// Returns the client's address for a request from `peer`, which must be in canonical form.
pub fn client_of(peer: IpAddr, fields: &impl Fields, trusted: &[IpNet]) -> IpAddr {
    let mut client = peer;
    if !is_trusted(peer, trusted) {
        return client;
    }
    // Multiple headers form a single list.
    for value in fields.values("x-forwarded-for").rev() {
        for hop in text(value).unwrap_or("?").rsplit(',') {
            let Some(hop) = address(hop.trim()) else {
                return client;
            };
            client = hop;
            if !is_trusted(hop, trusted) {
                return client;
            }
        }
    }
    client
}

/// Parses an address with or without a port.
fn address(text: &str) -> Option<IpAddr> {
    let ip = text
        .parse::<IpAddr>()
        .or_else(|_| text.parse::<std::net::SocketAddr>().map(|addr| addr.ip()))
        .or_else(|_| text.trim_start_matches('[').trim_end_matches(']').parse());
    ip.ok().map(|ip: IpAddr| ip.to_canonical())
}

#[cfg(test)]
mod tests {
    use poem::http::HeaderMap;

    use super::*;

    fn of(peer: &str, forwarded: &[&str]) -> String {
        let trusted = ["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()];
        let mut headers = HeaderMap::new();
        for field in forwarded {
            headers.append("x-forwarded-for", field.parse().unwrap());
        }
        headers.insert("x-real-ip", "203.0.113.66".parse().unwrap());
        headers.insert("forwarded", "for=203.0.113.67".parse().unwrap());
        client_of(
            peer.parse::<IpAddr>().unwrap().to_canonical(),
            &headers,
            &trusted,
        )
        .to_string()
    }

    #[test]
    fn untrusted_peer_is_the_client_whatever_it_sends() {
        assert_eq!(of("192.0.2.1", &["198.51.100.7"]), "192.0.2.1");
        assert_eq!(of("192.0.2.1", &[]), "192.0.2.1");
    }

    #[test]
    fn behind_trusted_proxies_the_rightmost_untrusted_hop_is_the_client() {
        assert_eq!(of("10.0.0.1", &["198.51.100.7"]), "198.51.100.7");
        assert_eq!(
            of("10.0.0.1", &["1.2.3.4, 198.51.100.7, 10.9.9.9"]),
            "198.51.100.7"
        );
        assert_eq!(
            of("10.0.0.1", &["1.2.3.4", "198.51.100.7", "10.9.9.9"]),
            "198.51.100.7"
        );
        assert_eq!(of("fd00::1", &["2001:db8::5"]), "2001:db8::5");
        assert_eq!(
            of("::ffff:10.0.0.1", &["::ffff:198.51.100.7"]),
            "198.51.100.7"
        );
    }

    #[test]
    fn unparsable_address_ends_the_search() {
        assert_eq!(of("10.0.0.1", &["198.51.100.7, unknown"]), "10.0.0.1");
        assert_eq!(of("10.0.0.1", &["unknown, 10.0.0.2"]), "10.0.0.2");
        assert_eq!(of("10.0.0.1", &[""]), "10.0.0.1");
    }

    #[test]
    fn port_is_ignored() {
        assert_eq!(of("10.0.0.1", &["198.51.100.7:4711"]), "198.51.100.7");
        assert_eq!(of("10.0.0.1", &["[2001:db8::5]:4711"]), "2001:db8::5");
    }
}
