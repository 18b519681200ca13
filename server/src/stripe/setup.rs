//! The objects that `quota billing setup` creates: products, meters, prices, and webhook endpoints.

use stripe::StripeRequest;
use stripe_billing::billing_meter::{
    CreateBillingMeter, CreateBillingMeterDefaultAggregation,
    CreateBillingMeterDefaultAggregationFormula, ListBillingMeter,
};
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

use super::{
    EVENTS, Stripe,
    error::Result,
    request::{API_VERSION, send},
    response::{self, Created, List, Meter, Price, WebhookEndpoint},
};

impl Stripe {
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
