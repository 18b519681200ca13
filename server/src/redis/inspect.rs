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

/// Information that a server reports about itself. Most strings are empty if the server hides the information.
#[derive(Debug)]
pub struct Node {
    pub addr: String,
    /// Redis or Valkey.
    pub product: &'static str,
    pub version: String,
    /// `standalone` or `cluster`.
    pub mode: String,
    pub role: String,
    /// The `maxmemory-policy` setting.
    pub eviction: String,
    pub persistence: String,
    /// `None` if the setting cannot be read.
    pub min_replicas_to_write: Option<u32>,
    /// The maximum lag in seconds. `None` if the setting cannot be read.
    pub min_replicas_max_lag: Option<u32>,
    /// The maximum number of connections. `None` if the server hides this number.
    pub max_clients: Option<usize>,
    /// The server's error message, if the server rejects a command that the counters' script uses.
    pub script_error: Option<String>,
    /// The number of subscribers to the invalidation channel. 0 if the server hides this number.
    pub subscribers: usize,
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
    let value = |name: &str| info_value(&info, name).unwrap_or_default().to_owned();
    let (product, version) = match info_value(&info, "valkey_version") {
        Some(version) => ("Valkey", version.to_owned()),
        None => ("Redis", value("redis_version")),
    };
    let append_only = match value("aof_enabled").as_str() {
        "1" => "append-only file on",
        _ => "append-only file off",
    };
    let snapshots: Option<(String, String)> = query(it, &["CONFIG", "GET", "save"]).await;
    let persistence = match snapshots {
        Some((_, save)) if save.is_empty() => format!("{append_only}, no snapshots"),
        Some((_, save)) => format!("{append_only}, snapshots {save}"),
        None => append_only.to_owned(),
    };
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
        product,
        version,
        mode: value("redis_mode"),
        role: value("role"),
        eviction: value("maxmemory_policy"),
        persistence,
        min_replicas_to_write: minimum.map(|(_, n)| n),
        min_replicas_max_lag: max_lag.map(|(_, n)| n),
        max_clients: value("maxclients").parse().ok(),
        script_error: script.err().map(|error| error.to_string()),
        subscribers: subscribers.map_or(0, |(_, n)| n),
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
