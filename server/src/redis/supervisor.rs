//! Establishes, probes, and replaces one connection.
//!
//! The redis crate's `ConnectionManager` keeps reconnecting to one address and makes calls wait for the new connection.
//! With this module, Sentinel is asked for the master before each attempt to connect, and calls never wait. Probes
//! detect connections that no longer respond. A single late call does not prove that a connection is dead.
//!
//! The crate itself maintains a cluster's connections to each node. The cluster connection as a whole is replaced only
//! if a call finds it broken or a probe fails. The old connection is used until the new connection is ready.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::{Instant, sleep, timeout};

use super::{
    shared::{Live, Shared},
    source::ServerSource,
};
use crate::{config::RedisSettings, error_chain::chain};

/// How often a healthy connection to a single server is probed. A cluster connection is probed only after a call on it
/// was late.
const PROBE_EVERY: Duration = Duration::from_millis(500);
/// The minimum time allowed for the response to a probe. A Redis server that briefly gets no CPU time is not dead, and
/// reconnecting would only add to its load.
const PROBE_ANSWER: Duration = Duration::from_millis(500);
/// The pause after the first failed attempt. The pause doubles with each further failure.
const FIRST_PAUSE: Duration = Duration::from_millis(25);
/// The maximum pause after a failed attempt.
const LONGEST_PAUSE: Duration = Duration::from_millis(250);
/// The minimum time between two replacements of a cluster connection.
const CLUSTER_RECONNECT: Duration = Duration::from_secs(1);

/// Returns how long the response to a probe may take.
pub(super) fn probe_limit(settings: &RedisSettings) -> Duration {
    settings.connect_timeout.max(PROBE_ANSWER)
}

/// Exponential backoff with jitter, so that replicas do not all reconnect at the same time.
pub(super) struct Backoff(Duration);

impl Backoff {
    pub(super) fn new() -> Self {
        Self(FIRST_PAUSE)
    }

    pub(super) fn reset(&mut self) {
        self.0 = FIRST_PAUSE;
    }

    pub(super) async fn pause(&mut self) {
        let random = getrandom::u32().unwrap_or(u32::MAX / 2);
        let jitter = f64::from(random) / f64::from(u32::MAX);
        sleep(self.0.mul_f64(0.5 + jitter / 2.0)).await;
        self.0 = (self.0 * 2).min(LONGEST_PAUSE);
    }
}

/// Supervises the connection in slot `at`. Returns only if the settings are unusable.
pub(super) async fn supervise(shared: Arc<Shared>, at: usize) {
    let settings = &shared.settings;
    let mut source = match ServerSource::new(settings) {
        Ok(source) => source,
        Err(error) => {
            tracing::error!(error = %error, "invalid Redis settings");
            return;
        }
    };
    let mut backoff = Backoff::new();
    let mut is_reported = false;
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
                if at == 0 && (is_reported || generation <= shared.slots.len() as u64) {
                    tracing::info!(servers = %settings.servers, mode = settings.servers.mode(), "connected to Redis");
                }
                is_reported = false;
                until_broken(&shared, at).await;
                if !shared.is_cluster() {
                    *shared.slots[at].live.write() = None;
                    // A connection that breaks immediately does not reset the backoff.
                    if began.elapsed() > PROBE_EVERY {
                        backoff.reset();
                    }
                }
            }
            Err(error) => {
                shared
                    .counts
                    .connects_failed
                    .fetch_add(1, Ordering::Relaxed);
                if at == 0 && !std::mem::replace(&mut is_reported, true) {
                    let error = chain(&error);
                    tracing::warn!(servers = %settings.servers, error, "cannot reach Redis");
                }
            }
        }
        backoff.pause().await;
    }
}

/// Probes the connection until it must be replaced.
async fn until_broken(shared: &Shared, at: usize) {
    let slot = &shared.slots[at];
    loop {
        if shared.is_cluster() {
            sleep(CLUSTER_RECONNECT).await;
            slot.check.notified().await;
            if slot.is_broken.swap(false, Ordering::AcqRel) {
                return;
            }
        } else {
            let _ = timeout(PROBE_EVERY, slot.check.notified()).await;
        }
        // `None` if a call has found the connection broken.
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
