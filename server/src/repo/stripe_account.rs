//! The Stripe account to which all customers belong.

use chrono::{DateTime, Utc};
use diesel::{
    prelude::*,
    sql_query,
    sql_types::{Bool, Nullable, Text},
};
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use super::billing::Shown;
use crate::{
    db::{DbError, SystemTx},
    schema::billing_accounts,
};

#[derive(Debug, Clone, PartialEq, Eq, QueryableByName)]
pub struct StripeAccount {
    /// `None` if the secret key does not have permission to read the account's ID.
    #[diesel(sql_type = Nullable<Text>)]
    pub account_id: Option<String>,
    #[diesel(sql_type = Bool)]
    pub livemode: bool,
}

impl StripeAccount {
    /// Returns whether both values may describe the same account.
    pub fn matches(&self, other: &Self) -> bool {
        let mut ids = self.account_id.iter().zip(&other.account_id);
        self.livemode == other.livemode && ids.all(|(own, other)| own == other)
    }
}

/// Returns the stored account, if there is one.
pub async fn find(tx: &mut SystemTx) -> Result<Option<StripeAccount>, DbError> {
    let stored = sql_query("SELECT account_id, livemode FROM billing_stripe_account");
    Ok(stored.get_result(&mut **tx).await.optional()?)
}

/// Stores the account. If the account is already stored without its ID, adds the ID. If another account is stored, does
/// nothing.
pub async fn record(tx: &mut SystemTx, account: &StripeAccount) -> Result<(), DbError> {
    sql_query(
        "INSERT INTO billing_stripe_account AS a (account_id, livemode) VALUES ($1, $2) \
         ON CONFLICT ON CONSTRAINT billing_stripe_account_pkey DO UPDATE SET account_id = $1 \
         WHERE a.account_id IS NULL AND a.livemode = $2",
    )
    .bind::<Nullable<Text>, _>(&account.account_id)
    .bind::<Bool, _>(account.livemode)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Replaces the stored account, unless any tenant has a customer.
pub async fn replace_unused(tx: &mut SystemTx, account: &StripeAccount) -> Result<(), DbError> {
    sql_query(
        "UPDATE billing_stripe_account SET account_id = $1, livemode = $2, recorded_at = now() \
         WHERE (account_id, livemode) IS DISTINCT FROM ($1, $2) \
             AND NOT EXISTS (SELECT FROM billing_accounts WHERE customer_id IS NOT NULL)",
    )
    .bind::<Nullable<Text>, _>(&account.account_id)
    .bind::<Bool, _>(account.livemode)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Returns up to `limit` customers, most recently read first.
pub async fn customers(tx: &mut SystemTx, limit: i64) -> Result<Vec<String>, DbError> {
    let customers = billing_accounts::table
        .filter(billing_accounts::customer_id.is_not_null())
        .order(billing_accounts::read_at.desc().nulls_last())
        .limit(limit)
        .select(billing_accounts::customer_id.assume_not_null());
    Ok(customers.load(&mut **tx).await?)
}

/// A tenant whose access was not `free` before [`switch`] replaced the account.
#[derive(Debug, Clone)]
pub struct EndedAccess {
    pub tenant_id: Uuid,
    pub before: Shown,
    /// The previous value of `has_paid_access`, which stays `true` after `paid_access_until`.
    pub had_paid_access: bool,
}

/// A tenant's access before [`switch`].
type Before = (Uuid, String, Option<DateTime<Utc>>, bool);

/// Replaces the account, and deletes all customers and subscriptions from the database. Usage that has not been
/// reported will not be charged. Returns the tenants whose access was not `free` before.
pub async fn switch(
    tx: &mut SystemTx,
    account: &StripeAccount,
) -> Result<Vec<EndedAccess>, DbError> {
    let before: Vec<Before> = billing_accounts::table
        .order(billing_accounts::tenant_id)
        .select((
            billing_accounts::tenant_id,
            billing_accounts::access,
            billing_accounts::paid_access_until,
            billing_accounts::has_paid_access,
        ))
        .for_update()
        .load(&mut **tx)
        .await?;
    sql_query(
        "WITH account AS ( \
             INSERT INTO billing_stripe_account (account_id, livemode) VALUES ($1, $2) \
             ON CONFLICT ON CONSTRAINT billing_stripe_account_pkey \
             DO UPDATE SET account_id = $1, livemode = $2, recorded_at = now() \
         ), subscriptions AS ( \
             DELETE FROM billing_subscriptions \
         ), reports AS ( \
             UPDATE billing_reports SET state = 'unbilled', reason = 'no_subscription', due_at = NULL \
             WHERE state = 'pending' \
         ) \
         UPDATE billing_accounts SET customer_id = NULL, customer_attempt = customer_attempt + 1, \
             checkout_id = NULL, checkout_attempt = checkout_attempt + 1, access = 'free', has_paid_access = false, \
             paid_access_until = NULL, subscription_id = NULL, reads_begun = reads_begun + 1, \
             read_applied = reads_begun + 1, read_at = now()",
    )
    .bind::<Nullable<Text>, _>(&account.account_id)
    .bind::<Bool, _>(account.livemode)
    .execute(&mut **tx)
    .await?;
    let ended = before
        .into_iter()
        .filter(|(_, access, ..)| access != "free");
    Ok(ended
        .map(
            |(tenant_id, access, ends_at, had_paid_access)| EndedAccess {
                tenant_id,
                before: Shown { access, ends_at },
                had_paid_access,
            },
        )
        .collect())
}
