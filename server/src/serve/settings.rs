//! How a listener treats its connections, from the configuration.

use std::{sync::Arc, time::Duration};

use super::table::Limits;
use crate::{file_limit, state::AppState, telemetry::metrics::ConnectionMetrics};

/// Connections to the metrics listener: a few scrapers, and a person who looks.
const METRICS_CONNECTIONS: usize = 64;
/// Bytes that requests may occupy on connections that have not authenticated. Room for hundreds of the largest request
/// heads, and for thousands of usual ones.
const MEMORY: usize = 8 * 1024 * 1024;
/// The same of one connection: more than 32 usual requests at a time over HTTP/2.
const MEMORY_OF_ONE: usize = 256 * 1024;
const METRICS_MEMORY: usize = 1024 * 1024;

#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// From the accept to the end of the first request head, and from the first byte of a later one to its end.
    pub header: Duration,
    /// How long a connection may be idle between two requests. Longer than a proxy keeps one, so that the proxy
    /// closes it: one that is closed here while a request is on its way costs that request.
    pub idle: Duration,
    /// How long a client may take no byte of its response.
    pub write: Duration,
    /// For requests in flight, once the server stops.
    pub drain: Duration,
}

/// How a listener treats its connections.
#[derive(Debug, Clone)]
pub struct ServeSettings {
    pub timeouts: Timeouts,
    pub limits: Limits,
    pub metrics: Arc<ConnectionMetrics>,
}

impl ServeSettings {
    /// For the API. `file_limit` is what [`file_limit::raise`] returned.
    pub fn public(state: &AppState, file_limit: Option<usize>) -> Self {
        let config = &state.config;
        let database = config.database.pool;
        let connections = file_limit::connections(
            config.connections,
            file_limit,
            database + METRICS_CONNECTIONS,
        );
        if connections < config.connections {
            tracing::warn!(
                connections,
                "the limit of open files (ulimit -n) allows fewer connections than QUOTA_CONNECTIONS"
            );
        }
        Self {
            timeouts: Timeouts {
                header: config.header_timeout,
                idle: config.idle_timeout,
                write: config.write_timeout,
                drain: config.drain_timeout,
            },
            limits: Limits {
                connections,
                per_address: config.connections_per_address,
                per_network: config.connections_per_network,
                memory: MEMORY.max(8 * config.body_limit),
                memory_of_one: MEMORY_OF_ONE.max(3 * config.body_limit),
                trusted_proxies: config.trusted_proxies.clone(),
            },
            metrics: state.metrics.public_connections.clone(),
        }
    }

    /// For the metrics listener, which nobody waits for when the server stops.
    pub fn metrics(state: &AppState) -> Self {
        let public = Self::public(state, None);
        Self {
            timeouts: Timeouts {
                drain: Duration::ZERO,
                ..public.timeouts
            },
            limits: Limits {
                connections: METRICS_CONNECTIONS,
                // Scrapers come from a few addresses. One that holds many connections leaves some to the others.
                per_address: METRICS_CONNECTIONS / 2,
                per_network: METRICS_CONNECTIONS / 4 * 3,
                memory: METRICS_MEMORY,
                memory_of_one: MEMORY_OF_ONE,
                trusted_proxies: Vec::new(),
            },
            metrics: state.metrics.metrics_connections.clone(),
        }
    }
}
