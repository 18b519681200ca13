//! The settings of a listener, derived from the configuration.

use std::{sync::Arc, time::Duration};

use ipnet::IpNet;

use crate::{file_limit, state::AppState, telemetry::metrics::ConnectionMetrics};

/// The maximum number of connections to the metrics listener: enough for a few scrapers and an operator.
const METRICS_CONNECTIONS: usize = 64;
/// The maximum number of connections to the gRPC listener: enough for a hundred gateways with a few threads each.
const GRPC_CONNECTIONS: usize = 512;
/// The maximum memory, in bytes, for requests on all connections that have not authenticated: enough for more than a
/// hundred of the largest request heads, or thousands of typical ones. More memory is allowed if `QUOTA_BODY_LIMIT` is
/// large.
const MEMORY: usize = 8 * 1024 * 1024;
/// The maximum memory, in bytes, for requests on one connection that has not authenticated: enough for 32 concurrent
/// typical requests over HTTP/2. More memory is allowed if `QUOTA_BODY_LIMIT` is large.
const MEMORY_PER_CONNECTION: usize = 256 * 1024;
/// The maximum memory, in bytes, for requests on all connections to the metrics listener.
const METRICS_MEMORY: usize = 1024 * 1024;

#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// How long a request head may take to arrive. For the first request, the timer starts when the connection is
    /// accepted. For later requests, it starts when the first byte of the head arrives.
    pub header: Duration,
    /// How long a connection may be idle between two requests. Must be longer than the idle timeouts of proxies, so
    /// that a proxy closes an idle connection before the server does. If the server closed a connection while a request
    /// was in transit, that request would fail.
    pub idle: Duration,
    /// How long a client may go without reading any of its response.
    pub write: Duration,
    /// How long requests in flight may take after the server has begun to stop.
    pub drain: Duration,
}

/// Limits on a listener's connections.
#[derive(Debug, Clone)]
pub struct Limits {
    pub connections: usize,
    /// The maximum number of connections per IPv4 address or IPv6 /64, not counting connections that have
    /// authenticated. An address can have up to twice as many if the additional connections are less than a second old.
    /// 0 means no limit.
    pub per_address: usize,
    /// The maximum number of connections per IPv4 /24 or IPv6 /56, counted in the same way. An IPv6 /48 can have twice
    /// as many.
    pub per_network: usize,
    /// Networks that are exempt from the limits per address and per network, and from the memory limits, because many
    /// clients share each of their addresses.
    pub trusted_proxies: Vec<IpNet>,
    /// The maximum memory, in bytes, for requests on all connections that have not authenticated.
    pub memory: usize,
    /// The maximum memory, in bytes, for requests on one connection that has not authenticated.
    pub memory_per_connection: usize,
}

#[derive(Debug, Clone)]
pub struct ServeSettings {
    pub timeouts: Timeouts,
    pub limits: Limits,
    pub metrics: Arc<ConnectionMetrics>,
}

impl ServeSettings {
    /// Returns the settings of the API listener. `file_limit` is the result of [`file_limit::raise`].
    pub fn public(state: &AppState, file_limit: Option<usize>) -> Self {
        let config = &state.config;
        let grpc = config.grpc_listen.map_or(0, |_| GRPC_CONNECTIONS);
        let connections = file_limit::connections(
            config.connections,
            file_limit,
            config.database.pool + METRICS_CONNECTIONS + grpc,
        );
        if connections < config.connections {
            tracing::warn!(
                connections,
                "the open-file limit (ulimit -n) allows fewer connections than QUOTA_CONNECTIONS"
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
                memory_per_connection: MEMORY_PER_CONNECTION.max(3 * config.body_limit),
                trusted_proxies: config.trusted_proxies.clone(),
            },
            metrics: state.metrics.public_connections.clone(),
        }
    }

    /// Returns the settings of the gRPC listener.
    pub fn grpc(state: &AppState) -> Self {
        let public = Self::public(state, None);
        Self {
            limits: Limits {
                connections: GRPC_CONNECTIONS,
                // A gateway's connection does not count once a valid service token has been sent on it.
                per_address: GRPC_CONNECTIONS / 2,
                per_network: GRPC_CONNECTIONS / 4 * 3,
                ..public.limits
            },
            metrics: state.metrics.grpc_connections.clone(),
            ..public
        }
    }

    /// Returns the settings of the metrics listener, which stops without waiting for its connections.
    pub fn metrics(state: &AppState) -> Self {
        let public = Self::public(state, None);
        Self {
            timeouts: Timeouts {
                drain: Duration::ZERO,
                ..public.timeouts
            },
            limits: Limits {
                connections: METRICS_CONNECTIONS,
                // Scrapers use few addresses. These limits prevent one address from using all connections.
                per_address: METRICS_CONNECTIONS / 2,
                per_network: METRICS_CONNECTIONS / 4 * 3,
                memory: METRICS_MEMORY,
                memory_per_connection: MEMORY_PER_CONNECTION,
                trusted_proxies: Vec::new(),
            },
            metrics: state.metrics.metrics_connections.clone(),
        }
    }
}
