//! Finds the server to connect to, and connects to it.

use std::{sync::Arc, time::Duration};

use redis::{
    AsyncConnectionConfig, Client, RedisError,
    aio::MultiplexedConnection,
    cluster::{ClusterClient, ClusterClientBuilder},
    sentinel::{SentinelClient, SentinelNodeConnectionInfo, SentinelServerType},
};
use tokio::time::timeout;

use super::connection::Connection;
use crate::config::{RedisServers, RedisSettings, redis::tcp_settings};

/// The maximum number of calls in flight per connection. Further calls wait, within their own deadlines.
const CONCURRENT: usize = 1024;
/// How long a cluster node may take to respond, unless one of the configured timeouts is longer.
const UNANSWERED: Duration = Duration::from_secs(2);
/// The time limit for querying Sentinel or connecting to a cluster, as a multiple of the connect timeout. A query takes
/// several round trips, including a check of the master that Sentinel reports.
const SENTINEL_STEPS: u32 = 4;

/// Why connecting failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    #[error("cannot connect to Redis")]
    Redis(#[from] RedisError),
    #[error("Redis did not accept the connection within {0:?}")]
    Late(Duration),
    /// The server is not a master. A Redis replica rejects writes and may lag behind.
    #[error("Redis is a {0}, not a master")]
    NoMaster(String),
}

pub(super) enum ServerSource {
    One(Box<Client>),
    Sentinel(Box<SentinelClient>),
    Cluster(Box<ClusterClient>),
}

impl ServerSource {
    pub(super) fn new(settings: &RedisSettings) -> Result<Self, RedisError> {
        Ok(match &settings.servers {
            RedisServers::One(info) => Self::One(Box::new(Client::open(info.clone())?)),
            RedisServers::Sentinel {
                sentinels,
                group,
                master,
                tls,
            } => {
                let mut node = SentinelNodeConnectionInfo::default()
                    .set_redis_connection_info(master.clone())
                    .set_tcp_settings(tcp_settings());
                if *tls {
                    node = node.set_tls_mode(redis::TlsMode::Secure);
                }
                Self::Sentinel(Box::new(SentinelClient::build(
                    sentinels.clone(),
                    group,
                    Some(node),
                    SentinelServerType::Master,
                )?))
            }
            RedisServers::Cluster(nodes) => Self::Cluster(Box::new(
                ClusterClientBuilder::new(nodes.iter().cloned())
                    // By default, the crate would also retry calls that may have been executed.
                    .retries(0)
                    .connection_timeout(settings.connect_timeout)
                    .response_timeout(
                        settings
                            .timeout
                            .max(settings.connect_timeout)
                            .max(UNANSWERED),
                    )
                    .connection_concurrency_limit(CONCURRENT)
                    .tcp_settings(tcp_settings())
                    .build()?,
            )),
        })
    }

    /// Returns a client for the current server. Returns `None` for a cluster.
    pub(super) async fn client(&mut self, limit: Duration) -> Result<Option<Client>, ConnectError> {
        match self {
            Self::One(client) => Ok(Some((**client).clone())),
            Self::Sentinel(sentinel) => {
                let limit = limit * SENTINEL_STEPS;
                let client = timeout(limit, sentinel.async_get_client())
                    .await
                    .map_err(|_| ConnectError::Late(limit))??;
                Ok(Some(client))
            }
            Self::Cluster(_) => Ok(None),
        }
    }

    /// Returns a connection on which the server has responded, and the server's run ID if it is known.
    pub(super) async fn connect(
        &mut self,
        settings: &RedisSettings,
    ) -> Result<(Connection, Option<Arc<str>>), ConnectError> {
        let limit = settings.connect_timeout;
        if let Self::Cluster(cluster) = self {
            // Connecting to a cluster opens a connection to every known node, so the limit is longer.
            let limit = limit * SENTINEL_STEPS;
            let connection = timeout(limit, cluster.get_async_connection())
                .await
                .map_err(|_| ConnectError::Late(limit))??;
            return Ok((Connection::Cluster(connection), None));
        }
        let client = self.client(limit).await?.ok_or(ConnectError::Late(limit))?;
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(None)
            .set_response_timeout(None)
            .set_pipeline_buffer_size(CONCURRENT)
            .set_concurrency_limit(CONCURRENT);
        let connect = async {
            let mut connection = client
                .get_multiplexed_async_connection_with_config(&config)
                .await?;
            let run_id = greet(&mut connection).await?;
            Ok((Connection::One(connection), run_id))
        };
        timeout(limit, connect)
            .await
            .map_err(|_| ConnectError::Late(limit))?
    }
}

/// Checks that the server has loaded its data and does not report a role other than master. Returns its run ID, if the
/// server reports one.
async fn greet(connection: &mut MultiplexedConnection) -> Result<Option<Arc<str>>, ConnectError> {
    redis::cmd("PING").query_async::<()>(connection).await?;
    let replication = info(connection, "replication").await?;
    if let Some(role) = info_value(&replication, "role").filter(|role| *role != "master") {
        return Err(ConnectError::NoMaster(role.to_owned()));
    }
    let server = info(connection, "server").await?;
    Ok(info_value(&server, "run_id").map(Arc::from))
}

/// Returns a section of `INFO`, or an empty string if the server rejects the command, for example because of an ACL.
async fn info(connection: &mut MultiplexedConnection, section: &str) -> Result<String, RedisError> {
    let mut info = redis::cmd("INFO");
    match info.arg(section).query_async(connection).await {
        Err(error) if error.is_io_error() => Err(error),
        answer => Ok(answer.unwrap_or_default()),
    }
}

/// Returns a value from the output of `INFO`.
pub(super) fn info_value<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(str::trim)
}
