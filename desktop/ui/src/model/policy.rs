//! The state of a key's policies, as reported by response headers.

use quota_common::limit::{LimitState, PolicyName};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyState {
    /// `rpm`, `daily`, `monthly`, or `tenant_monthly`.
    pub policy: String,
    pub limit: u64,
    /// The number of requests left. `None` if the response does not contain this number: responses report only the rate
    /// limit and the policy that is closest to exhaustion.
    pub remaining: Option<u64>,
    pub denied: bool,
}

pub fn policy_label(policy: &str) -> &str {
    match policy {
        "rpm" => "Rate limit",
        "daily" => "Daily quota",
        "monthly" => "Monthly quota",
        "reduced_capacity" => "Reduced capacity",
        "tenant_monthly" => "Organization's monthly quota",
        other => other,
    }
}

/// Explains a 429 response, based on the policies that denied the request.
pub fn denial(policies: &[PolicyState]) -> &'static str {
    let denying = policies.iter().find(|it| it.denied);
    match denying.map(|it| &*it.policy) {
        Some("rpm") => "Rate limited",
        Some("daily") => "Daily quota used up",
        Some("monthly") => "Monthly quota used up",
        Some("tenant_monthly") => "Organization's monthly quota used up",
        _ => "Rejected",
    }
}

/// Fills in the numbers of remaining requests that the headers do not report. `limits` was loaded before the last
/// `spent` allowed requests.
pub fn complete(states: &mut [PolicyState], limits: &[LimitState], spent: u64) {
    for state in states.iter_mut().filter(|it| it.remaining.is_none()) {
        let found = limits.iter().find(|it| it.policy.as_str() == state.policy);
        state.remaining = found.map(|it| it.remaining.saturating_sub(spent));
    }
}

#[derive(Debug, Clone, Copy, Default)]
pub struct LimitHeaders<'a> {
    /// `X-RateLimit-Limit`.
    pub burst: &'a str,
    /// `X-RateLimit-Remaining`.
    pub remaining: &'a str,
    /// `RateLimit-Policy`.
    pub policies: &'a str,
    /// `RateLimit`.
    pub nearest: &'a str,
}

/// Returns a parameter of an item in a structured field, such as `q` in `"rpm";q=60;w=60`.
fn parameter(item: &str, name: &str) -> Option<u64> {
    let mut parameters = item.split(';').skip(1);
    let value = parameters.find_map(|it| it.trim().strip_prefix(name)?.strip_prefix('='));
    value?.parse().ok()
}

fn item_name(item: &str) -> Option<&str> {
    item.split('"').nth(1)
}

/// Returns the state of every policy. `violated` lists the policies that denied the request.
pub fn policy_states(headers: LimitHeaders<'_>, violated: &[PolicyName]) -> Vec<PolicyState> {
    let items = |field: &'static str, text: &str| -> Vec<(String, Option<u64>)> {
        text.split(',')
            .filter_map(|item| Some((item_name(item)?.to_owned(), parameter(item, field))))
            .collect()
    };
    let reported = items("r", headers.nearest);
    items("q", headers.policies)
        .into_iter()
        .filter_map(|(policy, limit)| {
            let denied = violated.iter().any(|it| it.as_str() == policy);
            let (limit, remaining) = if policy == "rpm" {
                (headers.burst.parse().ok(), headers.remaining.parse().ok())
            } else {
                let found = reported.iter().find(|(name, _)| *name == policy);
                (limit, found.and_then(|(_, remaining)| *remaining))
            };
            Some(PolicyState {
                limit: limit?,
                // A policy that denied a request with a cost of 1 has no requests left.
                remaining: if denied { Some(0) } else { remaining },
                policy,
                denied,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADERS: LimitHeaders<'_> = LimitHeaders {
        burst: "10",
        remaining: "7",
        policies: "\"rpm\";q=600;w=60, \"daily\";q=500;w=86400, \"monthly\";q=9000",
        nearest: "\"daily\";r=3;t=5400",
    };

    fn summary(states: &[PolicyState]) -> Vec<(&str, u64, Option<u64>, bool)> {
        states
            .iter()
            .map(|it| (&*it.policy, it.limit, it.remaining, it.denied))
            .collect()
    }

    #[test]
    fn every_policy_has_a_state() {
        assert_eq!(
            summary(&policy_states(HEADERS, &[])),
            [
                ("rpm", 10, Some(7), false),
                ("daily", 500, Some(3), false),
                ("monthly", 9000, None, false),
            ]
        );
    }

    #[test]
    fn denying_policy_is_marked_although_the_bucket_is_full() {
        let states = policy_states(
            LimitHeaders {
                remaining: "10",
                nearest: "\"daily\";r=0;t=60",
                ..HEADERS
            },
            &[PolicyName::Daily],
        );
        assert_eq!(
            summary(&states)[..2],
            [("rpm", 10, Some(10), false), ("daily", 500, Some(0), true)]
        );
    }

    #[test]
    fn denial_names_the_policy() {
        let text = |violated: &[PolicyName]| denial(&policy_states(HEADERS, violated));
        assert_eq!(text(&[PolicyName::Rpm]), "Rate limited");
        assert_eq!(text(&[PolicyName::Daily]), "Daily quota used up");
        assert_eq!(text(&[PolicyName::Monthly]), "Monthly quota used up");
        assert_eq!(text(&[]), "Rejected");
    }

    #[test]
    fn unreported_quotas_are_taken_from_the_limits_that_were_loaded() {
        let limit = |policy, remaining| LimitState {
            policy,
            limit: 9000,
            remaining,
            reset_at: "2026-08-04T00:00:00Z".parse().expect("a time"),
        };
        let limits = [
            limit(PolicyName::Daily, 499),
            limit(PolicyName::Monthly, 8000),
        ];
        let mut states = policy_states(HEADERS, &[]);
        complete(&mut states, &limits, 3);
        assert_eq!(
            summary(&states),
            [
                ("rpm", 10, Some(7), false),
                ("daily", 500, Some(3), false),
                ("monthly", 9000, Some(7997), false),
            ]
        );
        let mut unknown = policy_states(HEADERS, &[]);
        complete(&mut unknown, &[], 3);
        assert_eq!(summary(&unknown)[2], ("monthly", 9000, None, false));
    }

    #[test]
    fn malformed_headers_have_no_states() {
        for policies in ["", "rpm;q=1", "\"daily\"", "\"daily\";q=x"] {
            let headers = LimitHeaders {
                policies,
                ..LimitHeaders::default()
            };
            assert_eq!(policy_states(headers, &[]), [], "{policies}");
        }
    }
}
