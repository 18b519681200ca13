//! The text of the *Needs attention* section on Home.

use super::{chart::percent, text::number, usage::Pair};

/// A rejection rate of at least this many percent needs attention.
const HIGH_PERCENT: u64 = 5;

/// Returns the used percentage of a limit, rounded down so that 100 means that nothing is left.
pub fn used_percent(used: u64, limit: u64) -> u64 {
    let percent = u128::from(used) * 100 / u128::from(limit.max(1));
    u64::try_from(percent).unwrap_or(u64::MAX)
}

pub fn is_rejection_rate_high(requests: Pair) -> bool {
    let rejected = u128::from(requests.rejected);
    rejected > 0 && rejected * 100 >= u128::from(requests.total()) * u128::from(HIGH_PERCENT)
}

/// Returns the rejection rate, such as `9.0% (473 of 5,233) in the last 24 hours`.
pub fn rejection_rate(requests: Pair) -> String {
    format!(
        "{} ({} of {}) in the last 24 hours",
        percent(requests.rejected, requests.total()).unwrap_or_default(),
        number(requests.rejected),
        number(requests.total())
    )
}

/// Returns the text to show if nothing needs attention. The text says what was checked.
pub fn all_clear(requests: Pair) -> String {
    let rejected = match requests.rejected {
        0 => "no requests were rejected".to_owned(),
        _ => format!(
            "only {} of requests were rejected",
            percent(requests.rejected, requests.total()).unwrap_or_default()
        ),
    };
    format!(
        "All clear. No quotas are nearly used up, no keys are about to expire, and {rejected} in the last 24 hours."
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn pair(allowed: u64, rejected: u64) -> Pair {
        Pair { allowed, rejected }
    }

    #[test]
    fn quota_is_used_up_only_if_nothing_is_left() {
        assert_eq!(used_percent(19_999, 20_000), 99);
        assert_eq!(used_percent(20_000, 20_000), 100);
        assert_eq!(used_percent(0, 0), 0);
        assert_eq!(used_percent(u64::MAX, u64::MAX), 100);
    }

    #[test]
    fn high_rate_needs_attention() {
        for (allowed, rejected, is_high) in [
            (0, 0, false),
            (1000, 0, false),
            (96, 4, false),
            (95, 5, true),
            (4760, 473, true),
            (0, 1, true),
            (u64::MAX, 1, false),
            (0, u64::MAX, true),
        ] {
            let is = is_rejection_rate_high(pair(allowed, rejected));
            assert_eq!(is, is_high, "{allowed} allowed, {rejected} rejected");
        }
        assert_eq!(
            rejection_rate(pair(4760, 473)),
            "9.0% (473 of 5,233) in the last 24 hours"
        );
    }

    #[test]
    fn all_clear_states_the_rate() {
        assert!(
            all_clear(pair(997, 3))
                .ends_with("and only 0.3% of requests were rejected in the last 24 hours.")
        );
        assert!(
            all_clear(pair(10, 0)).ends_with("and no requests were rejected in the last 24 hours.")
        );
    }
}
