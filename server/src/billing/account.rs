//! The Stripe account that this server bills through.
//!
//! Customers and subscriptions belong to one Stripe account, in either live or test mode. With a secret key of a
//! different account or mode, all customers and subscriptions would seem to be missing, and Stripe would accept new
//! customers, subscriptions, and usage. Therefore, the customers' account is stored, and compared with the secret key's
//! account before Stripe is used. If the accounts differ, nothing is read from Stripe, reported to it, or sold. Tenants
//! keep their last known access; events and usage wait until the correct key is configured.
//!
//! Earlier versions did not store the account. If no account is stored but there are customers, the secret key's
//! account is stored once at least one of the customers is found in it. While there are no customers, the account may
//! change.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use quota_common::audit::{AuditAction, AuditTarget};
use tokio::sync::OnceCell;

use super::{Billing, BillingError};
use crate::{
    db::SystemTx,
    repo::{
        audit::{self, NewAuditEvent},
        billing::Shown,
        invalidation::{self, Target},
        stripe_account::{self, StripeAccount},
    },
    stripe::StripeError,
};

/// The number of customers to look up. At least one of them must exist in the secret key's account.
const SAMPLE: i64 = 10;

/// Information about the secret key's account. Cloning is cheap.
#[derive(Debug, Clone, Default)]
pub(super) struct OwnAccount(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// The account's ID. `None` if the key does not have permission to read it.
    id: OnceCell<Option<String>>,
    has_customers: AtomicBool,
    is_other: AtomicBool,
}

/// The result of switching to the secret key's account. `account` is the account's name in messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Switch {
    /// `ended` is the number of tenants whose access was not `free` before the switch.
    Done { account: String, ended: usize },
    /// The customers already belong to this account, or there are no customers.
    AlreadyDone { account: String },
}

/// Returns the name of an account for use in messages.
fn named(account: &StripeAccount) -> String {
    let id = account.account_id.as_deref().unwrap_or("an account");
    let mode = if account.livemode { "live" } else { "test" };
    format!("{id} ({mode} mode)")
}

impl Billing {
    /// Returns whether, at the last comparison, the secret key belonged to a different account or mode than the
    /// customers.
    pub fn is_other_account(&self) -> bool {
        self.account.0.is_other.load(Ordering::Relaxed)
    }

    /// Returns a description of the secret key's account. Returns [`BillingError::OtherAccount`] if the customers
    /// belong to a different account or mode. Reads the account's ID from Stripe only once.
    pub async fn verify_account(&self) -> Result<String, BillingError> {
        let result = self.compare_account().await;
        let is_other = match &result {
            Ok(_) => false,
            Err(BillingError::OtherAccount(_)) => true,
            Err(_) => return result,
        };
        if self.account.0.is_other.swap(is_other, Ordering::Relaxed) != is_other {
            match &result {
                Ok(account) => {
                    tracing::info!(
                        account,
                        "the Stripe secret key belongs to the customers' account"
                    );
                }
                Err(error) => {
                    tracing::error!(%error, "billing has stopped, and tenants keep their access");
                }
            }
        }
        result
    }

    async fn own_account(&self) -> Result<StripeAccount, StripeError> {
        let id = self.account.0.id.get_or_try_init(|| self.stripe.account());
        Ok(StripeAccount {
            account_id: id.await?.clone(),
            livemode: self.is_live,
        })
    }

    async fn compare_account(&self) -> Result<String, BillingError> {
        let own = self.own_account().await?;
        let knows = &self.account.0.has_customers;
        let is_certain = own.account_id.is_some() || knows.load(Ordering::Relaxed);
        let is_own = |stored: &Option<StripeAccount>| stored.as_ref() == Some(&own) && is_certain;
        let compare = async |tx: &mut SystemTx| {
            let stored = stripe_account::find(tx).await?;
            let customers = if is_own(&stored) {
                Vec::new()
            } else {
                stripe_account::customers(tx, SAMPLE).await?
            };
            Ok((stored, customers))
        };
        let (stored, customers) = self.db.in_system(compare).await?;
        if is_own(&stored) {
            return Ok(named(&own));
        }
        if !customers.is_empty() {
            if let Some(stored) = &stored
                && !stored.matches(&own)
            {
                return Err(other_account(&own, stored));
            }
            if !knows.load(Ordering::Relaxed) && !self.knows_any(&customers).await? {
                return Err(BillingError::OtherAccount(format!(
                    "STRIPE_SECRET_KEY belongs to {}, which does not have this server's customers",
                    named(&own)
                )));
            }
            knows.store(true, Ordering::Relaxed);
        }
        let record = async |tx: &mut SystemTx| {
            stripe_account::record(tx, &own).await?;
            if customers.is_empty() {
                stripe_account::replace_unused(tx, &own).await?;
            }
            stripe_account::find(tx).await
        };
        match self.db.in_system(record).await? {
            // Another replica has stored its account first.
            Some(stored) if !stored.matches(&own) => Err(other_account(&own, &stored)),
            _ => Ok(named(&own)),
        }
    }

    /// Returns whether any of the [`SAMPLE`] most recently read customers exists in the secret key's account. Also
    /// returns `true` if no customers are stored.
    async fn has_own_customers(&self) -> Result<bool, BillingError> {
        let customers = async |tx: &mut SystemTx| stripe_account::customers(tx, SAMPLE).await;
        let customers = self.db.in_system(customers).await?;
        Ok(customers.is_empty() || self.knows_any(&customers).await?)
    }

    async fn knows_any(&self, customers: &[String]) -> Result<bool, StripeError> {
        for customer in customers {
            match self.stripe.is_deleted(customer).await {
                Ok(_) => return Ok(true),
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    /// Switches billing to the secret key's account and mode. Customers and subscriptions of the previous account are
    /// forgotten, so tenants have no access to paid plans until they subscribe again. Does nothing if the customers
    /// already belong to the secret key's account, or if no customers are stored.
    pub async fn switch_account(&self) -> Result<Switch, BillingError> {
        match self.verify_account().await {
            // If a sandbox's data was deleted, the account is still the same, but has none of the customers.
            Ok(account) if self.has_own_customers().await? => {
                return Ok(Switch::AlreadyDone { account });
            }
            Ok(_) | Err(BillingError::OtherAccount(_)) => {}
            Err(error) => return Err(error),
        }
        let own = self.own_account().await?;
        let mut tx = self.db.system().await?;
        let ended = stripe_account::switch(&mut tx, &own).await?;
        let after = Shown {
            access: "free".to_owned(),
            ends_at: None,
        };
        for tenant in &ended {
            let event = NewAuditEvent {
                target_id: None,
                before: Some(tenant.before.to_json()),
                after: Some(after.to_json()),
                ..NewAuditEvent::new(
                    tenant.tenant_id,
                    AuditAction::SubscriptionUpdate,
                    AuditTarget::Subscription,
                    &"",
                )
            };
            audit::insert_system(&mut tx, &event).await?;
        }
        // Insert the invalidations last, because the inserts wait for other transactions that insert invalidations.
        // Replicas find the new rows by polling.
        for tenant in ended.iter().filter(|it| it.had_paid_access) {
            invalidation::insert_system(&mut tx, tenant.tenant_id, Target::Tenant).await?;
        }
        tx.commit().await?;
        Ok(Switch::Done {
            account: named(&own),
            ended: ended.len(),
        })
    }
}

fn other_account(own: &StripeAccount, stored: &StripeAccount) -> BillingError {
    BillingError::OtherAccount(format!(
        "STRIPE_SECRET_KEY belongs to {}, but this server's customers belong to {}",
        named(own),
        named(stored)
    ))
}
