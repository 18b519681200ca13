//! `quota doctor`: checks the settings and dependencies of a server, and prints one line for each finding.
//!
//! The command changes nothing, except that it starts an existing private PostgreSQL if `DATABASE_URL` is not set and
//! no server is running. An unreachable dependency is a finding too. Every check has a time limit.

use std::{fmt::Write as _, io};

use secrecy::SecretString;
use tokio::net::TcpListener;

use crate::{
    config::{Config, RedisServers, RedisSettings},
    db::{self, Lanes, ServerInfo},
    file_limit,
    health_check::Probe,
    invalidations,
    mail::Mailer,
    redis::inspect::{self, Node},
};

/// The maximum number of seconds for which a Redis master that is cut off from its Redis replicas should keep accepting
/// writes.
const LAG_MAX: u32 = 1;

/// The part of its memory that Redis may use before `quota doctor` warns, in percent.
const MEMORY_MAX: u64 = 80;

/// The findings so far.
#[derive(Debug, Default)]
pub struct Report {
    pub text: String,
    /// The number of checks that failed. Warnings do not count.
    pub failed: usize,
}

impl Report {
    pub fn ok(&mut self, about: &str, line: impl std::fmt::Display) {
        let _ = writeln!(self.text, "{about}: {line}");
    }

    fn warning(&mut self, about: &str, line: impl std::fmt::Display) {
        let _ = writeln!(self.text, "{about}: warning: {line}");
    }

    pub fn failure(&mut self, about: &str, line: impl std::fmt::Display) {
        self.failed += 1;
        let _ = writeln!(self.text, "{about}: {line}");
    }

    /// Checks that the server can listen on the configured addresses, or that a running server already listens on them.
    /// Returns whether a server is running.
    pub async fn addresses(&mut self, config: &Config) -> bool {
        let is_running = config.listen.port() > 0 && Probe::Live.check(config.listen).await.is_ok();
        for (name, addr) in [
            ("QUOTA_LISTEN", Some(config.listen)),
            ("QUOTA_METRICS_LISTEN", config.metrics_listen),
            ("QUOTA_GRPC_LISTEN", config.grpc_listen),
        ] {
            let Some(addr) = addr else { continue };
            match TcpListener::bind(addr).await {
                Ok(_) => self.ok(name, format!("{addr} is available")),
                Err(error) if is_running && error.kind() == io::ErrorKind::AddrInUse => {
                    self.ok(name, format!("{addr} is in use; a server is running"));
                }
                Err(error) => self.failure(name, format!("cannot listen on {addr}: {error}")),
            }
        }
        is_running
    }

    /// Checks the database of the running server through that server, because another process cannot use the private
    /// PostgreSQL.
    pub async fn running_server(&mut self, config: &Config) {
        match Probe::Ready.check(config.listen).await {
            Ok(()) => self.ok(
                "database",
                "the running server uses the private PostgreSQL, and is ready",
            ),
            Err(error) => self.failure("database", format!("{error:#}")),
        }
    }

    /// Checks that the open-file limit allows the configured number of client connections.
    pub fn connections(&mut self, config: &Config) {
        let limit = file_limit::raise();
        let fit = file_limit::connections(config.connections, limit, config.database.pool);
        let at_most = |limit: usize| match limit {
            0 => "any number".to_owned(),
            limit => limit.to_string(),
        };
        let line = format!(
            "{fit} client connections, {} per address, {} per network",
            at_most(config.connections_per_address),
            at_most(config.connections_per_network)
        );
        if fit < config.connections {
            self.warning(
                "QUOTA_CONNECTIONS",
                format!("{line}: the open-file limit (ulimit -n) does not allow more"),
            );
        } else {
            self.ok("QUOTA_CONNECTIONS", line);
        }
    }

    /// Checks Redis. Returns the configured or connected number of replicas, whichever is larger.
    pub async fn redis(&mut self, config: &Config) -> usize {
        let mut replicas = config.replicas;
        if let Some(settings) = &config.redis {
            let connected = self.redis_servers(config, settings).await;
            if connected > replicas {
                self.warning(
                    "redis",
                    format!("{connected} replicas are connected, but QUOTA_REPLICAS is {replicas}"),
                );
                replicas = connected;
            }
        } else if replicas > 1 {
            self.failure(
                "redis",
                format!("{replicas} replicas need REDIS_URL to share their limits"),
            );
        } else {
            self.ok(
                "redis",
                "not configured: limits are kept in memory, for a single replica",
            );
        }
        replicas
    }

    /// Checks the database, and whether it allows enough connections for this number of replicas.
    pub async fn database(&mut self, config: &Config, replicas: usize, url: &SecretString) {
        if let Some(host) = db::plaintext_host(url).await {
            self.warning("database", plaintext(&host));
        }
        match db::inspect(url).await {
            Ok(server) => self.database_server(config, replicas, &server),
            Err(error) => self.failure("database", db::chain(&error)),
        }
    }

    /// Connects to the mail server and signs in, but does not send an email.
    pub async fn mail(&mut self, config: &Config) {
        let mailer = match Mailer::new(config) {
            Ok(mailer) => mailer,
            Err(error) => return self.failure("mail", db::chain(&error)),
        };
        match mailer.test().await {
            None => self.ok(
                "mail",
                format!(
                    "SMTP_URL is not set: emails are written to {}",
                    config.data_dir.join("mail").display()
                ),
            ),
            Some(Ok(())) => self.ok("mail", "the mail server accepts the connection"),
            Some(Err(error)) => self.failure("mail", db::chain(&error)),
        }
    }

    fn database_server(&mut self, config: &Config, replicas: usize, server: &ServerInfo) {
        self.ok("database", format!("PostgreSQL {}", server.version));
        self.ok(
            "database",
            format!("{} of {} migrations applied", server.applied, server.known),
        );
        let it = &config.database;
        self.ok(
            "database",
            format!(
                "{} connections per replica: {}",
                it.pool,
                Lanes::divide(it.pool)
            ),
        );
        let line = connections(it.pool, replicas, server);
        if it.pool * replicas <= server.available() {
            self.ok("database", line);
        } else {
            self.failure("database", format!("{line}: too many"));
        }
        self.ok(
            "database",
            format!(
                "timeouts: {:?} for a free connection, {:?} to connect, {:?} for a statement, {:?} for a lock",
                it.wait, it.connect_timeout, it.statement_timeout, it.lock_timeout
            ),
        );
    }

    /// Checks the Redis servers. Returns the number of replicas that are known to be connected.
    async fn redis_servers(&mut self, config: &Config, settings: &RedisSettings) -> usize {
        let servers = &settings.servers;
        let tls = if servers.tls() { " over TLS" } else { "" };
        self.ok("redis", format!("{}: {servers}{tls}", servers.mode()));
        self.ok(
            "redis",
            format!(
                "{} connections per replica and one for messages; timeouts: {:?} for a call, {:?} to connect; \
                 leases expire after {:?}; on failure: {}",
                settings.connections,
                settings.timeout,
                settings.connect_timeout,
                config.lease_ttl,
                config.on_redis_failure.as_str(),
            ),
        );
        let nodes = match inspect::nodes(settings, &invalidations::channel(&settings.prefix)).await
        {
            Ok(nodes) => nodes,
            Err(error) => {
                self.failure("redis", error);
                return 0;
            }
        };
        let subscribers = |node: &Result<Node, _>| node.as_ref().ok()?.subscribers;
        let counts: Vec<usize> = nodes.iter().filter_map(subscribers).collect();
        let connected = counts.iter().sum::<usize>();
        let line = match counts.len() {
            known if known == nodes.len() => connected.to_string(),
            0 => "unknown".to_owned(),
            _ => format!("at least {connected}"),
        };
        let replicas = config.replicas.max(connected);
        for node in nodes {
            match node {
                Ok(node) => self.node(replicas, settings, &node),
                // The cluster may still work without this node.
                Err(error) if matches!(servers, RedisServers::Cluster(_)) => {
                    self.warning("redis", error);
                }
                Err(error) => self.failure("redis", error),
            }
        }
        self.ok("redis", format!("replicas connected: {line}"));
        connected
    }

    /// Checks a Redis server, and whether it allows enough connections for this number of replicas.
    fn node(&mut self, replicas: usize, settings: &RedisSettings, node: &Node) {
        let addr = &node.addr;
        if let Some(error) = &node.script_error {
            self.failure(
                "redis",
                format!(
                    "{addr} rejects scripts that call TIME and INFO, which the counters require: {error}"
                ),
            );
        }
        let wanted = replicas * (settings.connections + 1);
        if let Some(max) = node.max_clients.filter(|max| wanted > *max) {
            self.failure(
                "redis",
                format!(
                    "{addr} allows {max} connections (maxclients), but the replicas need {wanted}"
                ),
            );
        }
        self.ok(
            "redis",
            format!(
                "{addr}: {}, {}, responds in {:.1?}",
                node.version.as_deref().unwrap_or("unknown version"),
                node.mode.as_deref().unwrap_or("unknown mode"),
                node.round_trip
            ),
        );
        if node.round_trip > settings.timeout {
            self.warning(
                "redis",
                format!("{addr}: responds more slowly than QUOTA_REDIS_TIMEOUT allows"),
            );
        }
        let is_cluster = matches!(settings.servers, RedisServers::Cluster(_));
        if node.mode.as_deref() == Some("cluster") && !is_cluster {
            self.failure(
                "redis",
                format!("{addr} is a cluster node: use redis+cluster://"),
            );
        }
        match node.role.as_deref() {
            Some("master") => {}
            _ if is_cluster => {}
            Some(role) => self.failure("redis", format!("{addr} is a {role}, not a master")),
            None => self.warning(
                "redis",
                format!("{addr}: unknown role: it must be a master"),
            ),
        }
        match node.eviction.as_deref() {
            Some("noeviction") => {
                self.ok("redis", format!("{addr}: maxmemory-policy noeviction"));
            }
            Some(policy) => self.warning(
                "redis",
                format!(
                    "{addr}: maxmemory-policy {policy}: counters may be evicted; set noeviction"
                ),
            ),
            None => self.warning(
                "redis",
                format!("{addr}: unknown maxmemory-policy: it must be noeviction"),
            ),
        }
        self.memory(node);
        // Persistence is optional: lost buckets start empty, and calendar quotas are in PostgreSQL.
        let append_only = match node.append_only {
            Some(true) => "on",
            Some(false) => "off",
            None => "unknown",
        };
        let snapshots = match node.snapshots.as_deref() {
            Some("") => "no snapshots".to_owned(),
            Some(save) => format!("snapshots {save}"),
            None => "snapshots unknown".to_owned(),
        };
        self.ok(
            "redis",
            format!("{addr}: persistence: append-only file {append_only}, {snapshots}"),
        );
        if matches!(settings.servers, RedisServers::Sentinel { .. }) {
            self.failover(node);
        }
    }

    /// Checks that the memory of a Redis server is not almost full.
    fn memory(&mut self, node: &Node) {
        let addr = &node.addr;
        let Some(used) = node.used_memory else {
            return self.ok("redis", format!("{addr}: memory: unknown"));
        };
        let line = format!("{addr}: memory: {} MiB used", mib(used));
        match node.max_memory {
            Some(0) => self.ok("redis", format!("{line}, no maxmemory")),
            Some(max) if used > max / 100 * MEMORY_MAX => self.warning(
                "redis",
                format!(
                    "{line}, maxmemory is {} MiB: when the memory is full, Redis rejects writes, as in an outage; \
                     raise maxmemory",
                    mib(max)
                ),
            ),
            Some(max) => self.ok("redis", format!("{line}, maxmemory is {} MiB", mib(max))),
            None => self.ok("redis", format!("{line}, unknown maxmemory")),
        }
    }

    /// Checks that a Redis master that is cut off from its Redis replicas soon stops accepting writes.
    fn failover(&mut self, node: &Node) {
        let addr = &node.addr;
        if node.min_replicas_to_write == Some(0) {
            self.warning(
                "redis",
                format!(
                    "{addr}: min-replicas-to-write is 0, so a partitioned master keeps accepting writes; \
                     set it to 1, and min-replicas-max-lag to {LAG_MAX}"
                ),
            );
        } else if let Some(lag) = node.min_replicas_max_lag.filter(|lag| *lag > LAG_MAX) {
            self.warning(
                "redis",
                format!(
                    "{addr}: min-replicas-max-lag is {lag}, so a partitioned master keeps accepting writes for \
                     {lag} seconds; set it to {LAG_MAX}"
                ),
            );
        }
    }
}

fn mib(bytes: u64) -> u64 {
    bytes / 1024 / 1024
}

fn connections(pool: usize, replicas: usize, server: &ServerInfo) -> String {
    format!(
        "{pool} connections per replica × {replicas}: {} of {} available (max_connections is {}, {} of them reserved)",
        pool * replicas,
        server.available(),
        server.max_connections,
        server.reserved_connections,
    )
}

fn plaintext(host: &str) -> String {
    format!(
        "the connection to {host} is not encrypted, so others on the network can read the password and all data; \
         add sslmode=require to DATABASE_URL"
    )
}

/// Logs a warning at startup if the database is reached over a public network without encryption.
pub async fn warn_of_plaintext(url: &SecretString) {
    if let Some(host) = db::plaintext_host(url).await {
        tracing::warn!("{}", plaintext(&host));
    }
}

/// Logs a warning at startup if the replicas together may open more connections than PostgreSQL allows. Without the
/// warning, the problem would show only under load.
pub async fn warn_of_too_many_connections(config: &Config, url: &SecretString) {
    if let Ok(server) = db::inspect(url).await
        && config.database.pool * config.replicas > server.available()
    {
        let connections = connections(config.database.pool, config.replicas, &server);
        tracing::warn!(
            connections,
            "the replicas may open more connections than PostgreSQL allows"
        );
    }
}
