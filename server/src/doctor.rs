//! `quota doctor`: whether what the server depends on is as it should be, line by line.
//!
//! Looks and changes nothing. What is away is a line too: it never hangs for longer than the time limits that are
//! set.

use std::fmt::Write as _;

use secrecy::SecretString;
use tokio::net::TcpListener;

use crate::{
    config::{Config, RedisServers, RedisSettings},
    db::{self, Found, Lanes},
    file_limit,
    redis::inspect::{self, Node},
    revocations,
};

/// What was found so far.
#[derive(Debug, Default)]
pub struct Report {
    pub text: String,
    /// Lines about what keeps the server from working as it is set.
    pub faults: usize,
}

impl Report {
    pub fn fine(&mut self, about: &str, line: impl std::fmt::Display) {
        let _ = writeln!(self.text, "{about}: {line}");
    }

    /// It works, and had better be different.
    fn warning(&mut self, about: &str, line: impl std::fmt::Display) {
        let _ = writeln!(self.text, "{about}: warning: {line}");
    }

    pub fn fault(&mut self, about: &str, line: impl std::fmt::Display) {
        self.faults += 1;
        let _ = writeln!(self.text, "{about}: {line}");
    }

    /// Whether the addresses to listen on are free.
    pub async fn addresses(&mut self, config: &Config) {
        for (name, addr) in [
            ("QUOTA_LISTEN", Some(config.listen)),
            ("QUOTA_METRICS_LISTEN", config.metrics_listen),
        ] {
            let Some(addr) = addr else { continue };
            match TcpListener::bind(addr).await {
                Ok(_) => self.fine(name, format!("{addr} is free")),
                Err(error) => self.fault(name, format!("cannot listen on {addr}: {error}")),
            }
        }
    }

    /// Whether as many clients can connect as the settings say.
    pub fn connections(&mut self, config: &Config) {
        let limit = file_limit::raise();
        let fit = file_limit::connections(config.connections, limit, config.database.pool);
        let at_most = |limit: usize| match limit {
            0 => "any number".to_owned(),
            limit => limit.to_string(),
        };
        let line = format!(
            "{fit} client connections, {} from one address and {} from one network",
            at_most(config.connections_per_address),
            at_most(config.connections_per_network)
        );
        if fit < config.connections {
            self.warning(
                "QUOTA_CONNECTIONS",
                format!("{line}: the limit of open files (ulimit -n) allows no more"),
            );
        } else {
            self.fine("QUOTA_CONNECTIONS", line);
        }
    }

    pub async fn dependencies(&mut self, config: &Config, url: &SecretString) {
        let mut replicas = config.replicas;
        if let Some(settings) = &config.redis {
            let seen = self.redis(config, settings).await;
            if seen > replicas {
                self.warning(
                    "redis",
                    format!("more replicas are connected than QUOTA_REPLICAS says: {seen}, not {replicas}"),
                );
                replicas = seen;
            }
        } else if replicas > 1 {
            self.fault(
                "redis",
                format!("{replicas} replicas need a REDIS_URL to share their limits"),
            );
        } else {
            self.fine(
                "redis",
                "none: limits are kept in this process, for one replica",
            );
        }
        match db::inspect(url).await {
            Ok(found) => self.database(config, replicas, &found),
            Err(error) => self.fault("database", db::chain(&error)),
        }
    }

    fn database(&mut self, config: &Config, replicas: usize, found: &Found) {
        self.fine("database", format!("PostgreSQL {}", found.version));
        self.fine(
            "database",
            format!("{} of {} migrations applied", found.applied, found.known),
        );
        let it = &config.database;
        self.fine(
            "database",
            format!("of {} connections, {}", it.pool, Lanes::divide(it.pool)),
        );
        let line = connections(it.pool, replicas, found);
        if it.pool * replicas <= found.available() {
            self.fine("database", line);
        } else {
            self.fault("database", format!("{line}: too many"));
        }
        self.fine(
            "database",
            format!(
                "waits {:?} for a connection, {:?} to connect, {:?} for a statement, {:?} for a lock",
                it.wait, it.connect_timeout, it.statement_timeout, it.lock_timeout
            ),
        );
    }

    /// Answers how many replicas are connected.
    async fn redis(&mut self, config: &Config, settings: &RedisSettings) -> usize {
        let servers = &settings.servers;
        let tls = if servers.tls() { ", by TLS" } else { "" };
        self.fine("redis", format!("{}: {servers}{tls}", servers.mode()));
        self.fine(
            "redis",
            format!(
                "{} connections a replica, one more for messages; waits {:?} for an answer, {:?} to connect; \
                 leases of {:?}; {} when it fails",
                settings.connections,
                settings.timeout,
                settings.connect_timeout,
                config.lease_ttl,
                config.on_redis_failure.name(),
            ),
        );
        let nodes = match inspect::nodes(settings, &revocations::channel(&settings.prefix)).await {
            Ok(nodes) => nodes,
            Err(error) => {
                self.fault("redis", error);
                return 0;
            }
        };
        let mut listening = 0;
        for node in nodes {
            match node {
                Ok(node) => {
                    self.node(config, settings, &node);
                    listening += node.listening;
                }
                // The others of a cluster may do.
                Err(error) if matches!(servers, RedisServers::Cluster(_)) => {
                    self.warning("redis", error);
                }
                Err(error) => self.fault("redis", error),
            }
        }
        self.fine("redis", format!("replicas connected: {listening}"));
        listening
    }

    fn node(&mut self, config: &Config, settings: &RedisSettings, node: &Node) {
        let addr = &node.addr;
        if let Some(error) = &node.refuses_scripts {
            self.fault(
                "redis",
                format!(
                    "{addr} does not run scripts with TIME and INFO, as the counters need: {error}"
                ),
            );
        }
        let wanted = config.replicas * (settings.connections + 1);
        if let Some(most) = node.most_clients.filter(|most| wanted > *most) {
            self.fault(
                "redis",
                format!(
                    "{addr} takes {most} connections (maxclients), and the replicas need {wanted}"
                ),
            );
        }
        self.fine(
            "redis",
            format!(
                "{addr}: {} {}, {}, answers in {:.1?}",
                node.product, node.version, node.mode, node.took
            ),
        );
        if node.took > settings.timeout {
            self.warning("redis", format!("{addr}: slower than QUOTA_REDIS_TIMEOUT"));
        }
        if node.mode == "cluster" && !matches!(settings.servers, RedisServers::Cluster(_)) {
            self.fault(
                "redis",
                format!("{addr} is of a cluster: name it as redis+cluster://"),
            );
        }
        if node.role != "master" && !matches!(settings.servers, RedisServers::Cluster(_)) {
            self.fault("redis", format!("{addr} is a {}, and no master", node.role));
        }
        if node.eviction == "noeviction" {
            self.fine("redis", format!("{addr}: maxmemory-policy noeviction"));
        } else {
            self.warning(
                "redis",
                format!(
                    "{addr}: maxmemory-policy {}: counters may be thrown away; set noeviction",
                    node.eviction
                ),
            );
        }
        // Not needed: what is lost begins empty, and calendar quotas are in PostgreSQL.
        self.fine(
            "redis",
            format!("{addr}: persistence: {}", node.persistence),
        );
        if matches!(settings.servers, RedisServers::Sentinel { .. })
            && node.min_replicas_to_write == Some(0)
        {
            self.warning(
                "redis",
                format!(
                    "{addr}: min-replicas-to-write is 0: a master that is cut off goes on counting; set 1, \
                     and min-replicas-max-lag 1"
                ),
            );
        }
    }
}

fn connections(pool: usize, replicas: usize, found: &Found) -> String {
    format!(
        "{pool} connections a replica, times {replicas}: {} of the {} that may be used (max_connections {}, \
         {} of them reserved)",
        pool * replicas,
        found.available(),
        found.max_connections,
        found.reserved_connections,
    )
}

/// Says so in the log, at the start: a replica too many is noticed when it is too late.
pub async fn warn_of_too_many_connections(config: &Config, url: &SecretString) {
    if let Ok(found) = db::inspect(url).await
        && config.database.pool * config.replicas > found.available()
    {
        let connections = connections(config.database.pool, config.replicas, &found);
        tracing::warn!(connections, "more connections than PostgreSQL has");
    }
}
