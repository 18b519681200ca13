//! Keeps one connection up: makes it, probes it, makes it anew.
//!
//! The crate's own `ConnectionManager` holds fast to one address and lets calls wait for the new connection; here
//! Sentinel is asked for the master each time anew, calls never wait, and a connection on which nothing comes
//! back is found out by a probe, which no timeout of a single call proves.
//!
//! A cluster's connection is kept by the crate, node by node. It is made anew when that does not help: with the
//! old one in use until the new one is there.

use std::{sync::Arc, time::Duration};

use redis::{
    AsyncConnectionConfig, Client, RedisError,
    aio::MultiplexedConnection,
    cluster::{ClusterClient, ClusterClientBuilder},
    sentinel::{SentinelClient, SentinelNodeConnectionInfo, SentinelServerType},
};
use tokio::time::{Instant, sleep, timeout};

use super::{Connection, Live, Ordering, Shared};
use crate::config::{RedisServers, RedisSettings, redis::tcp_settings};

/// How often a connection is probed while all is well.
const PROBE: Duration = Duration::from_millis(500);
/// How long the answer to a probe may take at least: a process that got no CPU for a while is not dead, and to drop
/// its connection would only add to its work.
const PROBE_ANSWER: Duration = Duration::from_millis(500);
/// How long after a failed try the next one begins: doubled each time, from the first to the second.
const PAUSES: (Duration, Duration) = (Duration::from_millis(25), Duration::from_millis(250));
/// Calls under way on one connection. More wait, within their own time.
const CONCURRENT: usize = 1024;
/// How long a cluster's node may leave a call unanswered: longer than any caller waits.
const UNANSWERED: Duration = Duration::from_secs(2);
/// How often a cluster's connection is made anew at most.
const CLUSTER_ANEW: Duration = Duration::from_secs(1);
/// Steps that asking Sentinel takes: its answer, the look at the master it names.
const SENTINEL_STEPS: u32 = 4;

/// Why no connection could be made.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    #[error("cannot connect to Redis")]
    Redis(#[from] RedisError),
    #[error("Redis did not take the connection in {0:?}")]
    Late(Duration),
    /// A replica would refuse every change, and may lag behind.
    #[error("Redis is {0}, and no master")]
    NoMaster(String),
}

/// Where connections come from.
pub(super) enum Source {
    One(Box<Client>),
    Sentinel(Box<SentinelClient>),
    Cluster(Box<ClusterClient>),
}

impl Source {
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
                    // The crate would also send again what may have been carried out.
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

    /// The server to speak to now, for a connection of another kind. `None` for a cluster.
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

    /// A connection that has answered, and the name of the process that did.
    async fn connect(
        &mut self,
        settings: &RedisSettings,
    ) -> Result<(Connection, Option<Arc<str>>), ConnectError> {
        let limit = settings.connect_timeout;
        if let Self::Cluster(cluster) = self {
            // Every node that is known is connected to.
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

/// Makes sure that a master answers, which one that is still loading does not, and asks for its name.
async fn greet(connection: &mut MultiplexedConnection) -> Result<Option<Arc<str>>, ConnectError> {
    redis::cmd("PING").query_async::<()>(connection).await?;
    let replication = told(connection, "replication").await?;
    if let Some(role) = line(&replication, "role").filter(|role| *role != "master") {
        return Err(ConnectError::NoMaster(role.to_owned()));
    }
    let server = told(connection, "server").await?;
    Ok(line(&server, "run_id").map(Arc::from))
}

/// What `INFO` tells of itself. Whom an access list forbids to ask does without.
async fn told(connection: &mut MultiplexedConnection, section: &str) -> Result<String, RedisError> {
    let mut info = redis::cmd("INFO");
    match info.arg(section).query_async(connection).await {
        Err(error) if error.is_io_error() => Err(error),
        told => Ok(told.unwrap_or_default()),
    }
}

/// How long the answer to a probe may take.
pub(super) fn probe_limit(settings: &RedisSettings) -> Duration {
    settings.connect_timeout.max(PROBE_ANSWER)
}

/// One value of the answer to `INFO`.
pub(super) fn line<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(str::trim)
}

/// Pauses that grow until they are told that all is well.
pub(super) struct Pauses(Duration);

impl Pauses {
    pub(super) fn new() -> Self {
        Self(PAUSES.0)
    }

    pub(super) fn well(&mut self) {
        self.0 = PAUSES.0;
    }

    /// With chance in it, so that replicas do not come back all at once.
    pub(super) async fn pause(&mut self) {
        let chance = getrandom::u32().unwrap_or(u32::MAX / 2);
        let part = f64::from(chance) / f64::from(u32::MAX);
        sleep(self.0.mul_f64(0.5 + part / 2.0)).await;
        self.0 = (self.0 * 2).min(PAUSES.1);
    }
}

/// The keeper of connection `at`. Never ends by itself.
pub(super) async fn keep(shared: Arc<Shared>, at: usize) {
    let settings = &shared.settings;
    let mut source = match Source::new(settings) {
        Ok(source) => source,
        Err(error) => {
            tracing::error!(error = %error, "Redis cannot be connected to as it is set");
            return;
        }
    };
    let mut pauses = Pauses::new();
    let mut told = false;
    loop {
        let began = Instant::now();
        match source.connect(settings).await {
            Ok((connection, run_id)) => {
                let generation = shared.generation.fetch_add(1, Ordering::AcqRel) + 1;
                *shared.slots[at].live.write() = Some(Live {
                    connection,
                    generation,
                    run_id,
                });
                if at == 0 && (told || generation <= shared.slots.len() as u64) {
                    tracing::info!(servers = %settings.servers, mode = settings.servers.mode(), "connected to Redis");
                }
                told = false;
                lasts(&shared, at).await;
                if !shared.is_cluster() {
                    *shared.slots[at].live.write() = None;
                    // One that breaks as soon as it is made is as bad as none.
                    if began.elapsed() > PROBE {
                        pauses.well();
                    }
                }
            }
            Err(error) => {
                shared.counts.refused.fetch_add(1, Ordering::Relaxed);
                if at == 0 && !std::mem::replace(&mut told, true) {
                    let error = chain(&error);
                    tracing::warn!(servers = %settings.servers, error, "Redis cannot be reached");
                }
            }
        }
        pauses.pause().await;
    }
}

/// Until the connection is to be made anew.
async fn lasts(shared: &Shared, at: usize) {
    let slot = &shared.slots[at];
    loop {
        if shared.is_cluster() {
            sleep(CLUSTER_ANEW).await;
            slot.look.notified().await;
            if slot.broke.swap(false, Ordering::AcqRel) {
                return;
            }
        } else {
            let _ = timeout(PROBE, slot.look.notified()).await;
        }
        // Let go by a call that saw it break.
        let live = slot.live.read().clone();
        let Some(mut connection) = live.map(|it| it.connection) else {
            return;
        };
        let ping = async move { redis::cmd("PING").query_async::<()>(&mut connection).await };
        if !matches!(
            timeout(probe_limit(&shared.settings), ping).await,
            Ok(Ok(()))
        ) {
            return;
        }
    }
}

impl Shared {
    fn is_cluster(&self) -> bool {
        matches!(self.settings.servers, RedisServers::Cluster(_))
    }
}

/// An error with its causes, on one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
