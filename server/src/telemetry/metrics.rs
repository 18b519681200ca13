//! Metrics: names, descriptions and the OpenMetrics text.
//!
//! Each counter or gauge without labels is an entry in the `metrics!` list. The help text is also the documentation of
//! the field.

mod connections;
mod latency;
mod measured;

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use prometheus_client::{
    encoding::text::encode,
    metrics::{counter::Counter, gauge::Gauge, info::Info},
    registry::Registry,
};

pub use self::{
    connections::{ConnectionLimit, ConnectionMetrics},
    latency::Latency,
    measured::MeasuredGauge,
};

macro_rules! metrics {
    ($($field:ident: $kind:ident, $name:literal, $help:literal;)+) => {
        /// All metrics of a server.
        #[derive(Debug, Default)]
        pub struct Metrics {
            $(
                #[doc = $help]
                pub $field: $kind,
            )+
            /// The time from receiving a key to the decision.
            pub decision_seconds: Latency,
            /// The time from a change, on PostgreSQL's clock, until this replica applied the change.
            pub invalidation_lag_seconds: Latency,
            pub public_connections: Arc<ConnectionMetrics>,
            pub metrics_connections: Arc<ConnectionMetrics>,
            pub grpc_connections: Arc<ConnectionMetrics>,
            /// The number of swept rows, by kind.
            swept: Mutex<BTreeMap<&'static str, u64>>,
            statuses: Statuses,
        }

        impl Metrics {
            /// Registers all metrics that have no labels.
            fn register(&self, registry: &mut Registry) {
                $(registry.register($name, $help, self.$field.clone());)+
            }
        }
    };
}

metrics! {
    allowed: Counter, "decisions_allowed", "Requests allowed by the limiter";
    denied: Counter, "decisions_denied", "Requests denied by the limiter";
    limiter_errors: Counter, "decision_errors", "Requests that got 503 because no decision could be made";
    keys_rejected: Counter, "keys_rejected", "Requests with an invalid, inactive or expired key";
    payment_required: Counter, "payment_required",
        "Requests with a key on a paid plan, rejected because the tenant has no valid subscription";
    billing_events: Counter, "billing_events", "Stripe webhooks stored";
    billing_signatures_bad: Counter, "billing_signatures_bad",
        "Stripe webhooks rejected because of an invalid signature";
    billing_errors: Counter, "billing_errors",
        "Failed attempts to read from Stripe, to report usage or to compare totals; they are retried";
    billing_events_failed: Counter, "billing_events_failed",
        "Stripe webhooks that could not be processed and were abandoned";
    billing_account_mismatch: Gauge, "billing_account_mismatch",
        "1 while billing is stopped because STRIPE_SECRET_KEY is not for the customers' account and mode, otherwise 0";
    billing_reports: Counter, "billing_reports", "Usage reports that Stripe has accepted or that did not need to be sent";
    billing_usage_difference: Gauge, "billing_usage_difference",
        "Difference between usage reports and the totals in Stripe for yesterday (UTC), summed over customers";
    billing_usage_lost: MeasuredGauge, "billing_usage_lost",
        "Usage from the last 40 days that should have been charged but will not be; no value if the last measurement failed";
    billing_usage_oldest: MeasuredGauge, "billing_usage_oldest_pending_seconds",
        "Age of the oldest usage that has yet to be reported to Stripe; 0 if there is none; no value if the last measurement failed";
    billing_meter_errors: Counter, "billing_meter_errors",
        "Usage reports that Stripe accepted but could not bill";
    billing_reconciled_at: Gauge, "billing_reconciled_at_seconds",
        "Unix time of the last comparison of usage reports with the totals in Stripe";
    quota_alerts: Counter, "alerts", "Quota alerts created";
    alert_errors: Counter, "alert_errors", "Failed attempts to check quotas for alerts; they are retried";
    webhooks_delivered: Counter, "webhooks_delivered", "Deliveries that an endpoint accepted";
    webhook_attempts_failed: Counter, "webhook_attempts_failed",
        "Failed delivery attempts, each followed by another attempt";
    webhooks_failed: Counter, "webhooks_failed", "Deliveries that were abandoned after a failed attempt";
    webhook_errors: Counter, "webhook_errors",
        "Failed attempts to claim deliveries or to record their results; they are retried";
    webhooks_overdue: MeasuredGauge, "webhooks_overdue_seconds",
        "Time since the oldest overdue delivery was due; 0 if none is overdue; no value if the last measurement failed";
    webhook_secrets_unreadable: Gauge, "webhook_secrets_unreadable",
        "Webhooks whose signing secrets were encrypted with a QUOTA_SECRET that is not configured, as of startup";
    mails_sent: Counter, "emails_sent", "Emails sent";
    mail_attempts_failed: Counter, "email_attempts_failed",
        "Failed attempts to send an email, each followed by another attempt";
    mails_failed: Counter, "emails_failed", "Emails that were rejected or abandoned";
    mail_errors: Counter, "email_errors",
        "Failed attempts to write or claim emails in PostgreSQL or to record their results; they are retried";
    keys_malformed: Counter, "keys_malformed",
        "Requests with a key that has an invalid format or checksum, rejected without a lookup";
    key_cache_hits: Counter, "key_cache_hits", "Key lookups served from memory";
    key_cache_negative_hits: Counter, "key_cache_negative_hits",
        "Lookups of nonexistent keys, answered from memory";
    key_shared_hits: Counter, "key_shared_hits", "Key lookups served from Redis";
    key_shared_negative_hits: Counter, "key_shared_negative_hits",
        "Lookups of nonexistent keys, answered from Redis";
    key_shared_misses: Counter, "key_shared_misses", "Key lookups that found nothing in Redis";
    key_shared_outdated: Counter, "key_shared_outdated",
        "Key lookups that found an outdated record in Redis";
    key_shared_unreadable: Counter, "key_shared_unreadable",
        "Key lookups that found a record in Redis that was damaged or sealed with another secret";
    key_shared_errors: Counter, "key_shared_errors", "Failed reads and writes of key records in Redis";
    key_loads: Counter, "key_loads", "Key lookups in PostgreSQL";
    key_stale_served: Counter, "key_stale_served",
        "Key lookups served with a key record that could not be confirmed";
    ledger_takes: Counter, "ledger_takes", "Blocks of calendar quotas taken from the ledger";
    ledger_errors: Counter, "ledger_errors", "Failed calls to the quota ledger";
    counter_calls: Counter, "counter_calls", "Calls to the shared counters";
    counter_errors: Counter, "counter_errors", "Calls to the shared counters that failed or timed out";
    counter_outages: Counter, "counter_outages", "Outages of the shared counters";
    lease_tokens_taken: Counter, "lease_tokens_taken", "Tokens taken from the shared counters";
    lease_tokens_spent: Counter, "lease_tokens_spent",
        "Tokens from the shared counters that requests have spent";
    lease_tokens_returned: Counter, "lease_tokens_returned",
        "Tokens returned to the shared counters unspent; late returns may not be credited";
    lease_tokens_lost: Counter, "lease_tokens_lost",
        "Unspent tokens that could not be returned to the shared counters";
    allowed_degraded: Counter, "decisions_allowed_degraded", "Requests allowed without the shared counters";
    counter_partitions_unavailable: Gauge, "counter_partitions_unavailable",
        "Unavailable partitions of the shared counters; a single Redis server is one partition";
    replicas: Gauge, "replicas", "Replicas, as counted by this replica; 0 without Redis";
    guard_rejections: Counter, "guard_rejections",
        "Requests rejected by a limit per address, network, account or tenant";
    logins_failed: Counter, "logins_failed", "Sign-ins with an incorrect email or password";
    password_queue_full: Counter, "password_queue_full",
        "Requests that got 503 because too many passwords were being hashed";
    direct_responses: Counter, "direct_responses",
        "Responses written without the general HTTP server (see `QUOTA_DIRECT_RESPONSES`)";
    requests_in_flight: Gauge, "requests_in_flight", "Requests in flight";
    panics: Counter, "panics", "Handlers that panicked";
    log_lines_dropped: Counter, "log_lines_dropped",
        "Log lines dropped because standard output was blocked";
    spans_sent: Counter, "spans_sent", "Spans sent to the OpenTelemetry collector";
    spans_dropped: Counter, "spans_dropped",
        "Spans dropped because too many were waiting or the OpenTelemetry collector did not accept them";
    invalidation_polls: Counter, "invalidation_polls",
        "Polls for changes to tenants, plans, keys, service tokens and sessions";
    invalidation_poll_errors: Counter, "invalidation_poll_errors", "Failed polls for changes";
    invalidations_published: Counter, "invalidations_published", "Changes published to other replicas";
    invalidation_publish_errors: Counter, "invalidation_publish_errors",
        "Changes that could not be published; other replicas find them by polling";
    invalidations_received: Counter, "invalidations_received",
        "Published changes received, including those of this replica";
    invalidations_unreadable: Counter, "invalidations_unreadable", "Published changes that could not be read";
    invalidation_messages_lost: Counter, "invalidation_messages_lost",
        "Number of times published changes may have been lost";
    limiter_keys: Gauge, "limiter_keys", "Keys with limiter state in memory";
    database_connections: Gauge, "database_connections", "Open connections to PostgreSQL";
    database_connections_busy: Gauge, "database_connections_busy", "Connections to PostgreSQL in use";
    redis_connections: Gauge, "redis_connections", "Open connections to Redis for decisions";
    redis_connections_made: Counter, "redis_connections_made", "Connections to Redis established";
    redis_connects_failed: Counter, "redis_connects_failed", "Failed attempts to connect to Redis";
    redis_calls: Counter, "redis_calls", "Calls to Redis";
    redis_calls_without_connection: Counter, "redis_calls_without_connection",
        "Calls to Redis that failed because there was no connection";
    redis_calls_late: Counter, "redis_calls_late", "Calls to Redis that timed out";
    redis_calls_failed: Counter, "redis_calls_failed",
        "Calls to Redis that failed for reasons other than a timeout or a missing connection";
    lookups_rejected: Counter, "lookups_rejected",
        "Lookups of keys and tokens that got 503 because too many lookups were in progress";
    database_suspected: Counter, "database_suspected", "Number of times PostgreSQL was suspected to be unreachable";
    readiness_checks: Counter, "readiness_checks", "Readiness checks that queried PostgreSQL";
    sweep_errors: Counter, "sweep_errors", "Batches of expired rows that could not be deleted or cleared";
    decisions_not_streamed: Counter, "decisions_not_streamed",
        "Decisions that streams skipped because they could not be sent fast enough";
    usage_log_rollup_difference: Gauge, "usage_log_rollup_difference",
        "Difference between yesterday's requests (UTC) in the usage log and in the rollups, summed over tenants";
    usage_ledger_excess: Gauge, "usage_ledger_excess",
        "Cost in the quota ledger that exceeds recorded usage, for windows that ended 1 to 25 hours before the comparison";
    usage_rollup_excess: Gauge, "usage_rollup_excess",
        "Recorded cost that exceeds the quota ledger, for windows that ended 1 to 25 hours before the comparison";
    usage_reconciled_at: Gauge, "usage_reconciled_at_seconds",
        "Unix time of this replica's last comparison of the usage log, the rollups and the quota ledger";
    usage_partition_errors: Counter, "usage_partition_errors",
        "Failed attempts to create or drop usage partitions";
    usage_records_shipped: Counter, "usage_records_shipped", "Usage records written to PostgreSQL";
    usage_records_replayed: Counter, "usage_records_replayed",
        "Usage records left behind by stopped replicas and written to PostgreSQL";
    usage_records_damaged: Counter, "usage_records_damaged",
        "Positions in segments at which a usage record was expected but could not be read";
    usage_segments_rejected: Counter, "usage_segments_rejected",
        "Segments that were not shipped because they are older than `QUOTA_USAGE_RETENTION`";
    usage_decisions_rejected: Counter, "usage_decisions_rejected",
        "Requests that got 503 because usage could not be recorded";
    usage_denials_unrecorded: Counter, "usage_denials_unrecorded",
        "Denials not recorded because the usage backlog was large and the tenant had more than 100 denials per second";
    usage_ship_errors: Counter, "usage_ship_errors", "Batches of usage records that could not be written to PostgreSQL";
    usage_sync_errors: Counter, "usage_sync_errors",
        "Usage segments that could not be written to disk (`QUOTA_DURABILITY=machine`)";
    usage_endpoints_folded: Counter, "usage_endpoints_folded",
        "Usage records counted under `other` because the key or tenant already has the maximum number of endpoints";
    usage_backlog_records: Gauge, "usage_backlog_records",
        "Usage records that this replica has not written to PostgreSQL yet";
    usage_backlog_bytes: Gauge, "usage_backlog_bytes",
        "Bytes of usage records that this replica has not written to PostgreSQL yet";
    usage_adopted_segments: Gauge, "usage_adopted_segments",
        "Usage segments that were taken over from stopped replicas and have not been shipped completely";
    usage_unrecordable: Gauge, "usage_unrecordable",
        "1 while usage cannot be recorded and check requests get 503, otherwise 0";
    usage_oldest_seconds: Gauge, "usage_oldest_record_timestamp_seconds",
        "Unix time of the oldest usage record in the backlog; 0 if the backlog is empty";
}

/// The number of responses, by status code.
#[derive(Debug)]
struct Statuses(Box<[AtomicU64; 600]>);

impl Default for Statuses {
    fn default() -> Self {
        Self(Box::new([const { AtomicU64::new(0) }; 600]))
    }
}

impl Metrics {
    /// Counts a response.
    pub fn answered(&self, status: u16) {
        if let Some(count) = self.statuses.0.get(usize::from(status)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts expired rows that were deleted or cleared.
    pub fn swept(&self, kind: &'static str, rows: u64) {
        *self.swept.lock().entry(kind).or_default() += rows;
    }

    /// Returns all metrics as OpenMetrics text (version 1.0).
    pub fn text(&self) -> String {
        let mut registry = Registry::with_prefix("quota");
        let version = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "Version of the running server", version);
        self.register(&mut registry);
        let mut text = String::with_capacity(8192);
        // The end marker is removed, because more metrics follow.
        if encode(&mut text, &registry).is_ok() {
            text.truncate(text.trim_end().trim_end_matches("# EOF").len());
        }
        self.decision_seconds.write(
            &mut text,
            "quota_decision_seconds",
            "Seconds from receiving a key to the decision.",
        );
        self.invalidation_lag_seconds.write(
            &mut text,
            "quota_invalidation_lag_seconds",
            "Seconds from a change, by PostgreSQL's clock, until this replica applied it.",
        );
        connections::write(
            &mut text,
            [
                ("public", &self.public_connections),
                ("metrics", &self.metrics_connections),
                ("grpc", &self.grpc_connections),
            ],
        );
        self.write_swept(&mut text);
        self.write_statuses(&mut text);
        text.push_str("# EOF\n");
        text
    }

    fn write_swept(&self, text: &mut String) {
        let _ = writeln!(
            text,
            "# HELP quota_rows_swept Expired rows deleted or cleared.\n# TYPE quota_rows_swept counter"
        );
        for (kind, rows) in self.swept.lock().iter() {
            let _ = writeln!(text, "quota_rows_swept_total{{kind=\"{kind}\"}} {rows}");
        }
    }

    fn write_statuses(&self, text: &mut String) {
        let _ = writeln!(
            text,
            "# HELP quota_http_responses Responses by status.\n# TYPE quota_http_responses counter"
        );
        for (status, count) in self.statuses.0.iter().enumerate() {
            let count = count.load(Ordering::Relaxed);
            if count > 0 {
                let _ = writeln!(
                    text,
                    "quota_http_responses_total{{status=\"{status}\"}} {count}"
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Nanos;

    #[test]
    fn text_has_every_count_and_one_end_marker() {
        let metrics = Metrics::default();
        metrics.allowed.inc();
        metrics.answered(200);
        metrics.answered(429);
        metrics.decision_seconds.observe(Nanos(1_500));
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
