//! The requests that Quota sends to Stripe, and the webhooks that it receives from Stripe.
//!
//! Requests are built by the `async-stripe` crates, which are pinned to one version of the Stripe API. Only the fields
//! in [`response`] are parsed, so that no other field can make parsing fail. There are no automatic retries: callers
//! know the consequences of a failed request, and choose the idempotency key of the next attempt.

mod envelope;
mod error;
mod raw;
mod request;
mod response;
mod setup;
mod signature;

use std::collections::HashMap;

use secrecy::{ExposeSecret, SecretString};
use stripe::StripeRequest;
use stripe_billing::{
    billing_meter_event::CreateBillingMeterEvent,
    billing_meter_event_summary::ListIdBillingMeterEventSummary,
    billing_portal_session::CreateBillingPortalSession,
    invoice::ListInvoice,
    subscription::{ListSubscription, ListSubscriptionStatus, RetrieveSubscription},
};
use stripe_checkout::checkout_session::{
    CreateCheckoutSession, CreateCheckoutSessionLineItems, CreateCheckoutSessionSubscriptionData,
    RetrieveCheckoutSession,
};
use stripe_core::customer::{CreateCustomer, ListCustomer, RetrieveCustomer};

pub use self::{
    envelope::{Envelope, NotAnEvent},
    error::StripeError,
    raw::MeterError,
    request::API_VERSION,
    response::{
        CheckoutSession, Created, Invoice, Item, ItemPrice, Meter, Price, Recurring, Subscription,
        WebhookEndpoint,
    },
    signature::{BadSignature, TOLERANCE, verify},
};
use self::{
    error::Result,
    raw::RawClient,
    request::{TIMEOUT, send},
    response::{Customer, List},
};
use crate::config::StripeSettings;

/// The metadata key under which Stripe objects store the ID of their tenant.
pub const TENANT: &str = "quota_tenant";

/// The events that Quota's webhook endpoint in Stripe must be subscribed to.
pub const EVENTS: [&str; 14] = [
    "checkout.session.completed",
    "checkout.session.async_payment_succeeded",
    "checkout.session.async_payment_failed",
    "checkout.session.expired",
    "customer.subscription.created",
    "customer.subscription.updated",
    "customer.subscription.deleted",
    "customer.subscription.paused",
    "customer.subscription.resumed",
    "customer.subscription.trial_will_end",
    "invoice.paid",
    "invoice.payment_failed",
    "invoice.payment_action_required",
    "invoice.finalization_failed",
];

/// Thin events about usage that Stripe has accepted but cannot charge. Stripe sends them to an event destination, not
/// to a webhook endpoint.
pub const METER_EVENTS: [&str; 2] = [
    "v1.billing.meter.error_report_triggered",
    "v1.billing.meter.no_meter_found",
];

/// A client for one Stripe account. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Stripe {
    client: stripe::Client,
    raw: RawClient,
}

/// The contents of a Checkout Session.
#[derive(Debug, Clone, Copy)]
pub struct Checkout<'a> {
    pub tenant: &'a str,
    pub customer: &'a str,
    /// The ID of the flat monthly price.
    pub flat: &'a str,
    /// The ID of the price per unit of usage.
    pub usage: Option<&'a str>,
    pub success_url: &'a str,
    pub cancel_url: &'a str,
}

/// Converts a count, which Stripe sends as a floating-point number, to an integer.
#[expect(
    clippy::cast_possible_truncation,
    reason = "counts stay far below 2^53, up to which they are exact"
)]
fn whole(count: f64) -> i64 {
    count.round() as i64
}

fn tenant_metadata(tenant: &str) -> HashMap<String, String> {
    [(TENANT.to_owned(), tenant.to_owned())].into()
}

impl Stripe {
    /// Creates a client.
    ///
    /// # Errors
    ///
    /// Fails if the secret key or the base URL cannot be used in a request.
    pub fn new(settings: &StripeSettings) -> Result<Self> {
        let key: &SecretString = &settings.secret_key;
        let mut client = stripe::ClientBuilder::new(key.expose_secret()).timeout(TIMEOUT);
        if let Some(base) = &settings.api_base {
            client = client.url(format!("{}/", base.trim_end_matches('/')));
        }
        let client = client.build()?;
        let raw = RawClient::new(key, settings.api_base.as_deref())?;
        Ok(Self { client, raw })
    }

    /// Returns the problems reported by an event whose type is in [`METER_EVENTS`].
    pub async fn meter_errors(&self, event: &str) -> Result<Vec<MeterError>> {
        self.raw.meter_errors(event).await
    }

    /// Returns the account's ID, or `None` if the secret key does not have permission to read it.
    pub async fn account(&self) -> Result<Option<String>> {
        self.raw.account().await
    }

    /// Returns whether a customer was deleted. Fails if the customer never existed in the secret key's account and
    /// mode.
    pub async fn is_deleted(&self, customer: &str) -> Result<bool> {
        let found: response::Deleted = send!(self, RetrieveCustomer::new(customer));
        Ok(found.deleted == Some(true))
    }

    pub async fn create_customer(
        &self,
        tenant: &str,
        email: &str,
        name: &str,
        key: &str,
    ) -> Result<String> {
        let request = CreateCustomer::new()
            .email(email)
            .name(name)
            .metadata(tenant_metadata(tenant));
        let created: Created = send!(self, request, key);
        Ok(created.id)
    }

    /// Searches the customers with this email address for the tenant's customer.
    pub async fn find_customer(&self, tenant: &str, email: &str) -> Result<Option<String>> {
        let mut after: Option<String> = None;
        loop {
            let mut request = ListCustomer::new().email(email).limit(100);
            if let Some(after) = after {
                request = request.starting_after(after);
            }
            let page: List<Customer> = send!(self, request);
            let is_own = |it: &&Customer| {
                let metadata = it.metadata.as_ref();
                metadata.is_some_and(|it| it.get(TENANT).is_some_and(|owner| owner == tenant))
            };
            if let Some(found) = page.data.iter().find(is_own) {
                return Ok(Some(found.id.clone()));
            }
            match page.data.last() {
                Some(last) if page.has_more => after = Some(last.id.clone()),
                _ => return Ok(None),
            }
        }
    }

    /// Returns all subscriptions of a customer, including those that have ended.
    pub async fn subscriptions(&self, customer: &str) -> Result<Vec<Subscription>> {
        let mut all: Vec<Subscription> = Vec::new();
        loop {
            let mut request = ListSubscription::new()
                .customer(customer)
                .status(ListSubscriptionStatus::All)
                .limit(100);
            if let Some(last) = all.last() {
                request = request.starting_after(last.id.clone());
            }
            let page: List<Subscription> = send!(self, request);
            let is_last = !page.has_more || page.data.is_empty();
            all.extend(page.data);
            if is_last {
                return Ok(all);
            }
        }
    }

    /// Returns up to 100 unpaid invoices for a subscription.
    pub async fn open_invoices(&self, subscription: &str) -> Result<Vec<Invoice>> {
        let request = ListInvoice::new()
            .subscription(subscription)
            .status(stripe_shared::InvoiceStatus::Open)
            .limit(100);
        let page: List<Invoice> = send!(self, request);
        Ok(page.data)
    }

    /// Returns the customer of the object that an event is about. Returns `None` if the object does not exist, has no
    /// customer, or is not a subscription, Checkout Session, or invoice.
    pub async fn customer_of(&self, object: &str) -> Result<Option<String>> {
        let found: Result<response::Owned> = async {
            Ok(match object.split('_').next() {
                Some("sub") => send!(self, RetrieveSubscription::new(object)),
                Some("cs") => send!(self, RetrieveCheckoutSession::new(object)),
                Some("in") => {
                    send!(self, stripe_billing::invoice::RetrieveInvoice::new(object))
                }
                _ => response::Owned { customer: None },
            })
        }
        .await;
        match found {
            Ok(owned) => Ok(owned.customer),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub async fn create_checkout(
        &self,
        checkout: &Checkout<'_>,
        key: &str,
    ) -> Result<CheckoutSession> {
        let line = |price: &str, quantity| CreateCheckoutSessionLineItems {
            price: Some(price.to_owned()),
            quantity,
            ..CreateCheckoutSessionLineItems::new()
        };
        // Stripe rejects a quantity for a metered price.
        let usage = checkout.usage.map(|price| line(price, None));
        let lines: Vec<_> = [line(checkout.flat, Some(1))]
            .into_iter()
            .chain(usage)
            .collect();
        let request = CreateCheckoutSession::new()
            .mode(stripe_shared::CheckoutSessionMode::Subscription)
            .line_items(lines)
            .customer(checkout.customer)
            .client_reference_id(checkout.tenant)
            .metadata(tenant_metadata(checkout.tenant))
            // Stripe does not copy a session's metadata to its subscription.
            .subscription_data(CreateCheckoutSessionSubscriptionData {
                metadata: Some(tenant_metadata(checkout.tenant)),
                ..CreateCheckoutSessionSubscriptionData::new()
            })
            .success_url(checkout.success_url)
            .cancel_url(checkout.cancel_url);
        Ok(send!(self, request, key))
    }

    pub async fn checkout(&self, session: &str) -> Result<CheckoutSession> {
        Ok(send!(self, RetrieveCheckoutSession::new(session)))
    }

    /// Returns the URL of a new session of the customer portal.
    pub async fn create_portal(&self, customer: &str, return_url: &str) -> Result<String> {
        let request = CreateBillingPortalSession::new()
            .customer(customer)
            .return_url(return_url);
        let session: response::PortalSession = send!(self, request);
        Ok(session.url)
    }

    /// Returns whether the subscription has a draft invoice. If so, usage in the invoice's billing period can still be
    /// charged.
    pub async fn has_draft_invoice(&self, subscription: &str) -> Result<bool> {
        let request = ListInvoice::new()
            .subscription(subscription)
            .status(stripe_shared::InvoiceStatus::Draft)
            .limit(1);
        let page: List<Invoice> = send!(self, request);
        Ok(!page.data.is_empty())
    }

    /// Reports a customer's usage at time `at`, in seconds since the Unix epoch. Stripe rejects further reports with
    /// the same identifier for a day.
    pub async fn use_meter(
        &self,
        event_name: &str,
        customer: &str,
        value: i64,
        identifier: &str,
        at: i64,
    ) -> Result<()> {
        let payload = [
            ("stripe_customer_id".to_owned(), customer.to_owned()),
            ("value".to_owned(), value.to_string()),
        ];
        let request = CreateBillingMeterEvent::new(event_name, HashMap::from(payload))
            .identifier(identifier)
            .timestamp(at);
        let _: response::MeterEvent = send!(self, request);
        Ok(())
    }

    /// Returns a customer's total usage in Stripe. `from` and `until` must be Unix timestamps of full hours.
    pub async fn counted(&self, meter: &str, customer: &str, from: i64, until: i64) -> Result<i64> {
        let request = ListIdBillingMeterEventSummary::new(meter, customer, until, from).limit(100);
        let page: List<response::Summary> = send!(self, request);
        let total: f64 = page.data.iter().map(|it| it.aggregated_value).sum();
        Ok(whole(total))
    }
}
