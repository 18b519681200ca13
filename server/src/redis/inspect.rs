//! Reads the properties of Redis that `quota doctor` reports. The properties are read from the single server, the
//! master that Sentinel reports, or the configured nodes of a cluster.

use std::time::{Duration, Instant};

use redis::{AsyncConnectionConfig, Client, FromRedisValue, aio::MultiplexedConnection};
use tokio::time::timeout;

use super::source::{ConnectError, ServerSource, info_value};
use crate::{
    config::{RedisServers, RedisSettings},
    error_chain::chain,
};

/// The time limit for inspecting a node, as a multiple of the connect timeout, since the inspection takes several round
/// trips.
const STEPS: u32 = 9;

/// Information that a server reports about itself. A property is `None` if it cannot be read, for example because an
/// ACL or the hosting provider hides it.
#[derive(Debug)]
pub struct Node {
    pub addr: String,
    /// Redis or Valkey, and its version.
    pub version: Option<String>,
    /// `standalone` or `cluster`.
    pub mode: Option<String>,
    pub role: Option<String>,
    /// The `maxmemory-policy` setting.
    pub eviction: Option<String>,
    /// The memory that the server uses, in bytes.
    pub used_memory: Option<u64>,
    /// The `maxmemory` setting, in bytes. 0 if the memory is not limited.
    pub max_memory: Option<u64>,
    /// Whether the append-only file is on.
    pub append_only: Option<bool>,
    /// The `save` setting. Empty if there are no snapshots.
    pub snapshots: Option<String>,
    pub min_replicas_to_write: Option<u32>,
    /// The maximum lag in seconds.
    pub min_replicas_max_lag: Option<u32>,
    /// The maximum number of connections.
    pub max_clients: Option<usize>,
    /// The server's error message, if the server rejects a command that the counters' script uses.
    pub script_error: Option<String>,
    /// The number of subscribers to the invalidation channel.
    pub subscribers: Option<usize>,
    pub round_trip: Duration,
}

/// Inspects each server. Returns a single error if the servers cannot be determined.
pub async fn nodes(
    settings: &RedisSettings,
    channel: &str,
) -> Result<Vec<Result<Node, String>>, String> {
    if settings.servers.tls() {
        super::install_tls();
    }
    let limit = settings.connect_timeout;
    let mut source = ServerSource::new(settings).map_err(|error| chain(&error))?;
    let clients = match (source.client(limit).await, &settings.servers) {
        (Ok(Some(client)), _) => vec![client],
        (Ok(None), RedisServers::Cluster(infos)) => {
            let clients = infos.iter().map(|info| Client::open(info.clone()));
            let clients = clients.collect::<Result<_, _>>();
            clients.map_err(|error| chain(&error))?
        }
        (Ok(None), _) => Vec::new(),
        (Err(error), _) => return Err(chain(&error)),
    };
    let mut nodes = Vec::new();
    for client in clients {
        let addr = client.get_connection_info().addr().to_string();
        let inspected = timeout(limit * STEPS, node(&client, settings, channel)).await;
        let inspected = inspected.unwrap_or(Err(ConnectError::Late(limit * STEPS)));
        nodes.push(inspected.map_err(|error| format!("{addr}: {}", chain(&error))));
    }
    Ok(nodes)
}

async fn node(
    client: &Client,
    settings: &RedisSettings,
    channel: &str,
) -> Result<Node, ConnectError> {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(settings.connect_timeout))
        .set_response_timeout(Some(settings.connect_timeout));
    let mut connection = client
        .get_multiplexed_async_connection_with_config(&config)
        .await?;
    redis::cmd("PING")
        .query_async::<()>(&mut connection)
        .await?;
    let began = Instant::now();
    redis::cmd("PING")
        .query_async::<()>(&mut connection)
        .await?;
    let round_trip = began.elapsed();
    let it = &mut connection;
    let info: String = query(it, &["INFO"]).await.unwrap_or_default();
    let value = |name: &str| info_value(&info, name).map(str::to_owned);
    let bytes = |name: &str| info_value(&info, name)?.parse::<u64>().ok();
    let version = match info_value(&info, "valkey_version") {
        Some(version) => Some(format!("Valkey {version}")),
        None => info_value(&info, "redis_version").map(|version| format!("Redis {version}")),
    };
    let snapshots: Option<(String, String)> = query(it, &["CONFIG", "GET", "save"]).await;
    let minimum: Option<(String, u32)> =
        query(it, &["CONFIG", "GET", "min-replicas-to-write"]).await;
    let max_lag: Option<(String, u32)> =
        query(it, &["CONFIG", "GET", "min-replicas-max-lag"]).await;
    let script: Result<(), _> = redis::cmd("EVAL")
        .arg("redis.call('TIME') redis.call('INFO', 'server') return redis.status_reply('OK')")
        .arg(0)
        .query_async(it)
        .await;
    let subscribers: Option<(String, usize)> = query(it, &["PUBSUB", "NUMSUB", channel]).await;
    Ok(Node {
        addr: client.get_connection_info().addr().to_string(),
        version,
        mode: value("redis_mode"),
        role: value("role"),
        eviction: value("maxmemory_policy"),
        used_memory: bytes("used_memory"),
        max_memory: bytes("maxmemory"),
        append_only: info_value(&info, "aof_enabled").map(|enabled| enabled == "1"),
        snapshots: snapshots.map(|(_, save)| save),
        min_replicas_to_write: minimum.map(|(_, n)| n),
        min_replicas_max_lag: max_lag.map(|(_, n)| n),
        max_clients: info_value(&info, "maxclients").and_then(|max| max.parse().ok()),
        script_error: script.err().map(|error| error.to_string()),
        subscribers: subscribers.map(|(_, n)| n),
        round_trip,
    })
}

/// Sends a command. Returns `None` if the command fails, for example because an ACL or the hosting provider forbids it.
async fn query<T: FromRedisValue>(
    connection: &mut MultiplexedConnection,
    words: &[&str],
) -> Option<T> {
    let (name, arguments) = words.split_first()?;
    let mut cmd = redis::cmd(name);
    cmd.arg(arguments);
    cmd.query_async(connection).await.ok()
}
