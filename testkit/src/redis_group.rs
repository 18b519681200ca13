//! Groups of Redis servers: a master and a replica with sentinels, and a cluster.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use tokio::time::sleep;

use crate::redis::{PATIENCE, RedisServer};

/// After how many milliseconds of silence the sentinels consider a server down. Short pauses of the master must not
/// cause a failover. After a failover, the old master must be considered down within eight seconds, because otherwise a
/// sentinel that does not know of the failover yet could undo it.
const DOWN_AFTER: u32 = 5_000;
/// Replaces [`DOWN_AFTER`] while a test waits for a failover.
const DOWN_AFTER_IN_FAILOVER: u32 = 400;
/// After how many milliseconds of silence the nodes of a cluster consider each other down. No test waits for this, and
/// a pause of the machine must not make a cluster unavailable.
const CLUSTER_NODE_TIMEOUT: &str = "60000";

/// Waits until a condition holds. Panics after [`PATIENCE`].
async fn until<F: Future<Output = bool>>(what: &str, is_so: impl Fn() -> F) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so().await {
        assert!(Instant::now() < deadline, "{what}: not in time");
        sleep(Duration::from_millis(20)).await;
    }
}

/// A master and a replica with three sentinels.
#[derive(Debug)]
pub struct SentinelGroup {
    /// The initial master, then the initial replica.
    pub servers: [RedisServer; 2],
    sentinels: Vec<RedisServer>,
}

impl SentinelGroup {
    pub async fn start() -> Self {
        let master = RedisServer::start().await;
        let port = master.port.to_string();
        let replica = RedisServer::start_with(&["--replicaof", "127.0.0.1", &port]).await;
        let mut sentinels = Vec::new();
        for _ in 0..3 {
            // Sentinel rewrites its configuration file, so each sentinel gets its own file.
            let file = tempfile::NamedTempFile::new().expect("a file");
            let (_, path) = file.keep().expect("the file is kept");
            let config = format!(
                "sentinel monitor main 127.0.0.1 {port} 2\n\
                 sentinel down-after-milliseconds main {DOWN_AFTER}\n\
                 sentinel failover-timeout main 2000\n"
            );
            std::fs::write(&path, config).expect("the file is writable");
            let path = path.to_str().expect("a UTF-8 path");
            sentinels.push(RedisServer::start_with(&["--sentinel", path]).await);
        }
        let group = Self {
            servers: [master, replica],
            sentinels,
        };
        until(
            "the sentinels know each other and the replica",
            async || {
                for sentinel in &group.sentinels {
                    let masters = sentinel.command("SENTINEL MASTER main").await;
                    let value = |name: &str| {
                        let mut lines = masters.lines().map(str::trim);
                        lines.find(|line| *line == name)?;
                        lines.nth(1).map(str::to_owned)
                    };
                    if value("num-slaves").as_deref() != Some("1")
                        || value("num-other-sentinels").as_deref() != Some("2")
                    {
                        return false;
                    }
                }
                let replica = group.servers[1].command("INFO replication").await;
                replica.contains("master_link_status:up")
            },
        )
        .await;
        group
    }

    pub fn url(&self) -> String {
        let addrs = self.sentinels.iter().map(|it| it.addr().to_string());
        format!(
            "redis+sentinel://{}/main",
            addrs.collect::<Vec<_>>().join(",")
        )
    }

    /// Waits until the initial replica is the master. The initial master must have been killed or frozen.
    pub async fn failed_over(&self) {
        self.set_down_after(DOWN_AFTER_IN_FAILOVER).await;
        until("the replica is the master", async || {
            // Sentinel closes all connections to the server that it promotes, including this one, so there may be no
            // reply.
            let role = self.servers[1].answer("INFO replication").await;
            role.is_some_and(|role| role.contains("role:master"))
        })
        .await;
        self.set_down_after(DOWN_AFTER).await;
    }

    async fn set_down_after(&self, millis: u32) {
        let line = format!("SENTINEL SET main down-after-milliseconds {millis}");
        for sentinel in &self.sentinels {
            let reply = sentinel.command(&line).await;
            assert!(reply.starts_with("+OK"), "{reply}");
        }
    }
}

impl Drop for SentinelGroup {
    fn drop(&mut self) {
        for sentinel in &self.sentinels {
            let _ = std::fs::remove_file(&sentinel.options[1]);
        }
    }
}

/// Three masters without replicas.
#[derive(Debug)]
pub struct RedisCluster {
    pub nodes: Vec<RedisServer>,
}

impl RedisCluster {
    pub async fn start() -> Self {
        let mut nodes = Vec::new();
        for _ in 0..3 {
            let arguments = [
                "--cluster-enabled",
                "yes",
                "--cluster-node-timeout",
                CLUSTER_NODE_TIMEOUT,
                "--cluster-port",
                "{free}",
            ];
            nodes.push(RedisServer::start_with(&arguments).await);
        }
        for (i, (node, slots)) in nodes
            .iter()
            .zip(["0 5460", "5461 10922", "10923 16383"])
            .enumerate()
        {
            node.command(&format!("CLUSTER ADDSLOTSRANGE {slots}"))
                .await;
            node.command(&format!("CLUSTER SET-CONFIG-EPOCH {}", i + 1))
                .await;
            let bus = node.options.last().expect("the bus's port");
            let meet = format!("CLUSTER MEET 127.0.0.1 {} {bus}", node.port);
            if i > 0 {
                nodes[0].command(&meet).await;
            }
        }
        until("the cluster is whole", async || {
            for node in &nodes {
                let info = node.command("CLUSTER INFO").await;
                let whole = [
                    "cluster_state:ok",
                    "cluster_known_nodes:3",
                    "cluster_size:3",
                ];
                if !whole.iter().all(|it| info.contains(it)) {
                    return false;
                }
            }
            true
        })
        .await;
        Self { nodes }
    }

    pub fn url(&self) -> String {
        let addrs = self.nodes.iter().map(|it| it.addr().to_string());
        format!("redis://{}", addrs.collect::<Vec<_>>().join(","))
    }
}
