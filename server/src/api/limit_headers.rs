//! The header fields that tell a consumer where its limits stand. The one place that writes them.
//!
//! `RateLimit` and `RateLimit-Policy` follow draft-ietf-httpapi-ratelimit-headers-11, as structured fields of
//! RFC 9651; the `X-RateLimit-*` are what clients have read for longer.

use std::fmt::Write;

use poem::http::{HeaderMap, HeaderName, HeaderValue, header};

use crate::{
    keys::KeyRecord,
    limiter::{Decision, Policies, Policy},
};

pub const LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
pub const REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
pub const RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset");
pub const POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
pub const STATE: HeaderName = HeaderName::from_static("ratelimit");

/// Writes all that belong to a decision, `Retry-After` included.
pub fn write(headers: &mut HeaderMap, record: &KeyRecord, decision: &Decision) {
    let rate = decision.rate();
    headers.insert(LIMIT, HeaderValue::from(rate.limit));
    headers.insert(REMAINING, HeaderValue::from(rate.remaining));
    headers.insert(RESET, HeaderValue::from(rate.reset_at.secs_ceil()));
    headers.insert(
        POLICY,
        record
            .policy_field
            .get_or_init(|| value(&policy_field(&record.policies)))
            .clone(),
    );
    headers.insert(STATE, value(&state_field(decision)));
    if !decision.is_allowed() {
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(secs) = decision.retry_after_secs() {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(secs));
        }
    }
}

/// The same as pairs of text, for a gateway to hand on.
pub fn pairs(record: &KeyRecord, decision: &Decision) -> Vec<(&'static str, String)> {
    let rate = decision.rate();
    let mut pairs = vec![
        ("X-RateLimit-Limit", rate.limit.to_string()),
        ("X-RateLimit-Remaining", rate.remaining.to_string()),
        ("X-RateLimit-Reset", rate.reset_at.secs_ceil().to_string()),
        ("RateLimit-Policy", policy_field(&record.policies)),
        ("RateLimit", state_field(decision)),
    ];
    if !decision.is_allowed() {
        pairs.push(("Cache-Control", "no-store".to_owned()));
        if let Some(secs) = decision.retry_after_secs() {
            pairs.push(("Retry-After", secs.to_string()));
        }
    }
    pairs
}

/// A list of strings with parameters: `q` requests in `w` seconds. A month has no fixed number of seconds.
fn policy_field(policies: &Policies) -> String {
    let mut field = format!("\"rpm\";q={};w=60", policies.rpm);
    if let Some(daily) = policies.daily {
        let _ = write!(field, ", \"daily\";q={daily};w=86400");
    }
    if let Some(monthly) = policies.monthly {
        let _ = write!(field, ", \"monthly\";q={monthly}");
    }
    field
}

/// The policy nearest exhaustion: `r` requests are left, and all of them are there again in `t` seconds.
fn state_field(decision: &Decision) -> String {
    let (policy, state) = decision.nearest();
    let secs = state
        .reset_at
        .saturating_since(decision.now)
        .div_ceil(1_000_000_000);
    let mut field = String::with_capacity(40);
    let _ = write!(field, "\"{}\";r={};t={secs}", name(policy), state.remaining);
    field
}

const fn name(policy: Policy) -> &'static str {
    policy.as_str()
}

/// Names of policies and numbers are visible ASCII.
fn value(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).unwrap_or_else(|_| HeaderValue::from_static(""))
}

#[cfg(test)]
mod tests {
    use std::num::{NonZeroU32, NonZeroU64};

    use sfv::{BareItem, List, ListEntry, Parser};

    use super::*;
    use crate::{
        clock::UnixNanos,
        limiter::{PolicySet, PolicyState, Verdict},
    };

    const NOW: UnixNanos = UnixNanos(1_785_738_337_200_000_000);

    fn policies() -> Policies {
        Policies::new(NonZeroU32::new(600).unwrap(), NonZeroU32::new(600).unwrap())
            .with_daily(NonZeroU64::new(50_000))
            .with_monthly(NonZeroU64::new(999_999_999_999_999))
    }

    fn decision() -> Decision {
        let state = |limit, remaining, secs| {
            Some(PolicyState {
                limit,
                remaining,
                reset_at: UnixNanos(NOW.0 + secs * 1_000_000_000 - 1),
            })
        };
        Decision {
            verdict: Verdict::Allowed,
            states: [
                state(600, 412, 23),
                state(50_000, 40_000, 3600),
                state(999_999_999_999_999, 7 << 48, 86_400),
            ],
            rpm: 600,
            now: NOW,
        }
    }

    fn parse(field: &str) -> List {
        Parser::new(field)
            .parse()
            .expect("a structured list by RFC 9651")
    }

    fn item(entry: &ListEntry) -> (String, Vec<(String, i64)>) {
        let ListEntry::Item(item) = entry else {
            panic!("an inner list")
        };
        let BareItem::String(name) = &item.bare_item else {
            panic!("no string")
        };
        let parameters = item.params.iter().map(|(name, value)| {
            let BareItem::Integer(value) = value else {
                panic!("no integer")
            };
            (name.as_str().to_owned(), i64::from(*value))
        });
        (name.as_str().to_owned(), parameters.collect())
    }

    #[test]
    fn the_policy_field_is_what_the_draft_says() {
        let field = policy_field(&policies());
        assert_eq!(
            field,
            "\"rpm\";q=600;w=60, \"daily\";q=50000;w=86400, \"monthly\";q=999999999999999"
        );
        let read = parse(&field).iter().map(item).collect::<Vec<_>>();
        let p = |name: &str, value| (name.to_owned(), value);
        assert_eq!(
            read,
            [
                ("rpm".to_owned(), vec![p("q", 600), p("w", 60)]),
                ("daily".to_owned(), vec![p("q", 50_000), p("w", 86_400)]),
                ("monthly".to_owned(), vec![p("q", 999_999_999_999_999)]),
            ]
        );
    }

    #[test]
    fn the_state_field_tells_of_the_policy_nearest_exhaustion() {
        let field = state_field(&decision());
        assert_eq!(field, "\"rpm\";r=412;t=23");
        assert_eq!(
            parse(&field).iter().map(item).collect::<Vec<_>>(),
            [(
                "rpm".to_owned(),
                vec![("r".to_owned(), 412), ("t".to_owned(), 23)]
            )]
        );

        let mut nearer = decision();
        nearer.states[1].as_mut().unwrap().remaining = 3;
        assert_eq!(state_field(&nearer), "\"daily\";r=3;t=3600");
    }

    #[test]
    fn a_denial_tells_of_the_policy_that_holds_longest() {
        let violated = PolicySet::EMPTY.with(Policy::Rpm).with(Policy::Daily);
        let denied = Decision {
            verdict: Verdict::Denied {
                violated,
                retry_at: Some(UnixNanos(NOW.0 + 1)),
            },
            ..decision()
        };
        assert_eq!(state_field(&denied), "\"daily\";r=40000;t=3600");
    }

    /// Every number that can come out is one that RFC 9651 can carry: 15 digits.
    #[test]
    fn the_largest_numbers_are_structured_integers() {
        let mut largest = decision();
        for state in largest.states.iter_mut().flatten() {
            state.limit = quota_common::plan::QUOTA_MAX;
            state.remaining = quota_common::plan::QUOTA_MAX;
            state.reset_at = UnixNanos(u64::MAX);
        }
        parse(&state_field(&largest));
    }
}
