//! Redis: supervised connections, calls with deadlines, and messages.
//!
//! This module owns the connections to Redis: one server, the master that Sentinel reports, or a cluster. Valkey works
//! the same way. The module does not depend on what Redis stores.
//!
//! There are `QUOTA_REDIS_CONNECTIONS` connections. Each one is multiplexed and has a [`supervisor`]. A call never
//! waits for a connection: without a connection, the call fails immediately with [`CallError::NotConnected`]. A failed
//! call is not retried, since it may have been executed. There are two exceptions, in which the server reports that it
//! did not execute the call. A script that is not loaded is sent again with its source, and a call to a cluster node
//! that does not have the key is resent.
//!
//! While Redis is unreachable, every call fails within `QUOTA_REDIS_TIMEOUT`, or within the longer time that a caller
//! allows for late responses. [`Link::generation`] changes with every connection, and [`Link::run_id`] changes with
//! every restart of the server. A change in either value tells callers that Redis may have lost data.

mod connection;
pub mod inspect;
mod link;
mod shared;
mod source;
mod span;
mod subscription;
mod supervisor;

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use redis::{Cmd, ToRedisArgs, Value};
use tokio::task::JoinSet;

use self::shared::{Shared, Slot};
pub use self::{
    link::Link,
    shared::{CallError, Counts, Script},
    subscription::{Event, Subscription},
};
use crate::config::RedisSettings;

/// The connections, which close when the last clone is dropped. Cloning is cheap.
#[derive(Clone)]
pub struct Redis {
    shared: Arc<Shared>,
    _supervisors: Arc<JoinSet<()>>,
}

impl std::fmt::Debug for Redis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Redis")
            .field("servers", &self.shared.settings.servers.to_string())
            .finish_non_exhaustive()
    }
}

/// The current state of the connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    pub connected: usize,
    pub wanted: usize,
    /// The number of connections established so far.
    pub made: u64,
}

impl Redis {
    /// Connects in the background, and reconnects when necessary. Must be called within a tokio runtime.
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
        let mut supervisors = JoinSet::new();
        for at in 0..shared.slots.len() {
            supervisors.spawn(supervisor::supervise(Arc::clone(&shared), at));
        }
        Self {
            shared,
            _supervisors: Arc::new(supervisors),
        }
    }

    /// Returns the prefix of every key and channel, without the colon that follows it.
    pub fn prefix(&self) -> &str {
        &self.shared.settings.prefix
    }

    /// Returns whether keys are distributed over several nodes. If so, all keys of a call must have the same hash tag.
    pub fn is_cluster(&self) -> bool {
        self.shared.is_cluster()
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

    /// Returns a number that changes whenever a connection is established. When it changes, Redis may have lost data.
    pub fn generation(&self) -> u64 {
        self.shared.generation.load(Ordering::Acquire)
    }

    /// Returns the connection for a key. A key always uses the same connection while that connection works, so that the
    /// key's calls arrive in order.
    pub fn link(&self, key: &str) -> Result<Link, CallError> {
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
                self.shared
                    .counts
                    .not_connected
                    .fetch_add(1, Ordering::Relaxed);
                CallError::NotConnected
            })
    }

    /// Calls [`Link::eval`] on the connection for the first key.
    pub async fn eval(
        &self,
        script: &Script,
        keys: &[&str],
        args: &[impl ToRedisArgs],
        patience: Option<Duration>,
    ) -> Result<Value, CallError> {
        let key = keys.first().copied().unwrap_or_default();
        self.link(key)?.eval(script, keys, args, patience).await
    }

    /// Calls [`Link::query`] on the connection for `key`. `cmd` must already contain the key.
    pub async fn query(&self, key: &str, cmd: &Cmd) -> Result<Value, CallError> {
        self.link(key)?.query(cmd).await
    }

    /// Waits for a connection for at most `patience`. Returns whether there is a connection.
    pub async fn connected(&self, patience: Duration) -> bool {
        let connected = async {
            while self.status().connected == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(patience, connected).await.is_ok()
    }

    /// Subscribes to `channel` on a separate connection, which is maintained until the subscription is dropped.
    pub fn subscribe(&self, channel: String) -> Subscription {
        Subscription::start(self.shared.settings.clone(), channel)
    }
}

/// Installs the process-wide default TLS provider, which the redis crate uses.
fn install_tls() {
    // The call fails only if a provider is already installed, so the error is ignored.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}

fn slot_of(key: &str, slots: usize) -> usize {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    usize::try_from(hasher.finish() % slots as u64).unwrap_or_default()
}
