//! What is counted, and how it is named.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use prometheus_client::{
    encoding::text::encode,
    metrics::{counter::Counter, gauge::Gauge, info::Info},
    registry::Registry,
};

/// Everything that is counted. Prometheus names are in [`Metrics::text`].
#[derive(Debug)]
pub struct Metrics {
    pub allowed: Counter,
    pub denied: Counter,
    pub refused_keys: Counter,
    pub limiter_errors: Counter,
    /// Seconds from a key's text to the decision.
    pub decision_seconds: Latency,
    pub keys_malformed: Counter,
    pub key_cache_hits: Counter,
    pub key_cache_negative_hits: Counter,
    pub key_shared_hits: Counter,
    pub key_shared_negative_hits: Counter,
    pub key_shared_misses: Counter,
    pub key_shared_outdated: Counter,
    pub key_shared_unreadable: Counter,
    pub key_shared_errors: Counter,
    pub key_loads: Counter,
    pub key_stale_served: Counter,
    pub ledger_takes: Counter,
    pub ledger_errors: Counter,
    pub counter_calls: Counter,
    pub counter_errors: Counter,
    pub counter_outages: Counter,
    pub lease_tokens_taken: Counter,
    pub lease_tokens_spent: Counter,
    pub lease_tokens_returned: Counter,
    pub lease_tokens_lost: Counter,
    pub admitted_degraded: Counter,
    pub replicas: Gauge,
    pub counters_away: Gauge,
    pub guard_refusals: Counter,
    pub logins_failed: Counter,
    pub password_queue_full: Counter,
    pub requests_in_flight: Gauge,
    pub panics: Counter,
    pub revocation_polls: Counter,
    pub revocation_poll_errors: Counter,
    pub revocations_published: Counter,
    pub revocation_publish_errors: Counter,
    pub revocations_received: Counter,
    pub revocations_unreadable: Counter,
    pub revocation_messages_lost: Counter,
    /// From a change to when this replica acts on it.
    pub revocation_lag_seconds: Latency,
    pub limiter_cells: Gauge,
    pub database_connections: Gauge,
    pub database_connections_busy: Gauge,
    pub redis_connections: Gauge,
    pub redis_connections_made: Counter,
    pub redis_connects_failed: Counter,
    pub redis_calls: Counter,
    pub redis_calls_without_connection: Counter,
    pub redis_calls_late: Counter,
    pub redis_calls_failed: Counter,
    /// Shared with the log, which counts here.
    pub log_lines_dropped: Counter,
    pub public_connections: Arc<ConnectionMetrics>,
    pub metrics_connections: Arc<ConnectionMetrics>,
    /// Key and token look-ups that were answered 503 because too many were under way.
    pub lookups_refused: Counter,
    /// Times that PostgreSQL was suspected to be unreachable.
    pub database_suspected: Counter,
    /// Decisions that streams skipped because more were made than can be sent.
    pub decisions_not_streamed: Counter,
    /// What the last comparison of log, rollups and quota ledger found.
    pub usage_log_rollup_difference: Gauge,
    pub usage_ledger_excess: Gauge,
    pub usage_rollup_excess: Gauge,
    /// Unix seconds of the last reconciliation that finished.
    pub usage_reconciled_at: Gauge,
    pub usage_partition_errors: Counter,
    pub readiness_checks: Counter,
    pub sweep_errors: Counter,
    pub usage_records_shipped: Counter,
    pub usage_records_replayed: Counter,
    pub usage_records_damaged: Counter,
    pub usage_segments_refused: Counter,
    pub usage_refused_decisions: Counter,
    pub usage_ship_errors: Counter,
    pub usage_sync_errors: Counter,
    pub usage_endpoints_folded: Counter,
    pub usage_backlog_records: Gauge,
    pub usage_backlog_bytes: Gauge,
    pub usage_unrecordable: Gauge,
    /// When the oldest record of the backlog was taken, in Unix seconds; 0: none.
    pub usage_oldest_seconds: Gauge,
    /// By the name of what was swept.
    swept: Mutex<BTreeMap<&'static str, u64>>,
    statuses: Box<[AtomicU64; 600]>,
}

/// Why a connection was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Its address has as many as it may have.
    Address,
    /// The network of its address has as many as it may have.
    Network,
    /// There are as many as there may be, and none that could be closed for it.
    Full,
}

/// What became of the connections to one listener.
#[derive(Debug, Default)]
pub struct ConnectionMetrics {
    pub open: Gauge,
    pub accepted: Counter,
    refused_address: Counter,
    refused_network: Counter,
    refused_full: Counter,
    /// Closed to make room for another.
    pub dropped: Counter,
    pub timed_out_head: Counter,
    pub timed_out_write: Counter,
    pub timed_out_idle: Counter,
    pub accept_errors: Counter,
}

impl ConnectionMetrics {
    pub const fn refused(&self, refusal: Refusal) -> &Counter {
        match refusal {
            Refusal::Address => &self.refused_address,
            Refusal::Network => &self.refused_network,
            Refusal::Full => &self.refused_full,
        }
    }
}

/// A histogram without a lock: a bucket is an atomic. Buckets double from 1 µs to 8 s.
#[derive(Debug, Default)]
pub struct Latency {
    buckets: [AtomicU64; 24],
    nanos: AtomicU64,
}

impl Latency {
    pub fn observe(&self, nanos: u64) {
        let micros = nanos.div_ceil(1000).max(1);
        let bucket = (u64::BITS - (micros - 1).leading_zeros()).min(23) as usize;
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    fn write(&self, text: &mut String, name: &str, help: &str) {
        use std::fmt::Write;
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} histogram");
        let mut total = 0;
        let mut bound = 1e-6;
        for bucket in &self.buckets {
            total += bucket.load(Ordering::Relaxed);
            let _ = writeln!(text, "{name}_bucket{{le=\"{bound}\"}} {total}");
            bound *= 2.0;
        }
        let sum = Duration::from_nanos(self.nanos.load(Ordering::Relaxed)).as_secs_f64();
        let _ = writeln!(
            text,
            "{name}_bucket{{le=\"+Inf\"}} {total}\n{name}_sum {sum}\n{name}_count {total}"
        );
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            allowed: Counter::default(),
            denied: Counter::default(),
            refused_keys: Counter::default(),
            limiter_errors: Counter::default(),
            decision_seconds: Latency::default(),
            keys_malformed: Counter::default(),
            key_cache_hits: Counter::default(),
            key_cache_negative_hits: Counter::default(),
            key_shared_hits: Counter::default(),
            key_shared_negative_hits: Counter::default(),
            key_shared_misses: Counter::default(),
            key_shared_outdated: Counter::default(),
            key_shared_unreadable: Counter::default(),
            key_shared_errors: Counter::default(),
            key_loads: Counter::default(),
            key_stale_served: Counter::default(),
            ledger_takes: Counter::default(),
            ledger_errors: Counter::default(),
            counter_calls: Counter::default(),
            counter_errors: Counter::default(),
            counter_outages: Counter::default(),
            lease_tokens_taken: Counter::default(),
            lease_tokens_spent: Counter::default(),
            lease_tokens_returned: Counter::default(),
            lease_tokens_lost: Counter::default(),
            admitted_degraded: Counter::default(),
            replicas: Gauge::default(),
            counters_away: Gauge::default(),
            guard_refusals: Counter::default(),
            logins_failed: Counter::default(),
            password_queue_full: Counter::default(),
            requests_in_flight: Gauge::default(),
            panics: Counter::default(),
            revocation_polls: Counter::default(),
            revocation_poll_errors: Counter::default(),
            revocations_published: Counter::default(),
            revocation_publish_errors: Counter::default(),
            revocations_received: Counter::default(),
            revocations_unreadable: Counter::default(),
            revocation_messages_lost: Counter::default(),
            revocation_lag_seconds: Latency::default(),
            limiter_cells: Gauge::default(),
            database_connections: Gauge::default(),
            database_connections_busy: Gauge::default(),
            redis_connections: Gauge::default(),
            redis_connections_made: Counter::default(),
            redis_connects_failed: Counter::default(),
            redis_calls: Counter::default(),
            redis_calls_without_connection: Counter::default(),
            redis_calls_late: Counter::default(),
            redis_calls_failed: Counter::default(),
            log_lines_dropped: Counter::default(),
            public_connections: Arc::default(),
            metrics_connections: Arc::default(),
            lookups_refused: Counter::default(),
            database_suspected: Counter::default(),
            decisions_not_streamed: Counter::default(),
            usage_log_rollup_difference: Gauge::default(),
            usage_ledger_excess: Gauge::default(),
            usage_rollup_excess: Gauge::default(),
            usage_reconciled_at: Gauge::default(),
            usage_partition_errors: Counter::default(),
            readiness_checks: Counter::default(),
            sweep_errors: Counter::default(),
            usage_records_shipped: Counter::default(),
            usage_records_replayed: Counter::default(),
            usage_records_damaged: Counter::default(),
            usage_segments_refused: Counter::default(),
            usage_refused_decisions: Counter::default(),
            usage_ship_errors: Counter::default(),
            usage_sync_errors: Counter::default(),
            usage_endpoints_folded: Counter::default(),
            usage_backlog_records: Gauge::default(),
            usage_backlog_bytes: Gauge::default(),
            usage_unrecordable: Gauge::default(),
            usage_oldest_seconds: Gauge::default(),
            swept: Mutex::default(),
            statuses: Box::new([const { AtomicU64::new(0) }; 600]),
        }
    }
}

impl Metrics {
    /// Counts an answer.
    pub fn answered(&self, status: u16) {
        if let Some(count) = self.statuses.get(usize::from(status)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts rows that were deleted or cleared because their time had passed.
    pub fn swept(&self, kind: &'static str, rows: u64) {
        *self.swept.lock().entry(kind).or_default() += rows;
    }

    /// Connections of both listeners, and swept rows: what has labels.
    fn write_labeled(&self, text: &mut String) {
        use std::fmt::Write;
        type Read = fn(&ConnectionMetrics) -> String;
        type Family<'a> = (&'a str, &'a str, &'a str, &'a [(&'a str, Read)]);
        let listeners = [
            ("public", &self.public_connections),
            ("metrics", &self.metrics_connections),
        ];
        let families: [Family<'_>; 6] = [
            (
                "quota_connections_open",
                "gauge",
                "Open client connections",
                &[("", |it| it.open.get().to_string())],
            ),
            (
                "quota_connections_accepted",
                "counter",
                "Client connections accepted and kept",
                &[("", |it| it.accepted.get().to_string())],
            ),
            (
                "quota_connections_refused",
                "counter",
                "Client connections closed at once, by the limit that was reached",
                &[
                    (",limit=\"address\"", |it| {
                        it.refused_address.get().to_string()
                    }),
                    (",limit=\"network\"", |it| {
                        it.refused_network.get().to_string()
                    }),
                    (",limit=\"total\"", |it| it.refused_full.get().to_string()),
                ],
            ),
            (
                "quota_connections_dropped",
                "counter",
                "Client connections that were closed to make room for others",
                &[("", |it| it.dropped.get().to_string())],
            ),
            (
                "quota_connections_timed_out",
                "counter",
                "Client connections closed because the client took too long, by what was waited for",
                &[
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
            ),
            (
                "quota_accept_errors",
                "counter",
                "Failures to accept a client connection",
                &[("", |it| it.accept_errors.get().to_string())],
            ),
        ];
        for (name, kind, help, series) in families {
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
        let _ = writeln!(
            text,
            "# HELP quota_rows_swept Expired rows deleted or cleared.\n# TYPE quota_rows_swept counter"
        );
        for (kind, rows) in self.swept.lock().iter() {
            let _ = writeln!(text, "quota_rows_swept_total{{kind=\"{kind}\"}} {rows}");
        }
    }

    /// The Prometheus text (OpenMetrics 1.0).
    pub fn text(&self) -> String {
        use std::fmt::Write;
        let mut registry = Registry::with_prefix("quota");
        let r = &mut registry;
        r.register(
            "build",
            "The running version",
            Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]),
        );
        r.register(
            "decisions_allowed",
            "Requests admitted by the limiter",
            self.allowed.clone(),
        );
        r.register(
            "decisions_denied",
            "Requests denied by the limiter",
            self.denied.clone(),
        );
        r.register(
            "decision_errors",
            "Requests without a decision, answered 503",
            self.limiter_errors.clone(),
        );
        r.register(
            "keys_refused",
            "Requests with a key that opens nothing",
            self.refused_keys.clone(),
        );
        r.register(
            "keys_malformed",
            "Of these, keys with a wrong form or checksum, refused before any look-up",
            self.keys_malformed.clone(),
        );
        r.register(
            "key_cache_hits",
            "Key look-ups answered from this process",
            self.key_cache_hits.clone(),
        );
        r.register(
            "key_cache_negative_hits",
            "Key look-ups answered from this process: known not to exist",
            self.key_cache_negative_hits.clone(),
        );
        r.register(
            "key_shared_hits",
            "Key look-ups answered from what replicas share in Redis",
            self.key_shared_hits.clone(),
        );
        r.register(
            "key_shared_negative_hits",
            "Key look-ups answered from what replicas share in Redis: known not to exist",
            self.key_shared_negative_hits.clone(),
        );
        r.register(
            "key_shared_misses",
            "Key look-ups that found nothing in Redis",
            self.key_shared_misses.clone(),
        );
        r.register(
            "key_shared_outdated",
            "Key look-ups that found a record in Redis from before a change",
            self.key_shared_outdated.clone(),
        );
        r.register(
            "key_shared_unreadable",
            "Key look-ups that found something in Redis that no replica with this secret wrote",
            self.key_shared_unreadable.clone(),
        );
        r.register(
            "key_shared_errors",
            "Key look-ups and writes that Redis failed",
            self.key_shared_errors.clone(),
        );
        r.register(
            "key_loads",
            "Key look-ups that asked PostgreSQL",
            self.key_loads.clone(),
        );
        r.register(
            "key_stale_served",
            "Key look-ups answered with a record that could not be confirmed",
            self.key_stale_served.clone(),
        );
        r.register(
            "ledger_takes",
            "Blocks of calendar quotas taken",
            self.ledger_takes.clone(),
        );
        r.register(
            "ledger_errors",
            "Failed calls to the quota ledger",
            self.ledger_errors.clone(),
        );
        r.register(
            "counter_calls",
            "Calls to the shared counters",
            self.counter_calls.clone(),
        );
        r.register(
            "counter_errors",
            "Calls to the shared counters that failed or came too late",
            self.counter_errors.clone(),
        );
        r.register(
            "counter_outages",
            "Times that shared counters were given up",
            self.counter_outages.clone(),
        );
        r.register(
            "lease_tokens_taken",
            "Tokens taken from the shared counters",
            self.lease_tokens_taken.clone(),
        );
        r.register(
            "lease_tokens_spent",
            "Of these, tokens spent by requests",
            self.lease_tokens_spent.clone(),
        );
        r.register(
            "lease_tokens_returned",
            "Of these, tokens given back unspent; what goes back late may not be credited",
            self.lease_tokens_returned.clone(),
        );
        r.register(
            "lease_tokens_lost",
            "Of these, tokens given back unspent to counters that did not take them",
            self.lease_tokens_lost.clone(),
        );
        r.register(
            "admitted_degraded",
            "Requests admitted without the shared counters",
            self.admitted_degraded.clone(),
        );
        r.register(
            "counters_away",
            "Partitions of the shared counters that are given up now; of a single Redis there is one",
            self.counters_away.clone(),
        );
        r.register(
            "replicas",
            "Running servers, as this one counts them; 0 without Redis",
            self.replicas.clone(),
        );
        r.register(
            "guard_refusals",
            "Requests refused by a limit of address or account",
            self.guard_refusals.clone(),
        );
        r.register(
            "logins_failed",
            "Sign-ins with a wrong email or password",
            self.logins_failed.clone(),
        );
        r.register(
            "password_queue_full",
            "Requests answered 503 because too many passwords were being hashed",
            self.password_queue_full.clone(),
        );
        r.register(
            "requests_in_flight",
            "Requests being answered",
            self.requests_in_flight.clone(),
        );
        r.register("panics", "Handlers that panicked", self.panics.clone());
        r.register(
            "log_lines_dropped",
            "Log lines dropped because standard output was blocked",
            self.log_lines_dropped.clone(),
        );
        r.register(
            "revocation_polls",
            "Polls for changes of keys and sessions",
            self.revocation_polls.clone(),
        );
        r.register(
            "revocation_poll_errors",
            "Such polls that failed",
            self.revocation_poll_errors.clone(),
        );
        r.register(
            "revocations_published",
            "Changes told to other replicas",
            self.revocations_published.clone(),
        );
        r.register(
            "revocation_publish_errors",
            "Changes that could not be told; others learn of them by the poll",
            self.revocation_publish_errors.clone(),
        );
        r.register(
            "revocations_received",
            "Changes that other replicas told, and our own",
            self.revocations_received.clone(),
        );
        r.register(
            "revocations_unreadable",
            "Messages about changes that could not be read",
            self.revocations_unreadable.clone(),
        );
        r.register(
            "revocation_messages_lost",
            "Times that messages about changes may have been lost",
            self.revocation_messages_lost.clone(),
        );
        r.register(
            "limiter_cells",
            "Keys whose state is in memory",
            self.limiter_cells.clone(),
        );
        r.register(
            "database_connections",
            "Open connections to PostgreSQL",
            self.database_connections.clone(),
        );
        r.register(
            "database_connections_busy",
            "Connections to PostgreSQL in use",
            self.database_connections_busy.clone(),
        );
        r.register(
            "redis_connections",
            "Open connections to Redis for decisions",
            self.redis_connections.clone(),
        );
        r.register(
            "redis_connections_made",
            "Connections to Redis made so far",
            self.redis_connections_made.clone(),
        );
        r.register(
            "redis_connects_failed",
            "Tries to connect to Redis that failed",
            self.redis_connects_failed.clone(),
        );
        r.register("redis_calls", "Calls to Redis", self.redis_calls.clone());
        r.register(
            "redis_calls_without_connection",
            "Calls to Redis for which there was no connection",
            self.redis_calls_without_connection.clone(),
        );
        r.register(
            "redis_calls_late",
            "Calls to Redis without an answer in time",
            self.redis_calls_late.clone(),
        );
        r.register(
            "redis_calls_failed",
            "Calls to Redis that failed otherwise",
            self.redis_calls_failed.clone(),
        );
        r.register(
            "lookups_refused",
            "Look-ups of unknown keys and tokens answered 503 because too many were under way",
            self.lookups_refused.clone(),
        );
        r.register(
            "database_suspected",
            "Times that PostgreSQL was suspected to be unreachable",
            self.database_suspected.clone(),
        );
        r.register(
            "readiness_checks",
            "Times that PostgreSQL was asked whether the server is ready",
            self.readiness_checks.clone(),
        );
        r.register(
            "sweep_errors",
            "Batches of expired rows that could not be deleted",
            self.sweep_errors.clone(),
        );
        r.register(
            "decisions_not_streamed",
            "Decisions that streams skipped because more were made than can be sent",
            self.decisions_not_streamed.clone(),
        );
        r.register(
            "usage_log_rollup_difference",
            "Requests of yesterday (UTC) by which the log and its rollups differ, summed over tenants",
            self.usage_log_rollup_difference.clone(),
        );
        r.register(
            "usage_ledger_excess",
            "Cost that the quota ledger counted beyond recorded usage, in windows that ended the day before",
            self.usage_ledger_excess.clone(),
        );
        r.register(
            "usage_rollup_excess",
            "Cost that was recorded beyond what the quota ledger counted, in windows that ended the day before",
            self.usage_rollup_excess.clone(),
        );
        r.register(
            "usage_reconciled_at_seconds",
            "Unix time of the last comparison of log, rollups and quota ledger on this server",
            self.usage_reconciled_at.clone(),
        );
        r.register(
            "usage_partition_errors",
            "Times that partitions of usage could not be created or dropped",
            self.usage_partition_errors.clone(),
        );
        r.register(
            "usage_records_shipped",
            "Usage records written to PostgreSQL",
            self.usage_records_shipped.clone(),
        );
        r.register(
            "usage_records_replayed",
            "Of these, records that replicas which have ended had left behind",
            self.usage_records_replayed.clone(),
        );
        r.register(
            "usage_records_damaged",
            "Places in segments where a record was expected and could not be read",
            self.usage_records_damaged.clone(),
        );
        r.register(
            "usage_segments_refused",
            "Segments that are older than the usage log and were not shipped",
            self.usage_segments_refused.clone(),
        );
        r.register(
            "usage_refused_decisions",
            "Requests answered 503 because usage could not be recorded",
            self.usage_refused_decisions.clone(),
        );
        r.register(
            "usage_ship_errors",
            "Batches of usage records that PostgreSQL did not take",
            self.usage_ship_errors.clone(),
        );
        r.register(
            "usage_sync_errors",
            "Usage records that could not be written to disk in time for their responses",
            self.usage_sync_errors.clone(),
        );
        r.register(
            "usage_endpoints_folded",
            "Usage records counted under `other`, above the limit of endpoints",
            self.usage_endpoints_folded.clone(),
        );
        r.register(
            "usage_backlog_records",
            "Usage records that this process has not written to PostgreSQL yet",
            self.usage_backlog_records.clone(),
        );
        r.register(
            "usage_backlog_bytes",
            "Bytes of these",
            self.usage_backlog_bytes.clone(),
        );
        r.register(
            "usage_unrecordable",
            "Whether usage cannot be recorded now, and decisions are answered 503",
            self.usage_unrecordable.clone(),
        );
        r.register(
            "usage_oldest_record_timestamp_seconds",
            "Time of the oldest record of the backlog; 0 if there is none",
            self.usage_oldest_seconds.clone(),
        );
        let mut text = String::with_capacity(8192);
        // The end mark is written last, below.
        if encode(&mut text, &registry).is_ok() {
            text.truncate(text.trim_end().trim_end_matches("# EOF").len());
        }
        self.decision_seconds.write(
            &mut text,
            "quota_decision_seconds",
            "Seconds from a key's text to the decision.",
        );
        self.revocation_lag_seconds.write(
            &mut text,
            "quota_revocation_lag_seconds",
            "Seconds from a change, by PostgreSQL's clock, to when this replica acts on it.",
        );
        self.write_labeled(&mut text);
        let _ = writeln!(
            text,
            "# HELP quota_http_responses Answers by status.\n# TYPE quota_http_responses counter"
        );
        for (status, count) in self.statuses.iter().enumerate() {
            let count = count.load(Ordering::Relaxed);
            if count > 0 {
                let _ = writeln!(
                    text,
                    "quota_http_responses_total{{status=\"{status}\"}} {count}"
                );
            }
        }
        text.push_str("# EOF\n");
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_one_end_and_what_was_counted() {
        let metrics = Metrics::default();
        metrics.allowed.inc();
        metrics.answered(200);
        metrics.answered(429);
        metrics.decision_seconds.observe(1_500);
        let text = metrics.text();
        assert_eq!(text.matches("# EOF").count(), 1);
        assert!(text.ends_with("# EOF\n"));
        assert!(text.contains("quota_decisions_allowed_total 1\n"), "{text}");
        assert!(text.contains("quota_http_responses_total{status=\"429\"} 1\n"));
        assert!(
            text.contains("quota_decision_seconds_bucket{le=\"0.000002\"} 1\n"),
            "{text}"
        );
        assert!(text.contains("quota_decision_seconds_bucket{le=\"0.000001\"} 0\n"));
    }
}
