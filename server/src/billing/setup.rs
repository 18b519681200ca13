//! Sets up the objects that Quota needs in Stripe: a product, its prices, a meter, and a webhook endpoint.
//!
//! Each object has a fixed ID, lookup key, event name, or URL, so it is created only once. Existing objects are not
//! changed: Stripe does not allow changing a price, and an operator may have changed the other objects on purpose.

use super::{FLAT_PRICE, USAGE_PRICE};
use crate::stripe::{API_VERSION, EVENTS, Price, Stripe, StripeError, WebhookEndpoint};

/// The product's ID.
const PRODUCT: &str = "quota";
/// The name of the meter events that report usage.
pub const METER_EVENT: &str = "quota_requests";

/// The prices of subscriptions. Amounts are in the smallest unit of the currency, such as cents, and may be fractional.
#[derive(Debug, Clone)]
pub struct Offer {
    pub product_name: String,
    pub currency: stripe_types::Currency,
    /// The price per month.
    pub price: String,
    /// The price per unit of usage (a request with a cost of 1), in addition to the monthly price.
    pub usage_price: Option<String>,
}

/// The state of an object, after setup or a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub name: &'static str,
    pub text: String,
    pub is_ok: bool,
}

impl Finding {
    fn ok(name: &'static str, text: impl Into<String>) -> Self {
        let (text, is_ok) = (text.into(), true);
        Self { name, text, is_ok }
    }

    fn failed(name: &'static str, text: impl Into<String>) -> Self {
        let (text, is_ok) = (text.into(), false);
        Self { name, text, is_ok }
    }
}

/// Returns the URL that Stripe must send webhooks to.
pub fn webhook_url(public_url: &str) -> String {
    format!("{public_url}/billing/stripe/webhook")
}

/// Creates the objects that do not exist. Skips the meter and the usage price if `offer` has no usage price. Returns a
/// finding for each object. Also returns the webhook endpoint's secret if this call created the endpoint.
pub async fn set_up(
    stripe: &Stripe,
    offer: &Offer,
    webhook_url: &str,
) -> Result<(Vec<Finding>, Option<String>), StripeError> {
    let mut findings = Vec::new();
    let mut note = |name, id: &str, is_new: bool| {
        let state = if is_new { "created" } else { "exists" };
        findings.push(Finding::ok(name, format!("{id} ({state})")));
    };
    let has_product = stripe.has_product(PRODUCT).await?;
    if !has_product {
        stripe.create_product(PRODUCT, &offer.product_name).await?;
    }
    note("product", PRODUCT, !has_product);

    let prices = stripe.prices(&[FLAT_PRICE, USAGE_PRICE]).await?;
    match find_price(&prices, FLAT_PRICE) {
        Some(price) => note("monthly price", &price.id, false),
        None => {
            let currency = offer.currency.clone();
            let created = stripe
                .create_price(PRODUCT, FLAT_PRICE, currency, &offer.price, None)
                .await?;
            note("monthly price", &created, true);
        }
    }
    if let Some(amount) = &offer.usage_price {
        let meters = stripe.meters().await?;
        let is_own =
            |it: &&crate::stripe::Meter| it.event_name == METER_EVENT && it.status == "active";
        let meter = match meters.iter().find(is_own) {
            Some(meter) => {
                note("meter", &meter.id, false);
                meter.id.clone()
            }
            None => {
                let created = stripe.create_meter(METER_EVENT, "Requests").await?;
                note("meter", &created, true);
                created
            }
        };
        match find_price(&prices, USAGE_PRICE) {
            Some(price) => note("usage price", &price.id, false),
            None => {
                let currency = offer.currency.clone();
                let created = stripe
                    .create_price(PRODUCT, USAGE_PRICE, currency, amount, Some(&meter))
                    .await?;
                note("usage price", &created, true);
            }
        }
    }
    let endpoints = stripe.webhook_endpoints().await?;
    let secret = match endpoints.iter().find(|it| it.url == webhook_url) {
        Some(endpoint) => {
            note("webhook endpoint", &endpoint.id, false);
            None
        }
        None => {
            let created = stripe.create_webhook_endpoint(webhook_url).await?;
            note("webhook endpoint", &created.id, true);
            created.secret
        }
    };
    Ok((findings, secret))
}

fn find_price<'a>(prices: &'a [Price], lookup_key: &str) -> Option<&'a Price> {
    let has_key = |it: &&Price| it.lookup_key.as_deref() == Some(lookup_key);
    prices.iter().find(has_key)
}

/// Describes the result of comparing the secret key's account with the customers' account.
pub fn account_finding<E: std::fmt::Display>(account: Result<String, E>) -> Finding {
    match account {
        Ok(account) => Finding::ok("account", account),
        Err(error) => Finding::failed("account", format!("{error:#}")),
    }
}

/// Checks the prices, the meter, and the webhook endpoint, and whether a webhook secret is set.
pub async fn check(
    stripe: &Stripe,
    webhook_url: &str,
    has_webhook_secret: bool,
) -> Result<Vec<Finding>, StripeError> {
    let prices = stripe.prices(&[FLAT_PRICE, USAGE_PRICE]).await?;
    let mut findings = vec![match find_price(&prices, FLAT_PRICE) {
        Some(price) => monthly(price),
        None => Finding::failed(
            "monthly price",
            format!(
                "Stripe has no active price with the lookup key {FLAT_PRICE}; run `quota billing setup`"
            ),
        ),
    }];
    match find_price(&prices, USAGE_PRICE) {
        Some(price) => findings.push(metered(stripe, price).await?),
        None => findings.push(Finding::ok(
            "usage price",
            "not set up, so usage is not charged",
        )),
    }
    let endpoints = stripe.webhook_endpoints().await?;
    findings.push(match endpoints.iter().find(|it| it.url == webhook_url) {
        Some(endpoint) => endpoint_finding(endpoint),
        None => Finding::failed(
            "webhook endpoint",
            format!("Stripe has no webhook endpoint for {webhook_url}; run `quota billing setup`, or set QUOTA_PUBLIC_URL"),
        ),
    });
    findings.push(if has_webhook_secret {
        Finding::ok("webhook secret", "set")
    } else {
        Finding::failed("webhook secret", "STRIPE_WEBHOOK_SECRET is not set")
    });
    Ok(findings)
}

fn amount(price: &Price) -> String {
    let amount = price.unit_amount_decimal.as_deref().unwrap_or("?");
    format!("{amount} {} (smallest unit)", price.currency.to_uppercase())
}

fn monthly(price: &Price) -> Finding {
    let is_monthly = price
        .recurring
        .as_ref()
        .is_some_and(|it| it.interval == "month" && it.usage_type == "licensed");
    if is_monthly {
        Finding::ok(
            "monthly price",
            format!("{}: {} per month", price.id, amount(price)),
        )
    } else {
        Finding::failed(
            "monthly price",
            format!("{} is not a flat monthly price", price.id),
        )
    }
}

async fn metered(stripe: &Stripe, price: &Price) -> Result<Finding, StripeError> {
    let meter = price.recurring.as_ref().and_then(|it| it.meter.as_deref());
    let Some(meter) = meter else {
        let text = format!("{} has no meter", price.id);
        return Ok(Finding::failed("usage price", text));
    };
    let meters = stripe.meters().await?;
    let found = meters.iter().find(|it| it.id == meter);
    Ok(match found {
        Some(meter) if meter.event_name == METER_EVENT && meter.status == "active" => Finding::ok(
            "usage price",
            format!("{}: {} per request", price.id, amount(price)),
        ),
        _ => Finding::failed(
            "usage price",
            format!(
                "{} does not use an active meter for {METER_EVENT}",
                price.id
            ),
        ),
    })
}

fn endpoint_finding(endpoint: &WebhookEndpoint) -> Finding {
    let has = |event: &str| {
        endpoint
            .enabled_events
            .iter()
            .any(|it| it == event || it == "*")
    };
    let missing: Vec<&str> = EVENTS.into_iter().filter(|event| !has(event)).collect();
    let version = endpoint
        .api_version
        .as_deref()
        .unwrap_or("the account's default version");
    if endpoint.status != "enabled" {
        Finding::failed(
            "webhook endpoint",
            format!("{} is {}", endpoint.id, endpoint.status),
        )
    } else if !missing.is_empty() {
        let text = format!("{} does not receive {}", endpoint.id, missing.join(", "));
        Finding::failed("webhook endpoint", text)
    } else if version == API_VERSION.as_str() {
        Finding::ok(
            "webhook endpoint",
            format!("{} uses API version {version}", endpoint.id),
        )
    } else {
        // Other versions work too, because Quota does not apply the contents of events.
        let text = format!(
            "{} uses API version {version}; Quota uses {}",
            endpoint.id,
            API_VERSION.as_str()
        );
        Finding::ok("webhook endpoint", text)
    }
}
