//! Parses `REDIS_URL`.
//!
//! | deployment | `REDIS_URL` |
//! |---|---|
//! | one server | `redis://[user:password@]host[:port][/db]`, or `unix:///path` |
//! | Sentinel | `redis+sentinel://[user:password@]host[:port][,host[:port]…]/group[/db]` |
//! | Redis Cluster | `redis://host[:port],host[:port][,…]`, or `redis+cluster://host[:port][,…]` |
//!
//! With `rediss` instead of `redis`, all connections use TLS, and certificates are verified against the system's
//! trusted roots. `valkey` and `valkeys` are synonyms for `redis` and `rediss`. `group` is the name of the master in
//! the sentinels' configuration. The user, password and database are the master's; `?sentinel_user=` and
//! `?sentinel_password=` are the sentinels'. Special characters must be percent-encoded, including commas in passwords.

use std::time::Duration;

use redis::{
    ConnectionAddr, ConnectionInfo, IntoConnectionInfo, ProtocolVersion, RedisConnectionInfo,
    io::tcp::TcpSettings,
};
use url::Url;

/// The kernel closes a connection if sent bytes remain unacknowledged for this long.
const UNACKNOWLEDGED: Duration = Duration::from_secs(2);
const PORT: u16 = 6379;
const SENTINEL_PORT: u16 = 26379;

/// How to connect to Redis. Passwords are only in [`RedisConnectionInfo`], whose `Debug` output hides them.
#[derive(Debug, Clone)]
pub struct RedisSettings {
    pub servers: RedisServers,
    /// The prefix of every key and channel, so that several installations can share a Redis server.
    pub prefix: String,
    /// The number of connections for calls, not counting the connection for messages. Each connection is multiplexed.
    pub connections: usize,
    /// The maximum time that a decision waits for one call.
    pub timeout: Duration,
    /// How long connecting may take, including TLS and authentication.
    pub connect_timeout: Duration,
}

/// The servers to connect to.
#[derive(Debug, Clone)]
pub enum RedisServers {
    One(ConnectionInfo),
    Sentinel {
        sentinels: Vec<ConnectionInfo>,
        /// The name of the master.
        group: String,
        /// The master's credentials and database.
        master: RedisConnectionInfo,
        tls: bool,
    },
    /// Seed nodes of the cluster.
    Cluster(Vec<ConnectionInfo>),
}

impl RedisServers {
    pub fn mode(&self) -> &'static str {
        match self {
            Self::One(_) => "single",
            Self::Sentinel { .. } => "sentinel",
            Self::Cluster(_) => "cluster",
        }
    }

    pub fn tls(&self) -> bool {
        let is_tls = |info: &ConnectionInfo| matches!(info.addr(), ConnectionAddr::TcpTls { .. });
        match self {
            Self::One(info) => is_tls(info),
            Self::Sentinel { tls, .. } => *tls,
            Self::Cluster(nodes) => nodes.iter().any(is_tls),
        }
    }
}

/// Does not include passwords.
impl std::fmt::Display for RedisServers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let list = |infos: &[ConnectionInfo]| {
            let addrs = infos.iter().map(|info| info.addr().to_string());
            addrs.collect::<Vec<_>>().join(",")
        };
        match self {
            Self::One(info) => write!(f, "{}", info.addr()),
            Self::Sentinel {
                sentinels, group, ..
            } => write!(
                f,
                "the master of {group}, via sentinels {}",
                list(sentinels)
            ),
            Self::Cluster(nodes) => write!(f, "the cluster {}", list(nodes)),
        }
    }
}

/// Returns the TCP options that every connection uses.
pub fn tcp_settings() -> TcpSettings {
    TcpSettings::default()
        .set_nodelay(true)
        .set_user_timeout(UNACKNOWLEDGED)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Sentinel,
    Cluster,
}

/// Parses `REDIS_URL`. Errors contain no part of the URL, since any part may be a password.
pub fn servers(text: &str) -> Result<RedisServers, String> {
    let (scheme, rest) = text.split_once("://").ok_or(
        "must begin with redis://, rediss://, redis+sentinel:// or redis+cluster://".to_owned(),
    )?;
    let (base, kind) = match scheme.split_once('+') {
        None => (scheme, Kind::Plain),
        Some((base, "sentinel")) => (base, Kind::Sentinel),
        Some((base, "cluster")) => (base, Kind::Cluster),
        Some(("redis" | "valkey", "unix")) => return one(text),
        Some(_) => {
            return Err(
                "must have no suffix after the scheme other than +sentinel or +cluster".into(),
            );
        }
    };
    let tls = match base {
        "redis" | "valkey" => false,
        "rediss" | "valkeys" => true,
        "unix" if kind == Kind::Plain => return one(text),
        _ => {
            return Err(
                "must begin with redis://, rediss://, redis+sentinel:// or redis+cluster://".into(),
            );
        }
    };
    // An unencoded `/`, `?` or `#` in a password would end the password there, and the rest of it would be read as a
    // path, a query or a fragment.
    if rest
        .split_once(['/', '?', '#'])
        .is_some_and(|(_, after)| after.contains('@'))
    {
        return Err(
            "must percent-encode special characters, such as @, /, ? and # in passwords".into(),
        );
    }
    if kind == Kind::Plain && !rest.contains(',') {
        return one(text);
    }
    // `redis://a,redis://b` means `redis://a,b`.
    let rest = rest.replace(&format!(",{scheme}://"), ",");
    if rest.contains("://") {
        return Err("must not mix schemes in one list".into());
    }
    // The credentials come before the first host, and the path and query come after the last one. They belong to the
    // list as a whole.
    let (before, after) = rest
        .split_once(['/', '?'])
        .map_or((&*rest, ""), |(hosts, _)| (hosts, &rest[hosts.len()..]));
    let (login, hosts) = before
        .rsplit_once('@')
        .map_or(("", before), |(login, hosts)| (login, hosts));
    if login.contains(',') {
        return Err("must have the user and password only before the first host".into());
    }
    let default_port = if kind == Kind::Sentinel {
        SENTINEL_PORT
    } else {
        PORT
    };
    let addrs = hosts
        .split(',')
        .map(|host| address(host.trim(), default_port, tls))
        .collect::<Result<Vec<_>, _>>()?;

    // Parse the common parts as a URL with a placeholder host.
    let common = Url::parse(&format!("redis://{login}@host{after}"))
        .map_err(|_| "must be redis://user:password@host:port,host:port".to_owned())?;
    if common.fragment().is_some() {
        return Err("must not have a fragment".into());
    }
    let path = common.path_segments().map_or_else(Vec::new, |segments| {
        segments
            .filter(|it| !it.is_empty())
            .map(str::to_owned)
            .collect()
    });
    let mut sentinel = RedisConnectionInfo::default();
    let mut info = login_of(&common)?;
    for (name, value) in common.query_pairs() {
        match &*name {
            "protocol" => info = info.set_protocol(protocol(&value)?),
            "sentinel_user" if kind == Kind::Sentinel => sentinel = sentinel.set_username(value),
            "sentinel_password" if kind == Kind::Sentinel => {
                sentinel = sentinel.set_password(value);
            }
            _ if kind == Kind::Sentinel => {
                return Err(
                    "must have no parameters except protocol, sentinel_user and sentinel_password"
                        .into(),
                );
            }
            _ => return Err("must have no parameters except protocol".into()),
        }
    }
    let connection = |addr: ConnectionAddr, info: RedisConnectionInfo| {
        let connection = addr
            .into_connection_info()
            .map_err(|_| "must contain valid server addresses".to_owned())?;
        Ok::<_, String>(
            connection
                .set_tcp_settings(tcp_settings())
                .set_redis_settings(info),
        )
    };
    if kind == Kind::Sentinel {
        let (group, db) = match &*path {
            [group] => (group.clone(), 0),
            [group, db] => (group.clone(), database(db)?),
            _ => {
                return Err(
                    "must name the group of the master: redis+sentinel://host:port/group".into(),
                );
            }
        };
        let sentinels = addrs
            .into_iter()
            .map(|addr| connection(addr, sentinel.clone()))
            .collect::<Result<_, _>>()?;
        return Ok(RedisServers::Sentinel {
            sentinels,
            group: percent_decoded(&group)?,
            master: info.set_db(db),
            tls,
        });
    }
    match &*path {
        [] => {}
        [db] if db == "0" => {}
        _ => return Err("must not name a database: a cluster has only one".into()),
    }
    let nodes = addrs
        .into_iter()
        .map(|addr| connection(addr, info.clone()))
        .collect::<Result<_, _>>()?;
    Ok(RedisServers::Cluster(nodes))
}

/// Parses the address of one server.
fn one(text: &str) -> Result<RedisServers, String> {
    let bad = || "must be a Redis address such as redis://user:password@host:6379/0".to_owned();
    // The redis crate accepts `#insecure`, which skips certificate verification. Quota rejects `#insecure`.
    if text.contains('#') {
        return Err("must not have a fragment".into());
    }
    let mut info = text.into_connection_info().map_err(|_| bad())?;
    if matches!(info.addr(), ConnectionAddr::Tcp(host, _) if host.is_empty()) {
        return Err(bad());
    }
    info = info.set_tcp_settings(tcp_settings());
    Ok(RedisServers::One(info))
}

fn address(text: &str, default_port: u16, tls: bool) -> Result<ConnectionAddr, String> {
    let bad = || "must be a list of hosts such as a:6379,b:6379".to_owned();
    let url = Url::parse(&format!("redis://{text}")).map_err(|_| bad())?;
    let host = match url.host() {
        Some(url::Host::Domain(name)) if !name.is_empty() => name.to_owned(),
        Some(url::Host::Ipv4(ip)) => ip.to_string(),
        Some(url::Host::Ipv6(ip)) => ip.to_string(),
        _ => return Err(bad()),
    };
    if !url.username().is_empty() || url.password().is_some() {
        return Err("must have the user and password only before the first host".into());
    }
    let port = url.port().unwrap_or(default_port);
    Ok(if tls {
        ConnectionAddr::TcpTls {
            host,
            port,
            insecure: false,
            tls_params: None,
        }
    } else {
        ConnectionAddr::Tcp(host, port)
    })
}

fn login_of(url: &Url) -> Result<RedisConnectionInfo, String> {
    let mut info = RedisConnectionInfo::default();
    if !url.username().is_empty() {
        info = info.set_username(percent_decoded(url.username())?);
    }
    if let Some(password) = url.password().filter(|it| !it.is_empty()) {
        info = info.set_password(percent_decoded(password)?);
    }
    Ok(info)
}

fn percent_decoded(text: &str) -> Result<String, String> {
    // Decode the text as a form value. Escape plus signs and ampersands first: in forms, a plus sign means a space, and
    // an ampersand ends the value.
    let form = format!("v={}", text.replace('+', "%2B").replace('&', "%26"));
    url::form_urlencoded::parse(form.as_bytes())
        .next()
        .map(|(_, value)| value.into_owned())
        .ok_or_else(|| "must be percent-encoded UTF-8".to_owned())
}

fn database(text: &str) -> Result<i64, String> {
    text.parse()
        .ok()
        .filter(|db| (0..=65_535).contains(db))
        .ok_or_else(|| "must have a numeric database".to_owned())
}

fn protocol(text: &str) -> Result<ProtocolVersion, String> {
    match text {
        "2" | "resp2" => Ok(ProtocolVersion::RESP2),
        "3" | "resp3" => Ok(ProtocolVersion::RESP3),
        _ => Err("must have protocol=resp2 or protocol=resp3".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> String {
        let servers = servers(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        let tls = if servers.tls() { " by TLS" } else { "" };
        format!("{} {servers}{tls}", servers.mode())
    }

    #[test]
    fn every_documented_form_is_parsed() {
        for (text, meant) in [
            ("redis://localhost", "single localhost:6379"),
            ("redis://u:p@10.0.0.1:7000/3", "single 10.0.0.1:7000"),
            ("valkey://cache", "single cache:6379"),
            ("rediss://cache:6380", "single cache:6380 by TLS"),
            ("redis://[::1]:7000", "single ::1:7000"),
            ("unix:///run/redis.sock", "single /run/redis.sock"),
            (
                "redis+sentinel://a,b:26380,c/main",
                "sentinel the master of main, via sentinels a:26379,b:26380,c:26379",
            ),
            (
                "rediss+sentinel://u:p@a/main/2",
                "sentinel the master of main, via sentinels a:26379 by TLS",
            ),
            ("redis://a:7000,b:7001", "cluster the cluster a:7000,b:7001"),
            (
                "redis://a:7000, redis://b:7001".replace(' ', "").leak(),
                "cluster the cluster a:7000,b:7001",
            ),
            ("redis+cluster://a", "cluster the cluster a:6379"),
            ("rediss://a,b/0", "cluster the cluster a:6379,b:6379 by TLS"),
        ] {
            assert_eq!(shown(text), meant);
        }
    }

    #[test]
    fn user_password_and_database_belong_to_the_master() {
        let text = "redis+sentinel://quota:p%2Cs%40%2B+w&2@a,b/main/7?sentinel_user=watch&sentinel_password=s%26t";
        let RedisServers::Sentinel {
            sentinels, master, ..
        } = servers(text).unwrap()
        else {
            panic!("this URL is for Sentinel");
        };
        assert_eq!(master.username(), Some("quota"));
        assert_eq!(master.password(), Some("p,s@++w&2"));
        assert_eq!(master.db(), 7);
        for sentinel in sentinels {
            let login = sentinel.redis_settings();
            assert_eq!(login.username(), Some("watch"));
            assert_eq!(login.password(), Some("s&t"));
        }
        let RedisServers::Cluster(nodes) = servers("redis://:hunter2@a,b").unwrap() else {
            panic!("this URL is for a cluster");
        };
        for node in nodes {
            assert_eq!(node.redis_settings().password(), Some("hunter2"));
            assert!(node.tcp_settings().nodelay());
        }
    }

    #[test]
    fn invalid_address_is_rejected_without_repeating_it() {
        for text in [
            "localhost:6379",
            "http://:hunter2@host",
            "redis://",
            "redis://:hunter2@",
            "redis://:hunter2@host:99999",
            "redis://:hunter2@host/one",
            "rediss://:hunter2@host#insecure",
            "redis://:hunter2@a,:hunter2@b",
            "redis://:hunter2@a,b/3",
            "redis://a,rediss://:hunter2@b",
            "redis://:hunter2@a,",
            "redis+sentinel://:hunter2@a",
            "redis+sentinel://:hunter2@a/main/x",
            "redis+sentinel://:hunter2@a/main?master=hunter2",
            "redis+ring://:hunter2@a",
            "redis+cluster://:hunter2@a?protocol=resp4",
            "redis+cluster://:hunter2@a?hunter2=1",
        ] {
            let error = servers(text).expect_err(text);
            assert!(!error.contains("hunter2"), "{text}: {error}");
        }
    }

    #[test]
    fn unescaped_character_in_a_password_is_rejected_without_showing_the_password() {
        for text in [
            "redis://user:1234?hunter2@host",
            "redis://user:1234/hunter2@host",
            "redis+cluster://user:1234?hunter2@host",
            "redis+sentinel://user:1234?hunter2@host/main",
            "redis+sentinel://user:1234/hunter2@host",
            "redis+sentinel://user?hunter2@host/main",
            "rediss://user?hunter2@a,b",
        ] {
            let error = servers(text).expect_err(text);
            for part in ["hunter2", "1234"] {
                assert!(!error.contains(part), "{text}: {error}");
            }
            assert!(error.contains("percent-encode"), "{text}: {error}");
        }
        let socket = servers("unix:///run/redis@1.sock").unwrap();
        assert_eq!(socket.to_string(), "/run/redis@1.sock");
    }

    #[test]
    fn display_and_debug_do_not_show_passwords() {
        for text in [
            "redis://u:hunter2@a",
            "redis://u:hunter2@a,b",
            "redis+sentinel://u:hunter2@a/main?sentinel_password=hunter2",
        ] {
            let servers = servers(text).unwrap();
            assert!(!format!("{servers} {servers:?}").contains("hunter2"));
        }
    }
}
