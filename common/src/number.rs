//! Formats numbers.

/// Formats a number with thousands separators.
pub fn grouped(number: u64) -> String {
    group_thousands(&number.to_string())
}

/// Adds thousands separators to digits.
pub fn group_thousands(digits: &str) -> String {
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::grouped;

    #[test]
    fn numbers_are_grouped_by_three() {
        for (number, text) in [
            (0, "0"),
            (999, "999"),
            (1_000, "1,000"),
            (60_000_000, "60,000,000"),
            (999_999_999_999_999, "999,999,999,999,999"),
        ] {
            assert_eq!(grouped(number), text);
        }
    }
}
