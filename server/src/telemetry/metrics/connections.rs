//! Metrics of client connections, labeled with the listener.

use std::{fmt::Write as _, sync::Arc};

use prometheus_client::metrics::{counter::Counter, gauge::Gauge};

/// The limit that caused a connection to be rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectionLimit {
    /// The limit per address.
    Address,
    /// The limit per network.
    Network,
    /// The total limit, when no other connection could be closed to make room.
    Full,
}

/// Metrics of one listener's connections.
#[derive(Debug, Default)]
pub struct ConnectionMetrics {
    pub open: Gauge,
    pub accepted: Counter,
    rejected_address: Counter,
    rejected_network: Counter,
    rejected_full: Counter,
    /// Connections closed to make room for another connection or to free memory.
    pub dropped: Counter,
    pub timed_out_head: Counter,
    pub timed_out_write: Counter,
    pub timed_out_idle: Counter,
    pub accept_errors: Counter,
}

impl ConnectionMetrics {
    pub const fn rejected(&self, limit: ConnectionLimit) -> &Counter {
        match limit {
            ConnectionLimit::Address => &self.rejected_address,
            ConnectionLimit::Network => &self.rejected_network,
            ConnectionLimit::Full => &self.rejected_full,
        }
    }
}

type Read = fn(&ConnectionMetrics) -> String;

struct Family {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    /// Additional labels, and the function that reads the value.
    series: &'static [(&'static str, Read)],
}

const FAMILIES: [Family; 6] = [
    Family {
        name: "quota_connections_open",
        kind: "gauge",
        help: "Open client connections",
        series: &[("", |it| it.open.get().to_string())],
    },
    Family {
        name: "quota_connections_accepted",
        kind: "counter",
        help: "Client connections accepted",
        series: &[("", |it| it.accepted.get().to_string())],
    },
    Family {
        name: "quota_connections_rejected",
        kind: "counter",
        help: "Client connections closed immediately because a limit was reached",
        series: &[
            (",limit=\"address\"", |it| {
                it.rejected_address.get().to_string()
            }),
            (",limit=\"network\"", |it| {
                it.rejected_network.get().to_string()
            }),
            (",limit=\"total\"", |it| it.rejected_full.get().to_string()),
        ],
    },
    Family {
        name: "quota_connections_dropped",
        kind: "counter",
        help: "Client connections that were closed to make room for others or to free memory",
        series: &[("", |it| it.dropped.get().to_string())],
    },
    Family {
        name: "quota_connections_timed_out",
        kind: "counter",
        help: "Client connections closed because the client took too long",
        series: &[
            (",waiting_for=\"request\"", |it| {
                it.timed_out_head.get().to_string()
            }),
            (",waiting_for=\"read\"", |it| {
                it.timed_out_write.get().to_string()
            }),
            (",waiting_for=\"next_request\"", |it| {
                it.timed_out_idle.get().to_string()
            }),
        ],
    },
    Family {
        name: "quota_accept_errors",
        kind: "counter",
        help: "Failed attempts to accept a client connection",
        series: &[("", |it| it.accept_errors.get().to_string())],
    },
];

pub(super) fn write(text: &mut String, listeners: [(&str, &Arc<ConnectionMetrics>); 3]) {
    for Family {
        name,
        kind,
        help,
        series,
    } in FAMILIES
    {
        let _ = writeln!(text, "# HELP {name} {help}.\n# TYPE {name} {kind}");
        let total = if kind == "counter" { "_total" } else { "" };
        for (listener, metrics) in listeners {
            for (label, read) in series {
                let value = read(metrics);
                let _ = writeln!(
                    text,
                    "{name}{total}{{listener=\"{listener}\"{label}}} {value}"
                );
            }
        }
    }
}
