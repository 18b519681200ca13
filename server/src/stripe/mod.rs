//! The requests that Quota sends to Stripe, and the webhooks that it receives from Stripe.
//!
//! Requests are built by the `async-stripe` crates, which are pinned to one version of the Stripe API. Only the fields
//! in [`response`] are parsed, so that no other field can make parsing fail. There are no automatic retries: callers
//! know the consequences of a failed request, and choose the idempotency key of the next attempt.

mod envelope;
mod raw;
mod response;
mod signature;

use std::{collections::HashMap, time::Duration};

use secrecy::{ExposeSecret, SecretString};
use stripe::{IdempotencyKey, RequestStrategy, StripeError as ClientError, StripeRequest};
use stripe_billing::{
    billing_meter::{
        CreateBillingMeter, CreateBillingMeterDefaultAggregation,
        CreateBillingMeterDefaultAggregationFormula, ListBillingMeter,
    },
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
use stripe_misc::webhook_endpoint::{
    CreateWebhookEndpoint, CreateWebhookEndpointEnabledEvents, ListWebhookEndpoint,
};
use stripe_product::{
    price::{
        CreatePrice, CreatePriceRecurring, CreatePriceRecurringInterval,
        CreatePriceRecurringUsageType, ListPrice,
    },
    product::{CreateProduct, RetrieveProduct},
};

pub use self::{
    envelope::{Envelope, NotAnEvent},
    raw::MeterError,
    response::{
        CheckoutSession, Created, Invoice, Item, ItemPrice, Meter, Price, Recurring, Subscription,
        WebhookEndpoint,
    },
    signature::{BadSignature, TOLERANCE, verify},
};
use self::{
    raw::RawClient,
    response::{Customer, List},
};
use crate::{
    config::StripeSettings,
    spans::{self, SpanKind},
};

/// The maximum duration of a request. A request that timed out may have taken effect.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The metadata key under which Stripe objects store the ID of their tenant.
pub const TENANT: &str = "quota_tenant";

/// The API version of requests, and of webhook endpoints that Quota creates.
pub const API_VERSION: stripe_shared::ApiVersion = stripe_shared::version::VERSION;

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

#[derive(Debug, thiserror::Error)]
pub enum StripeError {
    /// The request may have taken effect. It can be sent again with the same idempotency key.
    #[error("Stripe could not be reached, or its response was lost: {0}")]
    Unknown(String),
    /// Stripe failed, and the request may have taken effect. The same idempotency key returns the same failure.
    #[error("Stripe returned status {status}: {message}")]
    Failed { status: u16, message: String },
    /// Stripe rejected the request. It had no effect.
    #[error("Stripe rejected the request with status {status}: {message}")]
    Rejected { status: u16, message: String },
    /// The object does not exist, or exists only in the other mode. The request had no effect.
    #[error("{message}")]
    Missing {
        /// The parameter that contains the object's ID. `None` if the ID is in the path.
        param: Option<String>,
        message: String,
    },
}

impl StripeError {
    /// Returns whether the object in the request's path or parameters does not exist.
    pub const fn is_not_found(&self) -> bool {
        matches!(
            self,
            Self::Rejected { status: 404, .. } | Self::Missing { .. }
        )
    }

    /// Returns whether the customer in a parameter cannot be used, because it was [deleted](Stripe::is_deleted) or
    /// belongs to a different mode or account.
    pub fn is_missing_customer(&self) -> bool {
        matches!(self, Self::Missing { param: Some(param), .. } if param == "customer")
    }
}

impl From<ClientError> for StripeError {
    fn from(error: ClientError) -> Self {
        let (error, status) = match error {
            ClientError::Stripe(error, status) => (error, status),
            // Includes responses that are not JSON, such as a proxy's error page. In that case, it is unknown whether
            // the request had an effect.
            other => return Self::Unknown(other.to_string()),
        };
        // Keep only the message, because the rest of the error may contain customer input.
        let message = error.message.unwrap_or_default();
        let is_missing = error.code == Some(stripe_shared::ApiErrorsCode::ResourceMissing);
        match status {
            400 | 404 if is_missing => Self::Missing {
                param: error.param,
                message,
            },
            409 | 429 => Self::Unknown(message),
            500.. => Self::Failed { status, message },
            _ => Self::Rejected { status, message },
        }
    }
}

type Result<T> = std::result::Result<T, StripeError>;

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
    /// The price per month.
    pub flat: &'a str,
    /// The price per unit of usage.
    pub usage: Option<&'a str>,
    pub success_url: &'a str,
    pub cancel_url: &'a str,
}

/// Sends a request and parses the response.
macro_rules! send {
    ($stripe:expr, $request:expr) => {
        traced($request.build().customize().send(&$stripe.client)).await?
    };
    ($stripe:expr, $request:expr, $key:expr) => {
        traced(
            $request
                .build()
                .customize()
                .request_strategy(idempotent($key))
                .send(&$stripe.client),
        )
        .await?
    };
}

/// Sends a request in a span, if a traced request is being served.
async fn traced<T>(
    request: impl Future<Output = std::result::Result<T, ClientError>>,
) -> std::result::Result<T, ClientError> {
    let span = spans::child("Stripe request", SpanKind::Client);
    let sent = request.await;
    if let (Some(mut span), Err(_)) = (span, &sent) {
        // The error may contain the customer's data.
        span.fail("");
    }
    sent
}

fn idempotent(key: &str) -> RequestStrategy {
    IdempotencyKey::new(key).map_or(RequestStrategy::Once, RequestStrategy::Idempotent)
}

/// Converts a count, which Stripe sends as a floating-point number.
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

    /// Returns up to 100 unpaid invoices of a subscription.
    pub async fn open_invoices(&self, subscription: &str) -> Result<Vec<Invoice>> {
        let request = ListInvoice::new()
            .subscription(subscription)
            .status(stripe_shared::InvoiceStatus::Open)
            .limit(100);
        let page: List<Invoice> = send!(self, request);
        Ok(page.data)
    }

    /// Returns the customer of the object that an event is about. Returns `None` if the object does not exist or if
    /// objects of its type have no customer.
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

    /// Returns whether one of the subscription's invoices is not final, so that usage in its billing period can still
    /// be charged.
    pub async fn has_draft_invoice(&self, subscription: &str) -> Result<bool> {
        let request = ListInvoice::new()
            .subscription(subscription)
            .status(stripe_shared::InvoiceStatus::Draft)
            .limit(1);
        let page: List<Invoice> = send!(self, request);
        Ok(!page.data.is_empty())
    }

    /// Reports a customer's usage at time `at`, in seconds since 1970. Stripe rejects further reports with the same
    /// identifier for a day.
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

    /// Returns a customer's total usage in Stripe. `from` and `until` must be whole hours.
    pub async fn counted(&self, meter: &str, customer: &str, from: i64, until: i64) -> Result<i64> {
        let request = ListIdBillingMeterEventSummary::new(meter, customer, until, from).limit(100);
        let page: List<response::Summary> = send!(self, request);
        let total: f64 = page.data.iter().map(|it| it.aggregated_value).sum();
        Ok(whole(total))
    }

    // Setup ---------------------------------------------------------------------------------------------

    /// Returns the active prices with these lookup keys.
    pub async fn prices(&self, lookup_keys: &[&str]) -> Result<Vec<Price>> {
        let keys: Vec<String> = lookup_keys.iter().map(|&key| key.to_owned()).collect();
        let request = ListPrice::new().active(true).lookup_keys(keys).limit(100);
        let page: List<Price> = send!(self, request);
        Ok(page.data)
    }

    pub async fn has_product(&self, id: &str) -> Result<bool> {
        let found: Result<Created> = async { Ok(send!(self, RetrieveProduct::new(id))) }.await;
        match found {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    pub async fn product_name(&self, id: &str) -> Result<String> {
        let product: response::Product = send!(self, RetrieveProduct::new(id));
        Ok(product.name)
    }

    pub async fn create_product(&self, id: &str, name: &str) -> Result<()> {
        let request = CreateProduct::new(name).id(id);
        let _: Created = send!(self, request);
        Ok(())
    }

    pub async fn meters(&self) -> Result<Vec<Meter>> {
        let page: List<Meter> = send!(self, ListBillingMeter::new().limit(100));
        Ok(page.data)
    }

    pub async fn create_meter(&self, event_name: &str, display_name: &str) -> Result<String> {
        let sum = CreateBillingMeterDefaultAggregation::new(
            CreateBillingMeterDefaultAggregationFormula::Sum,
        );
        let created: Created = send!(self, CreateBillingMeter::new(sum, display_name, event_name));
        Ok(created.id)
    }

    /// Creates a monthly price. `amount` is in the smallest unit of the currency, and may be fractional. With `meter`,
    /// the price applies to each unit of usage.
    pub async fn create_price(
        &self,
        product: &str,
        lookup_key: &str,
        currency: stripe_types::Currency,
        amount: &str,
        meter: Option<&str>,
    ) -> Result<String> {
        let mut recurring = CreatePriceRecurring::new(CreatePriceRecurringInterval::Month);
        if let Some(meter) = meter {
            recurring.meter = Some(meter.to_owned());
            recurring.usage_type = Some(CreatePriceRecurringUsageType::Metered);
        }
        let request = CreatePrice::new(currency)
            .product(product)
            .lookup_key(lookup_key)
            .unit_amount_decimal(amount)
            .recurring(recurring);
        let created: Created = send!(self, request);
        Ok(created.id)
    }

    pub async fn webhook_endpoints(&self) -> Result<Vec<WebhookEndpoint>> {
        let page: List<WebhookEndpoint> = send!(self, ListWebhookEndpoint::new().limit(100));
        Ok(page.data)
    }

    /// Creates a webhook endpoint for [`EVENTS`]. The result contains the endpoint's secret, which Stripe shows only
    /// once.
    pub async fn create_webhook_endpoint(&self, url: &str) -> Result<WebhookEndpoint> {
        let events = EVENTS.map(|name| {
            name.parse::<CreateWebhookEndpointEnabledEvents>()
                .unwrap_or_else(|_| CreateWebhookEndpointEnabledEvents::Unknown(name.to_owned()))
        });
        let request = CreateWebhookEndpoint::new(events.to_vec(), url)
            .api_version(API_VERSION)
            .description("Quota");
        Ok(send!(self, request))
    }
}
