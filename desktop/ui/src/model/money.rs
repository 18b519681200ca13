//! Amounts of money, with decimal arithmetic on strings. Floating-point numbers would be inexact and would make the
//! download larger.

use quota_common::number::group_thousands;

/// Currencies whose smallest unit in Stripe is a whole unit.
const WHOLE: &str = "bif clp djf gnf jpy kmf krw mga pyg rwf vnd vuv xaf xof xpf";
/// Currencies whose smallest unit in Stripe is a thousandth.
const THOUSANDTHS: &str = "bhd jod kwd omr tnd";

/// Returns the number of digits after the decimal point.
fn digits_of(currency: &str) -> usize {
    let is_in = |list: &str| list.split(' ').any(|it| it == currency);
    match () {
        () if is_in(WHOLE) => 0,
        () if is_in(THOUSANDTHS) => 3,
        () => 2,
    }
}

/// Formats an amount in the currency's smallest unit, multiplied by 10 to the power of `exponent`. For example, `2900`
/// of `usd` with exponent 0 is `$29.00`.
pub fn money(amount: &str, exponent: usize, currency: &str) -> String {
    let digits = digits_of(currency);
    let (whole, fraction) = amount.split_once('.').unwrap_or((amount, ""));
    // All digits, padded with zeros so that at least one digit is before the decimal point.
    let text = format!("{:0>width$}{fraction}", whole, width = digits + 1);
    let text = format!(
        "{text:0<width$}",
        width = text.len() - fraction.len() + exponent
    );
    let point = text.len() - fraction.len().max(exponent) + exponent - digits;
    let (whole, fraction) = text.split_at_checked(point).unwrap_or((&text, ""));
    let rest = fraction.get(digits..).unwrap_or_default();
    let fraction = &fraction[..fraction.len() - (rest.len() - rest.trim_end_matches('0').len())];
    let whole = whole.trim_start_matches('0');
    let whole = group_thousands(if whole.is_empty() { "0" } else { whole });
    let number = if fraction.is_empty() {
        whole
    } else {
        format!("{whole}.{fraction}")
    };
    match currency {
        "usd" => format!("${number}"),
        "eur" => format!("€{number}"),
        "gbp" => format!("£{number}"),
        _ => format!("{number} {}", currency.to_ascii_uppercase()),
    }
}

#[cfg(test)]
mod tests {
    use super::money;

    #[test]
    fn amounts_are_in_the_smallest_unit() {
        assert_eq!(money("2900", 0, "usd"), "$29.00");
        assert_eq!(money("5", 0, "usd"), "$0.05");
        assert_eq!(money("0", 0, "eur"), "€0.00");
        assert_eq!(money("123456789", 0, "gbp"), "£1,234,567.89");
        assert_eq!(money("2900", 0, "jpy"), "2,900 JPY");
        assert_eq!(money("0", 0, "jpy"), "0 JPY");
        assert_eq!(money("2900", 0, "kwd"), "2.900 KWD");
        assert_eq!(
            money("18446744073709551615", 0, "chf"),
            "184,467,440,737,095,516.15 CHF"
        );
    }

    #[test]
    fn fractions_of_the_smallest_unit_are_kept() {
        assert_eq!(money("0.05", 0, "usd"), "$0.0005");
        assert_eq!(money("12.5", 0, "usd"), "$0.125");
        assert_eq!(money("0.000000000001", 0, "usd"), "$0.00000000000001");
        assert_eq!(money("2.50", 0, "jpy"), "2.5 JPY");
    }

    #[test]
    fn prices_per_thousand_move_the_decimal_point() {
        assert_eq!(money("0.05", 3, "usd"), "$0.50");
        assert_eq!(money("1", 3, "usd"), "$10.00");
        assert_eq!(money("0.0125", 3, "usd"), "$0.125");
        assert_eq!(money("0.00000005", 3, "usd"), "$0.0000005");
        assert_eq!(money("0.1", 3, "jpy"), "100 JPY");
        assert_eq!(money("0.0001", 3, "jpy"), "0.1 JPY");
        assert_eq!(money("1.5", 3, "kwd"), "1.500 KWD");
    }
}
