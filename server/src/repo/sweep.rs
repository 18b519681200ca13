//! Rows whose time has passed: deleted, or cleared, in batches.
//!
//! Each statement takes at most `limit` rows, the oldest first by an index, and leaves out rows that another
//! transaction has locked: two replicas that sweep at the same time share the work, and neither waits.

use diesel::{sql_query, sql_types::BigInt};
use diesel_async::RunQueryDsl;

use crate::db::{DbError, SystemTx};

/// A kind of row that expires.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expired {
    /// A day after they expired, with their refresh tokens.
    Sessions,
    /// A day after they were revoked, with their refresh tokens.
    RevokedSessions,
    IdempotencyKeys,
    /// Those that every replica has seen long ago, except the newest: numbers are compared with it.
    Revocations,
    /// Windows that ended long ago: a month is over after 31 days, wherever it began.
    QuotaUsage,
    /// Those of windows that are swept: until then a batch may be sent again.
    QuotaReturns,
    /// Previous secrets of rotated keys whose grace has ended. The keys stay.
    PreviousKeys,
    Replicas,
}

impl Expired {
    pub const ALL: [Self; 8] = [
        Self::Sessions,
        Self::RevokedSessions,
        Self::IdempotencyKeys,
        Self::Revocations,
        Self::QuotaUsage,
        Self::QuotaReturns,
        Self::PreviousKeys,
        Self::Replicas,
    ];

    /// As metrics and logs name it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sessions => "sessions",
            Self::RevokedSessions => "revoked_sessions",
            Self::IdempotencyKeys => "idempotency_keys",
            Self::Revocations => "revocations",
            Self::QuotaUsage => "quota_usage",
            Self::QuotaReturns => "quota_returns",
            Self::PreviousKeys => "previous_keys",
            Self::Replicas => "replicas",
        }
    }

    const fn statement(self) -> &'static str {
        match self {
            Self::Sessions => {
                "DELETE FROM sessions WHERE id = ANY(ARRAY( \
                     SELECT id FROM sessions WHERE expires_at < now() - interval '1 day' \
                     ORDER BY expires_at LIMIT $1 FOR UPDATE SKIP LOCKED))"
            }
            Self::RevokedSessions => {
                "DELETE FROM sessions WHERE id = ANY(ARRAY( \
                     SELECT id FROM sessions WHERE revoked_at < now() - interval '1 day' \
                     ORDER BY revoked_at LIMIT $1 FOR UPDATE SKIP LOCKED))"
            }
            Self::IdempotencyKeys => {
                "DELETE FROM idempotency_keys WHERE ctid = ANY(ARRAY( \
                     SELECT ctid FROM idempotency_keys WHERE created_at < now() - interval '24 hours' \
                     ORDER BY created_at LIMIT $1 FOR UPDATE SKIP LOCKED))"
            }
            Self::Revocations => {
                "DELETE FROM revocations WHERE seq = ANY(ARRAY( \
                     SELECT seq FROM revocations WHERE at < now() - interval '1 day' \
                         AND seq < (SELECT max(seq) FROM revocations) \
                     ORDER BY at LIMIT $1 FOR UPDATE SKIP LOCKED))"
            }
            Self::QuotaUsage => {
                "DELETE FROM quota_usage WHERE ctid = ANY(ARRAY( \
                     SELECT ctid FROM quota_usage WHERE window_start < now() - interval '40 days' \
                     ORDER BY window_start LIMIT $1 FOR UPDATE SKIP LOCKED))"
            }
            Self::QuotaReturns => {
                "DELETE FROM quota_returns WHERE id = ANY(ARRAY( \
                     SELECT id FROM quota_returns WHERE applied_at < now() - interval '40 days' \
                     ORDER BY applied_at LIMIT $1 FOR UPDATE SKIP LOCKED))"
            }
            Self::PreviousKeys => {
                "UPDATE api_keys SET previous_key_hash = NULL, previous_expires_at = NULL \
                 WHERE id = ANY(ARRAY( \
                     SELECT id FROM api_keys WHERE previous_expires_at <= now() \
                     ORDER BY previous_expires_at LIMIT $1 FOR UPDATE SKIP LOCKED)) \
                 AND previous_expires_at <= now()"
            }
            Self::Replicas => {
                "DELETE FROM replicas WHERE id = ANY(ARRAY( \
                     SELECT id FROM replicas WHERE seen_at < now() - interval '1 day' \
                     LIMIT $1 FOR UPDATE SKIP LOCKED))"
            }
        }
    }
}

/// Sweeps at most `limit` rows and returns how many it swept: fewer than `limit` means that no more were found.
pub async fn batch(tx: &mut SystemTx, kind: Expired, limit: i64) -> Result<usize, DbError> {
    let swept = sql_query(kind.statement())
        .bind::<BigInt, _>(limit)
        .execute(&mut **tx)
        .await?;
    Ok(swept)
}
