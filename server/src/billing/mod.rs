//! Tenants' subscriptions: what access to paid plans they give, and how tenants pay.
//!
//! Stripe is the source of truth. Of a customer's subscriptions, the database contains only the result of the last
//! read. Webhooks and timers only cause reads ([`events`], [`Billing::read`]). Reads are numbered before they start. A
//! read that started before the last applied one is discarded, so the result does not depend on the order in which
//! events arrive or reads complete. [`subscription`] defines what access a tenant's subscriptions give.
//!
//! If Stripe is unreachable, or the secret key belongs to [another account](account), tenants keep their last known
//! access, but no tenant can subscribe.

pub mod account;
pub mod events;
pub mod price;
pub mod setup;
pub mod usage;

use chrono::{DateTime, Utc};
use quota_common::{
    TenantId, Timestamp,
    audit::{AuditAction, AuditTarget},
};
use serde_json::{Value, json};

use self::{
    account::OwnAccount,
    price::{Offer, Prices},
};
use crate::{
    config::StripeSettings,
    db::{Db, DbError, SystemTx},
    repo::{
        audit::{self, NewAuditEvent},
        billing::{self, AccountRow, Applied, AppliedRead, Shown, SubscriptionRow},
        invalidation::{self, Invalidation, Target},
    },
    stripe::{Checkout, CheckoutSession, Stripe, StripeError},
    subscription::{self, Paid, Status},
};

/// The lookup key of the monthly price.
pub const FLAT_PRICE: &str = "quota_monthly";
/// The lookup key of the price per unit of usage. This price is optional.
pub const USAGE_PRICE: &str = "quota_usage";

#[derive(Debug, thiserror::Error)]
pub enum BillingError {
    #[error(transparent)]
    Stripe(#[from] StripeError),
    #[error(transparent)]
    Db(#[from] DbError),
    /// The tenant already has a subscription, which must be changed or canceled first.
    #[error("the tenant already has a subscription")]
    Subscribed,
    /// The tenant has no Stripe customer.
    #[error("the tenant has never subscribed")]
    NoCustomer,
    /// Stripe has no active price with the lookup key [`FLAT_PRICE`].
    #[error(
        "Stripe has no active price with the lookup key {FLAT_PRICE}; run `quota billing setup`"
    )]
    NoPrice,
    /// Stripe returned a status that is unknown to this version. The last known access remains in effect.
    #[error("Stripe returned an unknown subscription status: {0:?}")]
    UnknownStatus(String),
    /// The secret key belongs to a different account or mode than the customers.
    #[error("{0}")]
    OtherAccount(String),
    /// Stripe has no record of the customer, not even as deleted. The tenant's access is kept.
    #[error("Stripe has no record of the customer {0}, so the tenant's access does not change")]
    UnknownCustomer(String),
    #[error("Stripe returned a Checkout Session without a URL")]
    NoPage,
    /// Stripe has no active price with the lookup key [`USAGE_PRICE`] and a meter.
    #[error(
        "Stripe has no metered price with the lookup key {USAGE_PRICE}; run `quota billing setup`"
    )]
    NoMeter,
}

/// Billing for one installation. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Billing {
    stripe: Stripe,
    db: Db,
    grace: i64,
    is_live: bool,
    account: OwnAccount,
    prices: Prices,
}

/// A tenant that wants to subscribe, and the pages to which Stripe returns the user.
#[derive(Debug, Clone, Copy)]
pub struct Buyer<'a> {
    pub tenant: TenantId,
    /// Used only when the customer is created.
    pub email: &'a str,
    pub name: &'a str,
    pub success_url: &'a str,
    pub cancel_url: &'a str,
}

fn time(seconds: i64) -> Option<DateTime<Utc>> {
    DateTime::from_timestamp(seconds, 0)
}

impl Shown {
    fn to_json(&self) -> Value {
        let ends_at = self.ends_at.map(|it| Timestamp::from(it).to_string());
        json!({"access": self.access, "access_ends_at": ends_at})
    }
}

impl Billing {
    /// Creates the service.
    ///
    /// # Errors
    ///
    /// Returns an error if a request cannot be built from the settings.
    pub fn new(settings: &StripeSettings, db: Db) -> Result<Self, StripeError> {
        Ok(Self {
            stripe: Stripe::new(settings)?,
            db,
            grace: i64::try_from(settings.grace.as_secs()).unwrap_or(i64::MAX),
            is_live: settings.is_live(),
            account: OwnAccount::default(),
            prices: Prices::default(),
        })
    }

    /// Reads the tenant's subscriptions from Stripe, and stores the resulting access. If access to paid plans has
    /// changed, returns the invalidation to publish. Does nothing for a tenant without a customer.
    pub async fn read(&self, tenant: TenantId) -> Result<Option<Invalidation>, BillingError> {
        self.verify_account().await?;
        let begun = self
            .db
            .in_system(async |tx| billing::begin_read(tx, tenant).await)
            .await?;
        let Some(begun) = begun else {
            return Ok(None);
        };
        let mut observed = Vec::new();
        let mut rows = Vec::new();
        let subscriptions = match self.stripe.subscriptions(&begun.customer_id).await {
            // A deleted customer cannot be charged. The next Checkout creates a new customer.
            Err(error) if error.is_missing_customer() => {
                self.expect_deleted(&begun.customer_id).await?;
                tracing::warn!(
                    %tenant, customer = begun.customer_id,
                    "the customer was deleted in Stripe, so the tenant has no subscription"
                );
                Vec::new()
            }
            subscriptions => subscriptions?,
        };
        for found in subscriptions {
            let status = Status::named(&found.status)
                .ok_or_else(|| BillingError::UnknownStatus(found.status.clone()))?;
            let unpaid_since = if status == Status::PastDue {
                let open = self.stripe.open_invoices(&found.id).await?;
                let since = open
                    .iter()
                    .map(|it| it.status_transitions.finalized_at.unwrap_or(it.created));
                since.min()
            } else {
                None
            };
            let starts = found.items.data.iter().map(|it| it.current_period_start);
            let ends = found.items.data.iter().map(|it| it.current_period_end);
            let (period_start, period_end) = (starts.min(), ends.min());
            // Older API versions omit `cancel_at`.
            let at_period_end = period_end.filter(|_| found.cancel_at_period_end);
            let cancel_at = found.cancel_at.or(at_period_end);
            let price = Offer::of_items(&found.items.data);
            let product_name = match Offer::product(&found.items.data) {
                Some(product) => self.product_name(product).await,
                None => None,
            };
            rows.push(SubscriptionRow {
                tenant_id: tenant.0,
                id: found.id.clone(),
                status: found.status,
                started_at: time(found.created).unwrap_or_default(),
                trial_ends_at: found.trial_end.and_then(time),
                cancels_at: cancel_at.and_then(time),
                unpaid_since: unpaid_since.and_then(time),
                period_start: period_start.and_then(time),
                period_end: period_end.and_then(time),
                ended_at: found.ended_at.and_then(time),
                is_metered: found.items.data.iter().any(|item| {
                    let recurring = item.price.recurring.as_ref();
                    recurring.is_some_and(|it| it.meter.is_some())
                }),
                product_name,
                currency: Some(price.currency).filter(|it| !it.is_empty()),
                monthly_price: price.monthly,
                usage_price: price.per_unit,
            });
            observed.push(subscription::Subscription {
                id: found.id,
                status,
                created: found.created,
                trial_end: found.trial_end,
                cancel_at,
                unpaid_since,
            });
        }
        let at = begun.at.timestamp();
        let deciding = subscription::deciding(&observed, at, self.grace);
        let access = deciding.map_or(subscription::Access::Free, |it| it.access(at, self.grace));
        let paid = access.paid();
        let applied = AppliedRead {
            number: begun.number,
            at: begun.at,
            access: access.name(),
            has_paid_access: paid != Paid::Never,
            paid_access_until: match paid {
                Paid::Until(end) => time(end),
                Paid::Never | Paid::Always => None,
            },
            subscription_id: deciding.map(|it| it.id.as_str()),
            subscriptions: &rows,
        };
        let apply = async |tx: &mut SystemTx| apply_read(tx, tenant, &applied).await;
        let invalidation = self.db.in_system(apply).await?;
        if invalidation.is_some() {
            tracing::info!(%tenant, access = access.name(), "paid access changed");
        }
        Ok(invalidation)
    }

    /// Returns an error unless Stripe confirms that the customer was deleted. If Stripe does not know the customer, the
    /// tenant must keep its access: for example, someone may have deleted the test data in Stripe.
    async fn expect_deleted(&self, customer: &str) -> Result<(), BillingError> {
        let unknown = || BillingError::UnknownCustomer(customer.to_owned());
        match self.stripe.is_deleted(customer).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(unknown()),
            Err(error) if error.is_not_found() => Err(unknown()),
            Err(error) => Err(error.into()),
        }
    }

    /// Returns the ID of the tenant's Stripe customer, and creates a customer if there is none. Only one customer is
    /// created, even if this function fails repeatedly and at any point.
    async fn customer(&self, buyer: &Buyer<'_>) -> Result<String, BillingError> {
        let tenant = buyer.tenant;
        let request = async |tx: &mut SystemTx| {
            let account = billing::open(tx, tenant, buyer.email, buyer.name).await?;
            if account.customer_id.is_none() {
                billing::request_customer(tx, tenant).await?;
            }
            Ok(account)
        };
        let account = self.db.in_system(request).await?;
        if let Some(customer) = account.customer_id {
            return Ok(customer);
        }
        let id = tenant.to_string();
        let email = account.customer_email.as_str();
        // An earlier request whose response was lost may have created the customer. If that was long ago, Stripe no
        // longer recognizes the idempotency key.
        let found = if account.customer_requested {
            self.stripe.find_customer(&id, email).await?
        } else {
            None
        };
        let customer = match found {
            Some(customer) => customer,
            None => {
                let attempt = account.customer_attempt;
                let key = format!("quota-customer-{id}-{attempt}");
                let name = account.customer_name.as_str();
                let created = self.stripe.create_customer(&id, email, name, &key).await;
                if let Err(StripeError::Failed { .. }) = &created {
                    // For a day, every request with the same idempotency key would fail, so the next attempt uses
                    // another key. That attempt searches for a customer first.
                    self.db
                        .in_system(async |tx| {
                            billing::next_customer_attempt(tx, tenant, attempt).await
                        })
                        .await?;
                }
                created?
            }
        };
        let recorded = self
            .db
            .in_system(async |tx| billing::set_customer(tx, tenant, &customer).await)
            .await?;
        Ok(recorded)
    }

    /// Returns a Checkout Session for a tenant without a subscription. Returns the same session while it is open, so
    /// that a tenant cannot pay twice. If the tenant's customer was deleted, creates a new one. If the tenant's access
    /// to paid plans turns out to have changed, also returns the invalidation to publish.
    pub async fn checkout(
        &self,
        buyer: &Buyer<'_>,
    ) -> Result<(CheckoutSession, Option<Invalidation>), BillingError> {
        self.verify_account().await?;
        let tenant = buyer.tenant;
        let customer = self.customer(buyer).await?;
        match self.start_checkout(buyer, &customer).await {
            Err(BillingError::Stripe(error)) if error.is_missing_customer() => {
                self.expect_deleted(&customer).await?;
                // Does nothing if another replica has already replaced the customer.
                let is_forgotten = self
                    .db
                    .in_system(async |tx| billing::forget_customer(tx, tenant, &customer).await)
                    .await?;
                if is_forgotten {
                    tracing::warn!(%tenant, "creating another Stripe customer");
                }
                let customer = self.customer(buyer).await?;
                self.start_checkout(buyer, &customer).await
            }
            started => started,
        }
    }

    async fn start_checkout(
        &self,
        buyer: &Buyer<'_>,
        customer: &str,
    ) -> Result<(CheckoutSession, Option<Invalidation>), BillingError> {
        let tenant = buyer.tenant;
        let invalidation = self.read(tenant).await?;
        let account = self.account(buyer).await?;
        let is_subscribed = self
            .stripe_statuses(tenant)
            .await?
            .into_iter()
            .any(|status| !matches!(status, Status::Incomplete) && !status.is_final());
        if is_subscribed {
            return Err(BillingError::Subscribed);
        }
        let mut attempt = account.checkout_attempt;
        if let Some(session) = &account.checkout_id {
            let session = self.stripe.checkout(session).await?;
            if session.status.as_deref() == Some("open") && session.url.is_some() {
                return Ok((session, invalidation));
            }
            if session.status.as_deref() == Some("complete") {
                self.expect_no_pending_subscription(tenant).await?;
            }
            attempt = self.end_checkout(tenant, attempt).await?;
        }
        let prices = self.stripe.prices(&[FLAT_PRICE, USAGE_PRICE]).await?;
        let price = |key: &str| {
            let found = prices
                .iter()
                .find(|it| it.lookup_key.as_deref() == Some(key));
            found.map(|it| it.id.as_str())
        };
        let checkout = Checkout {
            tenant: &tenant.to_string(),
            customer,
            flat: price(FLAT_PRICE).ok_or(BillingError::NoPrice)?,
            usage: price(USAGE_PRICE),
            success_url: buyer.success_url,
            cancel_url: buyer.cancel_url,
        };
        // The idempotency key contains the customer, because a Checkout Session for another customer is a different
        // request.
        let key = format!("quota-checkout-{tenant}-{attempt}-{customer}");
        let created = self.stripe.create_checkout(&checkout, &key).await;
        if let Err(StripeError::Failed { .. } | StripeError::Rejected { .. }) = &created {
            // Another request with the same idempotency key would get the same error. If a session was created after
            // all, no user has seen its page.
            self.end_checkout(tenant, attempt).await?;
        }
        let session = created?;
        if session.url.is_none() {
            return Err(BillingError::NoPage);
        }
        self.db
            .in_system(async |tx| billing::set_checkout(tx, tenant, attempt, &session.id).await)
            .await?;
        Ok((session, invalidation))
    }

    /// Reads the tenant's subscriptions, and returns an error if a completed Checkout Session has created a
    /// subscription. The session may have been completed since the last read, or the subscription may be `incomplete`
    /// because a delayed payment has not arrived yet.
    async fn expect_no_pending_subscription(&self, tenant: TenantId) -> Result<(), BillingError> {
        self.read(tenant).await?;
        let statuses = self.stripe_statuses(tenant).await?;
        if statuses.into_iter().all(Status::is_final) {
            Ok(())
        } else {
            Err(BillingError::Subscribed)
        }
    }

    async fn account(&self, buyer: &Buyer<'_>) -> Result<AccountRow, DbError> {
        let account = self
            .db
            .in_system(async |tx| billing::open(tx, buyer.tenant, buyer.email, buyer.name).await)
            .await?;
        Ok(account)
    }

    async fn end_checkout(&self, tenant: TenantId, attempt: i32) -> Result<i32, DbError> {
        let next = self
            .db
            .in_system(async |tx| billing::next_checkout_attempt(tx, tenant, attempt).await)
            .await?;
        Ok(next)
    }

    /// Returns the statuses of the tenant's subscriptions as of the last read.
    async fn stripe_statuses(&self, tenant: TenantId) -> Result<Vec<Status>, DbError> {
        let statuses = self
            .db
            .in_system(async |tx| billing::statuses(tx, tenant).await)
            .await?;
        Ok(statuses.iter().filter_map(|it| Status::named(it)).collect())
    }

    /// Returns the URL of the customer portal, where the tenant can change its payment method, cancel its subscription,
    /// and find its invoices.
    pub async fn portal(&self, tenant: TenantId, return_url: &str) -> Result<String, BillingError> {
        self.verify_account().await?;
        let customer = self
            .db
            .in_system(async |tx| billing::customer_of(tx, tenant).await)
            .await?;
        let customer = customer.ok_or(BillingError::NoCustomer)?;
        match self.stripe.create_portal(&customer, return_url).await {
            Err(error) if error.is_missing_customer() => {
                self.expect_deleted(&customer).await?;
                Err(BillingError::NoCustomer)
            }
            url => Ok(url?),
        }
    }
}

/// Stores the access that results from a read. Returns the invalidation to publish if access to paid plans has changed.
async fn apply_read(
    tx: &mut SystemTx,
    tenant: TenantId,
    applied: &AppliedRead<'_>,
) -> Result<Option<Invalidation>, DbError> {
    let (changed, audited) = billing::apply_read(tx, tenant, applied).await?;
    if let Some(before) = audited {
        let after = Shown {
            access: applied.access.to_owned(),
            ends_at: applied.paid_access_until,
        };
        let event = NewAuditEvent {
            target_id: applied.subscription_id.map(str::to_owned),
            before: Some(before.to_json()),
            after: Some(after.to_json()),
            ..NewAuditEvent::new(
                tenant.0,
                AuditAction::SubscriptionUpdate,
                AuditTarget::Subscription,
                &"",
            )
        };
        audit::insert_system(tx, &event).await?;
    }
    // Insert the invalidation last, because the insert waits for other transactions that insert invalidations.
    Ok(match changed {
        Applied::PaidAccess => {
            Some(invalidation::insert_system(tx, tenant.0, Target::Tenant).await?)
        }
        Applied::Same | Applied::Outdated => None,
    })
}
