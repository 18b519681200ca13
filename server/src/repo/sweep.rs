//! Deletes or clears expired rows in batches.
//!
//! Each statement affects up to `limit` rows. The oldest rows come first, except among the deliveries of deleted
//! webhooks. Each statement uses an index, except in the small table of replicas. A statement skips rows that another
//! transaction has locked, so replicas that sweep at the same time share the work without waiting for each other.

use diesel::{sql_query, sql_types::BigInt};
use diesel_async::RunQueryDsl;

use crate::db::{DbError, SystemTx};

/// A kind of row that expires.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expired {
    /// Sessions that expired more than a day ago, with their refresh tokens.
    Sessions,
    /// Sessions that were revoked more than a day ago, with their refresh tokens.
    RevokedSessions,
    IdempotencyKeys,
    /// Rows that are more than a day old. The newest row is kept, because its number is needed for comparisons.
    Invalidations,
    /// Quota windows that began more than 40 days ago. By then, they have ended in every time zone.
    QuotaUsage,
    /// Usage of tenant quotas in months that began more than 40 days ago.
    TenantQuotaUsage,
    /// IDs of batches of returned tokens that are too old to be retried.
    QuotaReturns,
    /// Previous secrets whose grace period has ended. Their keys are kept.
    PreviousKeys,
    Replicas,
    /// Processed webhooks from Stripe. Kept for as long as Stripe lists them.
    BillingEvents,
    /// Usage to charge that is more than 400 days old. Kept until all of it is part of reports.
    BillingUsage,
    BillingReports,
    /// Problems that Stripe found in usage, received more than 400 days ago.
    BillingMeterErrors,
    /// Completed deliveries that are more than 30 days old.
    WebhookDeliveries,
    /// Deliveries of deleted webhooks.
    DeletedWebhooks,
    /// Alerts whose window ended more than 90 days ago.
    QuotaAlerts,
    /// Emails more than 7 days old that were sent or abandoned.
    Mails,
}

impl Expired {
    pub const ALL: [Self; 17] = [
        Self::Sessions,
        Self::RevokedSessions,
        Self::IdempotencyKeys,
        Self::Invalidations,
        Self::QuotaUsage,
        Self::TenantQuotaUsage,
        Self::QuotaReturns,
        Self::PreviousKeys,
        Self::Replicas,
        Self::BillingEvents,
        Self::BillingUsage,
        Self::BillingReports,
        Self::BillingMeterErrors,
        Self::WebhookDeliveries,
        Self::DeletedWebhooks,
        Self::QuotaAlerts,
        Self::Mails,
    ];

    /// Returns the name used in metrics and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sessions => "sessions",
            Self::RevokedSessions => "revoked_sessions",
            Self::IdempotencyKeys => "idempotency_keys",
            Self::Invalidations => "revocations",
            Self::QuotaUsage => "quota_usage",
            Self::TenantQuotaUsage => "tenant_quota_usage",
            Self::QuotaReturns => "quota_returns",
            Self::PreviousKeys => "previous_keys",
            Self::Replicas => "replicas",
            Self::BillingEvents => "billing_events",
            Self::BillingUsage => "billing_usage",
            Self::BillingReports => "billing_reports",
            Self::BillingMeterErrors => "billing_meter_errors",
            Self::WebhookDeliveries => "webhook_deliveries",
            Self::DeletedWebhooks => "deleted_webhooks",
            Self::QuotaAlerts => "quota_alerts",
            Self::Mails => "mails",
        }
    }

    /// Returns the SQL statement. Its parameter is the maximum number of rows.
    fn statement(self) -> String {
        let delete = |table: &str, id: &str, expired: &str, order: &str| {
            format!(
                "DELETE FROM {table} WHERE {id} = ANY(ARRAY( \
                     SELECT {id} FROM {table} WHERE {expired} \
                     ORDER BY {order} LIMIT $1 FOR UPDATE SKIP LOCKED))"
            )
        };
        let older = |column: &str, age: &str| format!("{column} < now() - interval '{age}'");
        let delete_older = |table: &str, id: &str, column: &str, age: &str| {
            delete(table, id, &older(column, age), column)
        };
        match self {
            Self::Sessions => delete_older("sessions", "id", "expires_at", "1 day"),
            Self::RevokedSessions => delete_older("sessions", "id", "revoked_at", "1 day"),
            Self::IdempotencyKeys => {
                delete_older("idempotency_keys", "ctid", "created_at", "24 hours")
            }
            Self::Invalidations => {
                let is_older = "seq < (SELECT max(seq) FROM revocations)";
                let expired = format!("{} AND {is_older}", older("at", "1 day"));
                delete("revocations", "seq", &expired, "at")
            }
            Self::QuotaUsage => delete_older("quota_usage", "ctid", "window_start", "40 days"),
            Self::TenantQuotaUsage => {
                delete_older("tenant_quota_usage", "ctid", "window_start", "40 days")
            }
            Self::QuotaReturns => delete_older("quota_returns", "id", "applied_at", "40 days"),
            Self::PreviousKeys => "UPDATE api_keys \
                 SET previous_key_hash = NULL, previous_expires_at = NULL \
                 WHERE id = ANY(ARRAY( \
                     SELECT id FROM api_keys WHERE previous_expires_at <= now() \
                     ORDER BY previous_expires_at LIMIT $1 FOR UPDATE SKIP LOCKED)) \
                 AND previous_expires_at <= now()"
                .to_owned(),
            Self::Replicas => delete_older("replicas", "id", "seen_at", "1 day"),
            Self::BillingUsage => {
                let charged = format!("cost = planned AND {}", older("start", "400 days"));
                delete("billing_usage", "ctid", &charged, "start")
            }
            Self::BillingReports => {
                let ended = format!("due_at IS NULL AND {}", older("created_at", "400 days"));
                delete("billing_reports", "ctid", &ended, "created_at")
            }
            Self::BillingMeterErrors => {
                delete_older("billing_meter_errors", "ctid", "received_at", "400 days")
            }
            Self::WebhookDeliveries => {
                let ended = format!("due_at IS NULL AND {}", older("created_at", "30 days"));
                delete("webhook_deliveries", "ctid", &ended, "created_at")
            }
            // Finds the webhooks that have deliveries, with one index probe for each.
            Self::DeletedWebhooks => "WITH RECURSIVE logs AS ( \
                     (SELECT tenant_id, webhook_id FROM webhook_deliveries \
                      ORDER BY tenant_id, webhook_id, id LIMIT 1) \
                     UNION ALL \
                     SELECT next.tenant_id, next.webhook_id FROM logs CROSS JOIN LATERAL ( \
                         SELECT d.tenant_id, d.webhook_id FROM webhook_deliveries d \
                         WHERE (d.tenant_id, d.webhook_id) > (logs.tenant_id, logs.webhook_id) \
                         ORDER BY d.tenant_id, d.webhook_id, d.id LIMIT 1) next \
                 ), deleted AS MATERIALIZED ( \
                     SELECT l.tenant_id, l.webhook_id FROM logs l WHERE NOT EXISTS ( \
                         SELECT FROM webhooks w WHERE w.tenant_id = l.tenant_id AND w.id = l.webhook_id) \
                 ) \
                 DELETE FROM webhook_deliveries WHERE ctid = ANY(ARRAY( \
                     SELECT d.ctid FROM deleted l CROSS JOIN LATERAL ( \
                         SELECT d.ctid FROM webhook_deliveries d \
                         WHERE d.tenant_id = l.tenant_id AND d.webhook_id = l.webhook_id \
                         LIMIT $1 FOR UPDATE SKIP LOCKED) d \
                     LIMIT $1))"
                .to_owned(),
            Self::QuotaAlerts => delete_older("quota_alerts", "ctid", "window_end", "90 days"),
            Self::Mails => {
                let ended = format!("due_at IS NULL AND {}", older("created_at", "7 days"));
                delete("mails", "ctid", &ended, "created_at")
            }
            Self::BillingEvents => {
                let handled = format!("due_at IS NULL AND {}", older("received_at", "30 days"));
                delete("billing_events", "id", &handled, "received_at")
            }
        }
    }
}

/// Sweeps up to `limit` rows and returns their number. If the number is less than `limit`, no rows are left, except
/// those that are locked.
pub async fn batch(tx: &mut SystemTx, kind: Expired, limit: i64) -> Result<usize, DbError> {
    let swept = sql_query(kind.statement())
        .bind::<BigInt, _>(limit)
        .execute(&mut **tx)
        .await?;
    Ok(swept)
}
