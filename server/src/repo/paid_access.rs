//! Whether a tenant may use paid plans, as of the last read from Stripe.
//!
//! The rule exists twice: as [`PaidAccess::is_current`], and as [`IS_CURRENT`] for queries. `server/tests/it/paid_access`
//! compares the two.

use chrono::{DateTime, Utc};
use diesel::{
    QueryableByName, sql_query,
    sql_types::{Bool, Uuid as SqlUuid},
};
use diesel_async::RunQueryDsl;

use crate::{
    clock::UnixNanos,
    db::{DbError, TenantTx},
};

/// For a row of `billing_accounts`: whether its tenant may currently use paid plans.
pub const IS_CURRENT: &str =
    "(has_paid_access AND (paid_access_until IS NULL OR paid_access_until > now()))";

/// A tenant's access to paid plans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PaidAccess {
    /// When the access ends: 0 if the tenant has no access, and `u64::MAX` if the access does not end.
    until: UnixNanos,
}

impl PaidAccess {
    pub const NONE: Self = Self {
        until: UnixNanos(0),
    };

    /// Converts the columns `has_paid_access` and `paid_access_until` of `billing_accounts`.
    pub fn new(has_paid_access: bool, paid_access_until: Option<DateTime<Utc>>) -> Self {
        let until = match (has_paid_access, paid_access_until) {
            (false, _) => 0,
            (true, None) => u64::MAX,
            // The end is either before 1970, or too late for the type.
            (true, Some(end)) => end
                .timestamp_nanos_opt()
                .map_or(u64::MAX, |end| u64::try_from(end).unwrap_or(0)),
        };
        Self {
            until: UnixNanos(until),
        }
    }

    /// Returns whether the tenant may use paid plans. Calls `now` only if the access ends.
    #[inline]
    pub fn is_current(self, now: impl Fn() -> UnixNanos) -> bool {
        match self.until {
            UnixNanos(0) => false,
            UnixNanos(u64::MAX) => true,
            end => now() < end,
        }
    }
}

/// Returns whether the tenant may currently use paid plans.
pub async fn is_current(tx: &mut TenantTx) -> Result<bool, DbError> {
    #[derive(QueryableByName)]
    struct Access {
        #[diesel(sql_type = Bool)]
        is_current: bool,
    }
    let tenant = tx.tenant().0;
    let access: Access = sql_query(format!(
        "SELECT EXISTS (SELECT FROM billing_accounts WHERE tenant_id = $1 AND {IS_CURRENT}) AS is_current"
    ))
    .bind::<SqlUuid, _>(tenant)
    .get_result(&mut **tx)
    .await?;
    Ok(access.is_current)
}
