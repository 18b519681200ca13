//! The fields of Stripe objects that Quota reads.
//!
//! The fields are parsed with miniserde, as in the `async-stripe` crates. Fields that are not listed here are ignored.

use std::collections::HashMap;

use miniserde::Deserialize;

#[derive(Debug, Deserialize)]
pub(super) struct List<T> {
    pub data: Vec<T>,
    pub has_more: bool,
}

/// An object of any type, of which only the ID is needed.
#[derive(Debug, Deserialize)]
pub struct Created {
    pub id: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct Customer {
    pub id: String,
    pub metadata: Option<HashMap<String, String>>,
}

/// A customer that may have been deleted.
#[derive(Debug, Deserialize)]
pub(super) struct Deleted {
    #[expect(dead_code, reason = "miniserde needs a field to recognize an object")]
    pub id: String,
    pub deleted: Option<bool>,
}

/// An object that belongs to a customer.
#[derive(Debug, Deserialize)]
pub(super) struct Owned {
    pub customer: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Subscription {
    pub id: String,
    pub status: String,
    pub created: i64,
    pub trial_end: Option<i64>,
    pub cancel_at: Option<i64>,
    pub cancel_at_period_end: bool,
    pub ended_at: Option<i64>,
    pub items: Items,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Items {
    pub data: Vec<Item>,
}

/// A subscription item. Since API version 2025-03-31, billing periods belong to items.
#[derive(Debug, Clone, Deserialize)]
pub struct Item {
    pub current_period_start: i64,
    pub current_period_end: i64,
    pub price: ItemPrice,
    /// `None` for a metered price.
    pub quantity: Option<u64>,
}

#[derive(Debug, Clone, Deserialize)]
pub struct ItemPrice {
    pub currency: String,
    pub product: String,
    /// The price of a unit, as a decimal number in the smallest unit of the currency. `None` for tiered prices.
    pub unit_amount_decimal: Option<String>,
    pub recurring: Option<Recurring>,
}

#[derive(Debug, Deserialize)]
pub struct Invoice {
    pub created: i64,
    pub status_transitions: Transitions,
}

#[derive(Debug, Deserialize)]
pub struct Transitions {
    pub finalized_at: Option<i64>,
}

#[derive(Debug, Deserialize)]
pub struct CheckoutSession {
    pub id: String,
    /// `open`, `complete`, or `expired`.
    pub status: Option<String>,
    /// The page where the customer pays. `None` if the session is no longer open.
    pub url: Option<String>,
    pub expires_at: i64,
}

#[derive(Debug, Deserialize)]
pub(super) struct MeterEvent {
    #[expect(dead_code, reason = "miniserde needs a field to recognize an object")]
    pub identifier: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct Summary {
    pub aggregated_value: f64,
}

#[derive(Debug, Deserialize)]
pub(super) struct Product {
    pub name: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct PortalSession {
    pub url: String,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Price {
    pub id: String,
    pub lookup_key: Option<String>,
    pub currency: String,
    pub product: String,
    pub unit_amount_decimal: Option<String>,
    pub recurring: Option<Recurring>,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Recurring {
    pub interval: String,
    pub interval_count: u64,
    pub meter: Option<String>,
    pub usage_type: String,
}

#[derive(Debug, Deserialize)]
pub struct Meter {
    pub id: String,
    pub event_name: String,
    pub status: String,
}

#[derive(Debug, Deserialize)]
pub struct WebhookEndpoint {
    pub id: String,
    pub url: String,
    pub status: String,
    pub api_version: Option<String>,
    pub enabled_events: Vec<String>,
    pub secret: Option<String>,
}
