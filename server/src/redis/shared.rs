//! State shared by the connections' supervisors and callers.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64},
    },
    time::Duration,
};

use parking_lot::RwLock;
use redis::RedisError;
use tokio::sync::Notify;

use super::connection::Connection;
use crate::config::{RedisServers, RedisSettings};

/// Why a call failed. Unless the error is `NotConnected`, the call may still have been executed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CallError {
    /// There is no connection. Nothing was sent.
    #[error("Redis is not connected")]
    NotConnected,
    /// There was no response in time.
    #[error("Redis did not respond within {0:?}")]
    TimedOut(Duration),
    /// The connection broke, or Redis returned an error.
    #[error("the Redis call failed")]
    Failed(#[source] RedisError),
}

/// A Lua script. Calls contain only its hash, unless the server does not have the script yet.
#[derive(Debug, Clone)]
pub struct Script {
    /// The name in traces.
    pub(super) name: &'static str,
    pub(super) code: &'static str,
    pub(super) hash: String,
}

impl Script {
    pub fn new(name: &'static str, code: &'static str) -> Self {
        Self {
            name,
            code,
            hash: redis::Script::new(code).get_hash().to_owned(),
        }
    }
}

pub(super) struct Shared {
    pub(super) settings: RedisSettings,
    pub(super) slots: Box<[Slot]>,
    /// The number of connections established so far.
    pub(super) generation: AtomicU64,
    pub(super) counts: Counts,
}

#[derive(Default)]
pub(super) struct Slot {
    pub(super) live: RwLock<Option<Live>>,
    /// Wakes the supervisor when the connection has been discarded or may be dead.
    pub(super) check: Notify,
    /// Whether a call found the connection broken. Set only for clusters.
    pub(super) is_broken: AtomicBool,
}

/// A connection that has responded.
#[derive(Clone)]
pub(super) struct Live {
    pub(super) connection: Connection,
    pub(super) generation: u64,
    pub(super) run_id: Option<Arc<str>>,
}

/// Totals since startup.
#[derive(Debug, Default)]
pub struct Counts {
    pub calls: AtomicU64,
    /// Calls that failed because there was no connection.
    pub not_connected: AtomicU64,
    pub timed_out: AtomicU64,
    /// Calls that failed for another reason.
    pub failed: AtomicU64,
    /// Failed attempts to connect.
    pub connects_failed: AtomicU64,
}

impl Shared {
    pub(super) fn is_cluster(&self) -> bool {
        matches!(self.settings.servers, RedisServers::Cluster(_))
    }
}
