use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;

use super::{Billing, BillingError, FLAT_PRICE, USAGE_PRICE};
use crate::{
    error_chain::chain,
    stripe::{Item, Price, Recurring},
};

/// A non-negative decimal number, such as an amount in the smallest unit of a currency.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Decimal {
    digits: u128,
    /// The number of digits after the decimal point.
    scale: u32,
}

impl Decimal {
    const ZERO: Self = Self {
        digits: 0,
        scale: 0,
    };

    /// Returns `None` if the text is not a non-negative decimal number, or is too long to be an amount.
    fn parse(text: &str) -> Option<Self> {
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        let digits = format!("{whole}{fraction}");
        let is_plausible = (1..=24).contains(&digits.len()) && fraction.len() <= 12;
        if !is_plausible || !digits.bytes().all(|it| it.is_ascii_digit()) {
            return None;
        }
        Some(Self {
            digits: digits.parse().ok()?,
            scale: u32::try_from(fraction.len()).ok()?,
        })
    }

    fn times(self, n: u64) -> Option<Self> {
        let digits = self.digits.checked_mul(u128::from(n))?;
        Some(Self { digits, ..self })
    }

    fn plus(self, other: Self) -> Option<Self> {
        let scale = self.scale.max(other.scale);
        let aligned = |it: Self| {
            it.digits
                .checked_mul(10_u128.checked_pow(scale - it.scale)?)
        };
        let digits = aligned(self)?.checked_add(aligned(other)?)?;
        Some(Self { digits, scale })
    }

    /// Rounds to the nearest whole number; halves round up.
    fn rounded(self) -> Option<u64> {
        let unit = 10_u128.checked_pow(self.scale)?;
        u64::try_from((self.digits + unit / 2) / unit).ok()
    }
}

impl std::fmt::Display for Decimal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let unit = 10_u128.pow(self.scale);
        write!(f, "{}", self.digits / unit)?;
        let fraction = format!(
            "{:0width$}",
            self.digits % unit,
            width = self.scale as usize
        );
        match fraction.trim_end_matches('0') {
            "" => Ok(()),
            fraction if self.scale > 0 => write!(f, ".{fraction}"),
            _ => Ok(()),
        }
    }
}

/// Returns the charge for a number of units, rounded to the smallest unit of the currency. Returns `None` if the price
/// is invalid or the charge is too large.
pub fn charge(unit_price: &str, units: u64) -> Option<u64> {
    Decimal::parse(unit_price)?.times(units)?.rounded()
}

/// Returns the sum of the monthly price and the charge for a number of units.
pub fn total(monthly: &str, unit_price: Option<&str>, units: u64) -> Option<u64> {
    let usage = match unit_price {
        Some(price) => Decimal::parse(price)?.times(units)?.rounded()?,
        None => 0,
    };
    Decimal::parse(monthly)?.rounded()?.checked_add(usage)
}

/// The prices of an existing or a new subscription.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Offer {
    pub name: Option<String>,
    pub currency: String,
    /// The price per month, in the smallest unit of the currency. `None` if it is not a fixed amount.
    pub monthly: Option<String>,
    /// The price per unit of usage, in the smallest unit of the currency. `None` if usage is not charged at a fixed
    /// price.
    pub per_unit: Option<String>,
}

fn is_monthly(recurring: Option<&Recurring>) -> bool {
    recurring.is_some_and(|it| it.interval == "month" && it.interval_count == 1)
}

impl Offer {
    /// Returns the prices of a subscription with these items. Does not include the product's name.
    pub(super) fn of_items(items: &[Item]) -> Self {
        let metered = |it: &&Item| {
            let recurring = it.price.recurring.as_ref();
            recurring.is_some_and(|it| it.meter.is_some())
        };
        let mut usage = items.iter().filter(metered);
        let per_unit = match (usage.next(), usage.next()) {
            (Some(only), None) => only.price.unit_amount_decimal.clone(),
            _ => None,
        };
        let per_month = |item: &Item| {
            let amount = Decimal::parse(item.price.unit_amount_decimal.as_deref()?)?;
            if is_monthly(item.price.recurring.as_ref()) {
                amount.times(item.quantity.unwrap_or(1))
            } else {
                None
            }
        };
        let monthly = items
            .iter()
            .filter(|it| !metered(it))
            .try_fold(Decimal::ZERO, |sum, item| sum.plus(per_month(item)?));
        Self {
            name: None,
            currency: items
                .first()
                .map(|it| it.price.currency.clone())
                .unwrap_or_default(),
            monthly: monthly.map(|it| it.to_string()),
            per_unit: per_unit.and_then(|it| Some(Decimal::parse(&it)?.to_string())),
        }
    }

    /// Returns the product of the first flat price among the items, or of the first item if there is no flat price.
    pub(super) fn product(items: &[Item]) -> Option<&str> {
        let flat = items.iter().find(|it| {
            let recurring = it.price.recurring.as_ref();
            recurring.is_none_or(|it| it.meter.is_none())
        });
        flat.or(items.first()).map(|it| it.price.product.as_str())
    }

    fn of_prices(prices: &[Price]) -> Option<Self> {
        let find = |key: &str| {
            prices
                .iter()
                .find(|it| it.lookup_key.as_deref() == Some(key))
        };
        let amount = |it: &Price| {
            let amount = Decimal::parse(it.unit_amount_decimal.as_deref()?)?;
            Some(amount.to_string())
        };
        let flat = find(FLAT_PRICE)?;
        Some(Self {
            name: None,
            currency: flat.currency.clone(),
            monthly: Some(flat)
                .filter(|it| is_monthly(it.recurring.as_ref()))
                .and_then(amount),
            per_unit: find(USAGE_PRICE).and_then(amount),
        })
    }
}

/// The prices and product names that this process has read from Stripe. If a product's name changes in Stripe, the new
/// name is read after the next restart.
#[derive(Debug, Clone, Default)]
pub(super) struct Prices {
    names: Arc<Mutex<HashMap<String, String>>>,
    offer: Arc<Mutex<Option<Offer>>>,
}

impl Billing {
    /// Returns the last known prices of a new subscription.
    pub fn offer(&self) -> Option<Offer> {
        self.prices.offer.lock().clone()
    }

    /// Reads the prices of a new subscription from Stripe.
    pub async fn read_offer(&self) -> Result<(), BillingError> {
        self.verify_account().await?;
        let prices = self.stripe.prices(&[FLAT_PRICE, USAGE_PRICE]).await?;
        let mut offer = Offer::of_prices(&prices);
        let flat = prices
            .iter()
            .find(|it| it.lookup_key.as_deref() == Some(FLAT_PRICE));
        if let (Some(offer), Some(flat)) = (&mut offer, flat) {
            offer.name = self.product_name(&flat.product).await;
        }
        *self.prices.offer.lock() = offer;
        Ok(())
    }

    /// Returns the name of a product. If the name cannot be read, returns `None` instead of an error, because access
    /// does not depend on the name.
    pub(super) async fn product_name(&self, product: &str) -> Option<String> {
        if let Some(name) = self.prices.names.lock().get(product) {
            return Some(name.clone());
        }
        let name = self.stripe.product_name(product).await;
        let name = name
            .inspect_err(|error| {
                tracing::debug!(product, error = %chain(error), "cannot read the name of a product");
            })
            .ok()?;
        let mut names = self.prices.names.lock();
        names.insert(product.to_owned(), name.clone());
        Some(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn charge_is_rounded_to_the_smallest_unit() {
        for (price, units, expected) in [
            ("0.05", 0, Some(0)),
            ("0.05", 9, Some(0)),
            ("0.05", 10, Some(1)),
            ("0.05", 40_000, Some(2000)),
            ("1", 12_345, Some(12_345)),
            ("2900", 1, Some(2900)),
            ("0.000000000001", 499_999_999_999, Some(0)),
            ("0.000000000001", 500_000_000_000, Some(1)),
            ("-1", 1, None),
            ("", 1, None),
            ("1e3", 1, None),
            ("999999999999", u64::MAX, None),
        ] {
            assert_eq!(charge(price, units), expected, "{units} at {price}");
        }
        assert_eq!(total("2900", Some("0.05"), 62_000), Some(6000));
        assert_eq!(total("2900", None, 62_000), Some(2900));
        assert_eq!(total("tiers", None, 1), None);
    }

    fn item(amount: Option<&str>, quantity: Option<u64>, metered: bool, interval: &str) -> Item {
        Item {
            current_period_start: 0,
            current_period_end: 0,
            quantity,
            price: crate::stripe::ItemPrice {
                currency: "usd".into(),
                product: if metered { "prod_usage" } else { "prod_flat" }.into(),
                unit_amount_decimal: amount.map(Into::into),
                recurring: Some(Recurring {
                    interval: interval.into(),
                    interval_count: 1,
                    meter: metered.then(|| "mtr_1".into()),
                    usage_type: if metered { "metered" } else { "licensed" }.into(),
                }),
            },
        }
    }

    #[test]
    fn price_of_a_subscription_is_the_sum_of_its_items() {
        let usage = item(Some("0.050"), None, true, "month");
        let flat = item(Some("2900"), Some(1), false, "month");
        let items = [usage.clone(), flat.clone()];
        let offer = Offer::of_items(&items);
        assert_eq!(offer.monthly.as_deref(), Some("2900"));
        assert_eq!(offer.per_unit.as_deref(), Some("0.05"));
        assert_eq!(offer.currency, "usd");
        assert_eq!(Offer::product(&items), Some("prod_flat"));

        let seats = item(Some("100.5"), Some(3), false, "month");
        let offer = Offer::of_items(&[flat.clone(), seats]);
        assert_eq!(offer.monthly.as_deref(), Some("3201.5"));
        assert_eq!(offer.per_unit, None);
        // These are not fixed amounts per month.
        for other in [
            item(None, Some(1), false, "month"),
            item(Some("2900"), Some(1), false, "year"),
        ] {
            assert_eq!(Offer::of_items(&[other, flat.clone()]).monthly, None);
        }
        let tiers = Offer::of_items(&[flat, item(None, None, true, "month")]);
        assert_eq!(tiers.per_unit, None);
        assert_eq!(tiers.monthly.as_deref(), Some("2900"));
    }
}
