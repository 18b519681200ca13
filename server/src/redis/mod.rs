//! Redis: connections that are kept up, calls with a deadline, messages.
//!
//! Owns how Redis is reached: one server, the master that Sentinel names, or a cluster; Valkey speaks the same
//! protocol. Knows nothing of what is kept there, of limits, keys or SQL.
//!
//! Each of `QUOTA_REDIS_CONNECTIONS` connections carries many calls at once, and has a keeper (`keeper`) that
//! makes it, probes it, and makes it anew, so that no call ever waits for a connection: without one it fails at
//! once with [`Failure::Away`]. A call is sent once. It is not sent again when it fails, since what it was to do
//! may have been done, but for what only a cluster can know: that a key has moved to another node.
//!
//! When Redis is away, everything here fails within `QUOTA_REDIS_TIMEOUT`, or the longer patience of who wants to
//! hear late answers; nothing is kept for later. What it may
//! have forgotten meanwhile shows in [`Link::generation`], which is another for every connection, and in
//! [`Link::run_id`], which is another for every process of Redis.

pub mod inspect;
mod keeper;
mod subscription;

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::RwLock;
use redis::{
    Cmd, ErrorKind, RedisError, RedisFuture, ServerErrorKind, ToRedisArgs, Value,
    aio::{ConnectionLike, MultiplexedConnection},
    cluster_async::ClusterConnection,
};
use tokio::{sync::Notify, task::JoinSet};

pub use self::subscription::{Event, Subscription};
use crate::{
    config::{RedisServers, RedisSettings},
    deadline::{self, Late},
};

/// Why a call came to nothing. Whether it was carried out is not known but for `Away`.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Failure {
    /// There is no connection now; nothing was sent.
    #[error("Redis is away")]
    Away,
    /// No answer within the time for it.
    #[error("Redis did not answer in {0:?}")]
    Late(Duration),
    /// The connection broke, or Redis refused.
    #[error("Redis failed the call")]
    Failed(#[source] RedisError),
}

/// How long after a node of a cluster has said that a key is elsewhere it is asked for again.
const MOVING: Duration = Duration::from_millis(3);

/// A Lua script, by its hash. Sent whole only to a Redis that does not know it.
#[derive(Debug, Clone)]
pub struct Script {
    code: &'static str,
    hash: String,
}

impl Script {
    pub fn new(code: &'static str) -> Self {
        Self {
            code,
            hash: redis::Script::new(code).get_hash().to_owned(),
        }
    }
}

/// The connections. Cheap to clone; the last clone that goes ends them.
#[derive(Clone)]
pub struct Redis {
    shared: Arc<Shared>,
    _keepers: Arc<JoinSet<()>>,
}

impl std::fmt::Debug for Redis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Redis")
            .field("servers", &self.shared.settings.servers.to_string())
            .finish_non_exhaustive()
    }
}

/// What the keepers and the callers share.
struct Shared {
    settings: RedisSettings,
    slots: Box<[Slot]>,
    /// Counts the connections that were made.
    generation: AtomicU64,
    counts: Counts,
}

#[derive(Default)]
struct Slot {
    live: RwLock<Option<Live>>,
    /// Tells the keeper that the connection was let go, or that it may be dead.
    look: Notify,
    /// Of a cluster: a call saw it break.
    broke: AtomicBool,
}

/// A connection that has answered.
#[derive(Clone)]
struct Live {
    connection: Connection,
    generation: u64,
    run_id: Option<Arc<str>>,
}

/// What has happened so far.
#[derive(Debug, Default)]
pub struct Counts {
    pub calls: AtomicU64,
    /// Calls for which there was no connection.
    pub away: AtomicU64,
    /// Calls that ran out of time.
    pub late: AtomicU64,
    /// Calls that failed otherwise.
    pub failed: AtomicU64,
    /// Tries to connect that failed.
    pub refused: AtomicU64,
}

/// How the connections are now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    pub connected: usize,
    pub wanted: usize,
    /// How many connections were made so far.
    pub made: u64,
}

#[derive(Clone)]
enum Connection {
    One(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl ConnectionLike for Connection {
    fn req_packed_command<'a>(&'a mut self, cmd: &'a Cmd) -> RedisFuture<'a, Value> {
        match self {
            Self::One(it) => it.req_packed_command(cmd),
            Self::Cluster(it) => it.req_packed_command(cmd),
        }
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        cmd: &'a redis::Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        match self {
            Self::One(it) => it.req_packed_commands(cmd, offset, count),
            Self::Cluster(it) => it.req_packed_commands(cmd, offset, count),
        }
    }

    fn get_db(&self) -> i64 {
        match self {
            Self::One(it) => it.get_db(),
            Self::Cluster(it) => it.get_db(),
        }
    }
}

/// One connection as it was when it was asked for. It may break at any time.
#[derive(Clone)]
pub struct Link {
    live: Live,
    at: usize,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link")
            .field("generation", &self.live.generation)
            .field("run_id", &self.live.run_id)
            .finish_non_exhaustive()
    }
}

impl Redis {
    /// Connects in the background, and goes on trying. To be called within tokio's runtime.
    pub fn connect_lazy(settings: RedisSettings) -> Self {
        if settings.servers.tls() {
            install_tls();
        }
        let slots = (0..settings.connections.max(1)).map(|_| Slot::default());
        let shared = Arc::new(Shared {
            slots: slots.collect(),
            settings,
            generation: AtomicU64::new(0),
            counts: Counts::default(),
        });
        let mut keepers = JoinSet::new();
        for at in 0..shared.slots.len() {
            keepers.spawn(keeper::keep(Arc::clone(&shared), at));
        }
        Self {
            shared,
            _keepers: Arc::new(keepers),
        }
    }

    /// What every key and channel is to begin with, followed by a colon.
    pub fn prefix(&self) -> &str {
        &self.shared.settings.prefix
    }

    /// Whether keys are spread over nodes, so that one call can only use keys of one hash tag.
    pub fn is_cluster(&self) -> bool {
        matches!(self.shared.settings.servers, RedisServers::Cluster(_))
    }

    pub fn settings(&self) -> &RedisSettings {
        &self.shared.settings
    }

    pub fn counts(&self) -> &Counts {
        &self.shared.counts
    }

    pub fn status(&self) -> Status {
        let live = |slot: &&Slot| slot.live.read().is_some();
        Status {
            connected: self.shared.slots.iter().filter(live).count(),
            wanted: self.shared.slots.len(),
            made: self.generation(),
        }
    }

    /// Another number after any connection was made anew: what was known of Redis may no longer be so.
    pub fn generation(&self) -> u64 {
        self.shared.generation.load(Ordering::Acquire)
    }

    /// The connection for a key: the same one for the same key as long as it lasts, so that two calls for a key
    /// arrive in their order.
    pub fn link(&self, key: &str) -> Result<Link, Failure> {
        let slots = &self.shared.slots;
        let first = if slots.len() == 1 {
            0
        } else {
            slot_of(key, slots.len())
        };
        (first..slots.len())
            .chain(0..first)
            .find_map(|at| {
                let live = slots[at].live.read().clone()?;
                Some(Link {
                    live,
                    at,
                    shared: Arc::clone(&self.shared),
                })
            })
            .ok_or_else(|| {
                self.shared.counts.calls.fetch_add(1, Ordering::Relaxed);
                self.shared.counts.away.fetch_add(1, Ordering::Relaxed);
                Failure::Away
            })
    }

    /// [`Link::eval`] on the connection for the first key.
    pub async fn eval(
        &self,
        script: &Script,
        keys: &[&str],
        args: &[impl ToRedisArgs],
        patience: Option<Duration>,
    ) -> Result<Value, Failure> {
        let key = keys.first().copied().unwrap_or_default();
        self.link(key)?.eval(script, keys, args, patience).await
    }

    /// [`Link::query`] on the connection for `key`, which is in `cmd` already.
    pub async fn query(&self, key: &str, cmd: &Cmd) -> Result<Value, Failure> {
        self.link(key)?.query(cmd).await
    }

    /// Waits until there is a connection, for at most `patience`.
    pub async fn connected(&self, patience: Duration) -> bool {
        let there = async {
            while self.status().connected == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(patience, there).await.is_ok()
    }

    /// What is published on `channel`, by a connection of its own that is kept up until the value is dropped.
    pub fn subscribe(&self, channel: String) -> Subscription {
        Subscription::start(self.shared.settings.clone(), channel)
    }
}

/// The crate asks for a provider of the whole process.
fn install_tls() {
    // An error says that one is installed already.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}

fn slot_of(key: &str, slots: usize) -> usize {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    usize::try_from(hasher.finish() % slots as u64).unwrap_or_default()
}

impl Link {
    /// Another number for every connection that is made.
    pub fn generation(&self) -> u64 {
        self.live.generation
    }

    /// What the process of Redis calls itself: another name after every start. `None` where it does not tell,
    /// and of a cluster, whose nodes each have their own.
    pub fn run_id(&self) -> Option<&str> {
        self.live.run_id.as_deref()
    }

    /// Runs a script, by its hash or else whole, within the time of one call or in `patience`, which is longer. The
    /// keys are of one hash tag.
    pub async fn eval(
        &self,
        script: &Script,
        keys: &[&str],
        args: &[impl ToRedisArgs],
        patience: Option<Duration>,
    ) -> Result<Value, Failure> {
        let call = |name: &str, script: &str| {
            let mut cmd = Cmd::with_capacity(3 + keys.len() + args.len(), 256);
            cmd.arg(name).arg(script).arg(keys.len());
            cmd.arg(keys).arg(args);
            cmd
        };
        let known = call("EVALSHA", &script.hash);
        self.within(patience, async |mut connection: Connection| {
            match send(&mut connection, &known).await {
                Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                    send(&mut connection, &call("EVAL", script.code)).await
                }
                answer => answer,
            }
        })
        .await
    }

    /// One command, within the time of one call.
    pub async fn query(&self, cmd: &Cmd) -> Result<Value, Failure> {
        self.within(None, async |mut connection: Connection| {
            send(&mut connection, cmd).await
        })
        .await
    }

    async fn within(
        &self,
        patience: Option<Duration>,
        call: impl AsyncFnOnce(Connection) -> Result<Value, RedisError>,
    ) -> Result<Value, Failure> {
        let counts = &self.shared.counts;
        counts.calls.fetch_add(1, Ordering::Relaxed);
        let limit = self.shared.settings.timeout;
        let mut call = pin!(call(self.live.connection.clone()));
        let mut answer = deadline::within(limit, &mut call).await;
        if answer.is_err() {
            counts.late.fetch_add(1, Ordering::Relaxed);
            // Slow or dead? The keeper finds out.
            self.shared.slots[self.at].look.notify_one();
            if let Some(more) = patience.and_then(|it| it.checked_sub(limit)) {
                answer = deadline::within(more, call).await;
            }
        }
        match answer {
            Err(Late) => Err(Failure::Late(patience.map_or(limit, |it| it.max(limit)))),
            Ok(answer) => answer.map_err(|error| {
                counts.failed.fetch_add(1, Ordering::Relaxed);
                if is_of_the_connection(&error) {
                    self.let_go();
                }
                Failure::Failed(error)
            }),
        }
    }

    /// No call is to use this connection any more; the keeper makes another.
    fn let_go(&self) {
        let slot = &self.shared.slots[self.at];
        let mut live = slot.live.write();
        if live
            .as_ref()
            .is_some_and(|it| it.generation == self.live.generation)
        {
            match self.live.connection {
                Connection::One(_) => *live = None,
                Connection::Cluster(_) => slot.broke.store(true, Ordering::Release),
            }
        }
        drop(live);
        slot.look.notify_one();
    }
}

/// Sends a command, to another node of a cluster too when the key is not where it was.
async fn send(connection: &mut Connection, cmd: &Cmd) -> Result<Value, RedisError> {
    loop {
        let answer = connection.req_packed_command(cmd).await;
        match answer.and_then(Value::extract_error) {
            // Nothing was done. The connection finds out where the key is now.
            Err(error) if is_elsewhere(&error) => tokio::time::sleep(MOVING).await,
            answer => return answer,
        }
    }
}

/// Whether a node of a cluster says that the key is not with it now.
fn is_elsewhere(error: &RedisError) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Server(
            ServerErrorKind::Moved | ServerErrorKind::Ask | ServerErrorKind::TryAgain
        )
    )
}

/// Whether another connection would do better: this one broke, or leads to a server that is no master.
fn is_of_the_connection(error: &RedisError) -> bool {
    error.is_io_error()
        || error.is_unrecoverable_error()
        || matches!(
            error.kind(),
            ErrorKind::Server(ServerErrorKind::ReadOnly | ServerErrorKind::MasterDown)
        )
}
