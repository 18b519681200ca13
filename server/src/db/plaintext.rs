//! Recognizes a `DATABASE_URL` with which passwords and data are sent over a public network without encryption.

use std::net::IpAddr;

use secrecy::{ExposeSecret, SecretString};
use tokio_postgres::config::{Config, Host, SslMode};

/// Returns a host with a public address to which connections are not encrypted. Returns `None` if there is no such
/// host, or if its address cannot be looked up.
pub async fn plaintext_host(url: &SecretString) -> Option<String> {
    let config: Config = url.expose_secret().parse().ok()?;
    if config.get_ssl_mode() == SslMode::Require {
        return None;
    }
    if let Some(ip) = config.get_hostaddrs().iter().find(|ip| !is_private(**ip)) {
        return Some(ip.to_string());
    }
    if !config.get_hostaddrs().is_empty() {
        return None;
    }
    for host in config.get_hosts() {
        let Host::Tcp(host) = host else { continue };
        let found = tokio::net::lookup_host((host.as_str(), 0)).await;
        if found.is_ok_and(|mut found| found.any(|addr| !is_private(addr.ip()))) {
            return Some(host.clone());
        }
    }
    None
}

fn is_private(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => {
            // 100.64.0.0/10 is used by private overlay networks.
            let is_shared = ip.octets()[0] == 100 && ip.octets()[1] & 0xc0 == 64;
            ip.is_loopback() || ip.is_private() || ip.is_link_local() || is_shared
        }
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unique_local() || ip.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_unencrypted_connections_to_public_addresses_are_reported() {
        for (url, host) in [
            ("postgres://u:p@8.8.8.8/quota", Some("8.8.8.8")),
            (
                "postgres://u:p@8.8.8.8/quota?sslmode=prefer",
                Some("8.8.8.8"),
            ),
            ("postgres://u:p@8.8.8.8/quota?sslmode=require", None),
            ("host=db.invalid hostaddr=8.8.8.8 user=u", Some("8.8.8.8")),
            ("host=10.0.0.1,8.8.4.4 user=u", Some("8.8.4.4")),
            ("host=2606:4700::1111 user=u", Some("2606:4700::1111")),
            ("postgres://u:p@127.0.0.1/quota", None),
            ("postgres://u:p@localhost/quota", None),
            ("postgres://u:p@10.1.2.3/quota", None),
            ("postgres://u:p@172.31.0.1/quota", None),
            ("postgres://u:p@100.100.0.1/quota", None),
            ("host=fd12::1 user=u", None),
            ("host=/run/postgresql user=u", None),
            ("postgres:///quota?host=/run/postgresql", None),
        ] {
            let found = plaintext_host(&SecretString::from(url)).await;
            assert_eq!(found.as_deref(), host, "{url}");
        }
    }
}
