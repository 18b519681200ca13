//! Stripe customers and their subscriptions.
//!
//! Only system transactions write to the tables of customers and subscriptions. A tenant's transaction can read the
//! tenant's own rows; see the row-level security policies in the migration that creates the tables.

use chrono::{DateTime, Utc};
use diesel::{dsl::sql, pg::Pg, prelude::*, sql_query, sql_types};
use diesel_async::RunQueryDsl;
use quota_common::TenantId;
use uuid::Uuid;

use crate::{
    db::{DbError, SystemTx, TenantTx},
    schema::{billing_accounts, billing_subscriptions, tenants, users},
};

/// A tenant that has started or tried to start a subscription.
#[derive(Debug, Clone, Queryable, Selectable)]
#[diesel(table_name = billing_accounts, check_for_backend(Pg))]
pub struct AccountRow {
    pub tenant_id: Uuid,
    pub customer_id: Option<String>,
    pub customer_email: String,
    pub customer_name: String,
    pub customer_attempt: i32,
    pub customer_requested: bool,
    pub access: String,
    pub has_paid_access: bool,
    pub paid_access_until: Option<DateTime<Utc>>,
    pub subscription_id: Option<String>,
    pub read_at: Option<DateTime<Utc>>,
    pub checkout_attempt: i32,
    pub checkout_id: Option<String>,
}

/// A subscription as of the last read.
#[derive(Debug, Clone, PartialEq, Eq, Queryable, Selectable, Insertable)]
#[diesel(table_name = billing_subscriptions, check_for_backend(Pg))]
pub struct SubscriptionRow {
    pub tenant_id: Uuid,
    pub id: String,
    pub status: String,
    pub started_at: DateTime<Utc>,
    pub trial_ends_at: Option<DateTime<Utc>>,
    pub cancels_at: Option<DateTime<Utc>>,
    pub unpaid_since: Option<DateTime<Utc>>,
    pub period_start: Option<DateTime<Utc>>,
    pub period_end: Option<DateTime<Utc>>,
    pub ended_at: Option<DateTime<Utc>>,
    pub is_metered: bool,
    pub product_name: Option<String>,
    pub currency: Option<String>,
    /// The price per month, in the smallest unit of the currency.
    pub monthly_price: Option<String>,
    /// The price per unit of usage, in the smallest unit of the currency.
    pub usage_price: Option<String>,
}

/// Returns the user's email address and the tenant's name.
pub async fn names(tx: &mut TenantTx, user: Uuid) -> Result<(String, String), DbError> {
    let email = users::table.find(user).select(users::email);
    let email = email.get_result(&mut **tx).await?;
    let name = tenants::table.find(tx.tenant().0).select(tenants::name);
    let name = name.get_result(&mut **tx).await?;
    Ok((email, name))
}

/// Returns the tenant's account, and the subscription that determines its access.
pub async fn find(
    tx: &mut TenantTx,
) -> Result<Option<(AccountRow, Option<SubscriptionRow>)>, DbError> {
    let tenant = tx.tenant().0;
    let account = billing_accounts::table
        .find(tenant)
        .select(AccountRow::as_select())
        .get_result(&mut **tx)
        .await
        .optional()?;
    let Some(account) = account else {
        return Ok(None);
    };
    let subscription = match &account.subscription_id {
        Some(id) => billing_subscriptions::table
            .find((tenant, id))
            .select(SubscriptionRow::as_select())
            .get_result(&mut **tx)
            .await
            .optional()?,
        None => None,
    };
    Ok(Some((account, subscription)))
}

/// Returns the tenant's account. Creates it if necessary. Later calls do not change its email address or name.
pub async fn open(
    tx: &mut SystemTx,
    tenant: TenantId,
    email: &str,
    name: &str,
) -> Result<AccountRow, DbError> {
    diesel::insert_into(billing_accounts::table)
        .values((
            billing_accounts::tenant_id.eq(tenant.0),
            billing_accounts::customer_email.eq(email),
            billing_accounts::customer_name.eq(name),
        ))
        .on_conflict_do_nothing()
        .execute(&mut **tx)
        .await?;
    Ok(billing_accounts::table
        .find(tenant.0)
        .select(AccountRow::as_select())
        .get_result(&mut **tx)
        .await?)
}

/// Records that a customer is about to be created in Stripe.
pub async fn request_customer(tx: &mut SystemTx, tenant: TenantId) -> Result<(), DbError> {
    diesel::update(billing_accounts::table.find(tenant.0))
        .set(billing_accounts::customer_requested.eq(true))
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Records the tenant's customer if none is recorded. Returns the recorded customer.
pub async fn set_customer(
    tx: &mut SystemTx,
    tenant: TenantId,
    customer: &str,
) -> Result<String, DbError> {
    diesel::update(billing_accounts::table.find(tenant.0))
        .filter(billing_accounts::customer_id.is_null())
        .set(billing_accounts::customer_id.eq(customer))
        .execute(&mut **tx)
        .await?;
    let recorded = billing_accounts::table
        .find(tenant.0)
        .select(billing_accounts::customer_id.assume_not_null());
    Ok(recorded.get_result(&mut **tx).await?)
}

/// Records that an attempt to create a customer has failed, so that the next attempt uses a different idempotency key.
pub async fn next_customer_attempt(
    tx: &mut SystemTx,
    tenant: TenantId,
    failed: i32,
) -> Result<(), DbError> {
    diesel::update(billing_accounts::table.find(tenant.0))
        .filter(billing_accounts::customer_attempt.eq(failed))
        .set(billing_accounts::customer_attempt.eq(failed + 1))
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Records the Checkout Session created by an attempt.
pub async fn set_checkout(
    tx: &mut SystemTx,
    tenant: TenantId,
    attempt: i32,
    session: &str,
) -> Result<(), DbError> {
    diesel::update(billing_accounts::table.find(tenant.0))
        .filter(billing_accounts::checkout_attempt.eq(attempt))
        .set((
            billing_accounts::checkout_id.eq(session),
            // A subscription may start soon, so the next read is due within 10 minutes, in case Stripe's webhook is
            // lost.
            billing_accounts::read_due_at
                .eq(sql("least(read_due_at, now() + interval '10 minutes')")),
        ))
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Records that a Checkout Session or an attempt to create one has ended, so that the next attempt uses a different
/// idempotency key. Returns the number of the next attempt. Another request may have already started that attempt.
pub async fn next_checkout_attempt(
    tx: &mut SystemTx,
    tenant: TenantId,
    ended: i32,
) -> Result<i32, DbError> {
    diesel::update(billing_accounts::table.find(tenant.0))
        .filter(billing_accounts::checkout_attempt.eq(ended))
        .set((
            billing_accounts::checkout_attempt.eq(ended + 1),
            billing_accounts::checkout_id.eq(None::<String>),
        ))
        .execute(&mut **tx)
        .await?;
    let next = billing_accounts::table
        .find(tenant.0)
        .select(billing_accounts::checkout_attempt);
    Ok(next.get_result(&mut **tx).await?)
}

/// A started read of a tenant's subscriptions.
#[derive(Debug, Clone, QueryableByName)]
pub struct BegunRead {
    #[diesel(sql_type = sql_types::BigInt)]
    pub number: i64,
    #[diesel(sql_type = sql_types::Text)]
    pub customer_id: String,
    #[diesel(sql_type = sql_types::Timestamptz)]
    pub at: DateTime<Utc>,
}

/// Assigns a number to a read. The transaction must be committed before calling Stripe. Returns `None` if the tenant
/// has no customer.
pub async fn begin_read(tx: &mut SystemTx, tenant: TenantId) -> Result<Option<BegunRead>, DbError> {
    let begun = sql_query(
        "UPDATE billing_accounts SET reads_begun = reads_begun + 1 \
         WHERE tenant_id = $1 AND customer_id IS NOT NULL \
         RETURNING reads_begun AS number, customer_id, clock_timestamp() AS at",
    )
    .bind::<sql_types::Uuid, _>(tenant.0)
    .get_result(&mut **tx)
    .await
    .optional()?;
    Ok(begun)
}

/// A tenant's subscriptions as read from Stripe, and the access that follows from them.
#[derive(Debug)]
pub struct AppliedRead<'a> {
    pub number: i64,
    pub at: DateTime<Utc>,
    pub access: &'a str,
    pub has_paid_access: bool,
    pub paid_access_until: Option<DateTime<Utc>>,
    pub subscription_id: Option<&'a str>,
    pub subscriptions: &'a [SubscriptionRow],
}

/// A tenant's access, as shown in the audit log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    pub access: String,
    pub ends_at: Option<DateTime<Utc>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// The read was ignored, because a later one has already been applied or the account no longer exists.
    Outdated,
    /// Access to paid plans has not changed.
    Same,
    /// Keys on paid plans start or stop working, or will do so at a different time than before.
    PaidAccess,
}

/// An account before a read: the number of the last applied read, `has_paid_access`, `paid_access_until` and `access`.
type Before = (i64, bool, Option<DateTime<Utc>>, String);

/// Applies a read, unless a later one has already been applied. Also returns the previous access if the change belongs
/// in the audit log. A change that affects only the end of a grace period is not audited, because the end can shift
/// with every read.
pub async fn apply_read(
    tx: &mut SystemTx,
    tenant: TenantId,
    read: &AppliedRead<'_>,
) -> Result<(Applied, Option<Shown>), DbError> {
    let before: Option<Before> = billing_accounts::table
        .find(tenant.0)
        .select((
            billing_accounts::read_applied,
            billing_accounts::has_paid_access,
            billing_accounts::paid_access_until,
            billing_accounts::access,
        ))
        .for_update()
        .get_result(&mut **tx)
        .await
        .optional()?;
    let Some((_, had_access, until, access)) = before.filter(|it| it.0 < read.number) else {
        return Ok((Applied::Outdated, None));
    };
    diesel::update(billing_accounts::table.find(tenant.0))
        .set((
            billing_accounts::access.eq(read.access),
            billing_accounts::has_paid_access.eq(read.has_paid_access),
            billing_accounts::paid_access_until.eq(read.paid_access_until),
            billing_accounts::subscription_id.eq(read.subscription_id),
            billing_accounts::read_applied.eq(read.number),
            billing_accounts::read_at.eq(read.at),
        ))
        .execute(&mut **tx)
        .await?;
    diesel::delete(billing_subscriptions::table)
        .filter(billing_subscriptions::tenant_id.eq(tenant.0))
        .execute(&mut **tx)
        .await?;
    diesel::insert_into(billing_subscriptions::table)
        .values(read.subscriptions)
        .execute(&mut **tx)
        .await?;
    let is_same = (had_access, until) == (read.has_paid_access, read.paid_access_until);
    let is_audited = access != read.access || (!is_same && access != "past_due");
    let applied = if is_same {
        Applied::Same
    } else {
        Applied::PaidAccess
    };
    let shown = Shown {
        access,
        ends_at: until,
    };
    Ok((applied, is_audited.then_some(shown)))
}

/// Removes a customer that does not exist in Stripe, and its Checkout Session, so that the next Checkout creates new
/// ones. Returns `false` if the tenant no longer has this customer.
pub async fn forget_customer(
    tx: &mut SystemTx,
    tenant: TenantId,
    customer: &str,
) -> Result<bool, DbError> {
    let own = billing_accounts::table
        .find(tenant.0)
        .filter(billing_accounts::customer_id.eq(customer));
    let forgotten = diesel::update(own)
        .set((
            billing_accounts::customer_id.eq(None::<String>),
            // The next attempt uses a new idempotency key. With the same key, Stripe would return the same customer.
            billing_accounts::customer_attempt.eq(billing_accounts::customer_attempt + 1),
            billing_accounts::checkout_id.eq(None::<String>),
            billing_accounts::checkout_attempt.eq(billing_accounts::checkout_attempt + 1),
        ))
        .execute(&mut **tx)
        .await?;
    Ok(forgotten == 1)
}

pub async fn tenant_of(tx: &mut SystemTx, customer: &str) -> Result<Option<TenantId>, DbError> {
    let tenant = billing_accounts::table
        .filter(billing_accounts::customer_id.eq(customer))
        .select(billing_accounts::tenant_id)
        .get_result(&mut **tx)
        .await
        .optional()?;
    Ok(tenant.map(TenantId))
}

#[derive(QueryableByName)]
struct Due {
    #[diesel(sql_type = sql_types::Uuid)]
    tenant_id: Uuid,
}

/// Returns up to `limit` tenants whose next read is due, and schedules another read for each of these tenants in about
/// `seconds`. Until then, other replicas do not claim the same tenants. The interval varies randomly by up to 10% in
/// either direction, so that reads are spread out. If a tenant has no subscription that can still change, the interval
/// is twice the time since the last read, but at least `seconds` and at most a day.
pub async fn claim_due_reads(
    tx: &mut SystemTx,
    seconds: f64,
    limit: i64,
) -> Result<Vec<TenantId>, DbError> {
    let due: Vec<Due> = sql_query(
        "UPDATE billing_accounts a SET read_due_at = now() + (0.9 + random() * 0.2) * CASE \
             WHEN EXISTS (SELECT FROM billing_subscriptions s WHERE s.tenant_id = a.tenant_id \
                 AND s.status NOT IN ('canceled', 'incomplete_expired')) THEN make_interval(secs => $1) \
             ELSE greatest(make_interval(secs => $1), least(interval '1 day', 2 * (now() - coalesce(a.read_at, now())))) \
             END \
         WHERE tenant_id = ANY(ARRAY( \
             SELECT tenant_id FROM billing_accounts \
             WHERE read_due_at <= now() AND customer_id IS NOT NULL \
             ORDER BY read_due_at LIMIT $2 FOR UPDATE SKIP LOCKED)) \
         RETURNING tenant_id",
    )
    .bind::<sql_types::Double, _>(seconds)
    .bind::<sql_types::BigInt, _>(limit)
    .get_results(&mut **tx)
    .await?;
    Ok(due.into_iter().map(|it| TenantId(it.tenant_id)).collect())
}

pub async fn customer_of(tx: &mut SystemTx, tenant: TenantId) -> Result<Option<String>, DbError> {
    let customer: Option<Option<String>> = billing_accounts::table
        .find(tenant.0)
        .select(billing_accounts::customer_id)
        .get_result(&mut **tx)
        .await
        .optional()?;
    Ok(customer.flatten())
}

/// Returns the statuses of the tenant's subscriptions as of the last read.
pub async fn statuses(tx: &mut SystemTx, tenant: TenantId) -> Result<Vec<String>, DbError> {
    let statuses = billing_subscriptions::table
        .filter(billing_subscriptions::tenant_id.eq(tenant.0))
        .select(billing_subscriptions::status);
    Ok(statuses.get_results(&mut **tx).await?)
}
