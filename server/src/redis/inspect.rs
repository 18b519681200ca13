//! What `quota doctor` tells of Redis: of the one server, of the master that Sentinel names, or of the nodes of a
//! cluster that are named. Looks and changes nothing.

use std::time::{Duration, Instant};

use redis::{AsyncConnectionConfig, Client, FromRedisValue, aio::MultiplexedConnection};
use tokio::time::timeout;

use super::keeper::{ConnectError, Source, chain, line};
use crate::config::{RedisServers, RedisSettings};

/// Steps that a look takes.
const STEPS: u32 = 8;

/// One server, as it describes itself. What it does not tell is empty.
#[derive(Debug)]
pub struct Node {
    pub addr: String,
    /// Redis or Valkey.
    pub product: &'static str,
    pub version: String,
    /// `standalone` or `cluster`.
    pub mode: String,
    pub role: String,
    /// `maxmemory-policy`
    pub eviction: String,
    pub persistence: String,
    /// `None` where it may not be asked.
    pub min_replicas_to_write: Option<u32>,
    /// How many connections it takes; `None` where it does not tell.
    pub most_clients: Option<usize>,
    /// Why it would not run the counters' script.
    pub refuses_scripts: Option<String>,
    /// How many listen to the channel.
    pub listening: usize,
    /// How long one answer took.
    pub took: Duration,
}

/// Each that is named, and who listens there to `channel`; an error for all when it cannot be found who that is.
pub async fn nodes(
    settings: &RedisSettings,
    channel: &str,
) -> Result<Vec<Result<Node, String>>, String> {
    if settings.servers.tls() {
        super::install_tls();
    }
    let limit = settings.connect_timeout;
    let mut source = Source::new(settings).map_err(|error| chain(&error))?;
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
        let looked = timeout(limit * STEPS, node(&client, settings, channel)).await;
        let looked = looked.unwrap_or(Err(ConnectError::Late(limit * STEPS)));
        nodes.push(looked.map_err(|error| format!("{addr}: {}", chain(&error))));
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
    let took = began.elapsed();
    let it = &mut connection;
    let info: String = told(it, &["INFO"]).await.unwrap_or_default();
    let value = |name: &str| line(&info, name).unwrap_or_default().to_owned();
    let (product, version) = match line(&info, "valkey_version") {
        Some(version) => ("Valkey", version.to_owned()),
        None => ("Redis", value("redis_version")),
    };
    let append_only = match value("aof_enabled").as_str() {
        "1" => "append-only file on",
        _ => "append-only file off",
    };
    let snapshots: Option<(String, String)> = told(it, &["CONFIG", "GET", "save"]).await;
    let persistence = match snapshots {
        Some((_, save)) if save.is_empty() => format!("{append_only}, no snapshots"),
        Some((_, save)) => format!("{append_only}, snapshots {save}"),
        None => append_only.to_owned(),
    };
    let minimum: Option<(String, u32)> =
        told(it, &["CONFIG", "GET", "min-replicas-to-write"]).await;
    let script: Result<(), _> = redis::cmd("EVAL")
        .arg("redis.call('TIME') redis.call('INFO', 'server') return redis.status_reply('OK')")
        .arg(0)
        .query_async(it)
        .await;
    let listening: Option<(String, usize)> = told(it, &["PUBSUB", "NUMSUB", channel]).await;
    Ok(Node {
        addr: client.get_connection_info().addr().to_string(),
        product,
        version,
        mode: value("redis_mode"),
        role: value("role"),
        eviction: value("maxmemory_policy"),
        persistence,
        min_replicas_to_write: minimum.map(|(_, n)| n),
        most_clients: value("maxclients").parse().ok(),
        refuses_scripts: script.err().map(|error| error.to_string()),
        listening: listening.map_or(0, |(_, n)| n),
        took,
    })
}

/// `None` where an access list, or who runs it for others, forbids to ask.
async fn told<T: FromRedisValue>(
    connection: &mut MultiplexedConnection,
    words: &[&str],
) -> Option<T> {
    let (name, arguments) = words.split_first()?;
    let mut cmd = redis::cmd(name);
    cmd.arg(arguments);
    cmd.query_async(connection).await.ok()
}
