//! The headers that report a decision.
//!
//! Only this module writes these headers, with two exceptions: the code that responds to gateways writes
//! `X-Quota-Decision`, and the `problem` module writes `Retry-After` and `X-Quota-Degraded` if this module has not done
//! so.
//!
//! `RateLimit` and `RateLimit-Policy` follow draft-ietf-httpapi-ratelimit-headers-11 and are structured fields (RFC
//! 9651). `X-RateLimit-*` follow the older convention. `X-Quota-Decision` is for gateways.

use std::{borrow::Cow, fmt::Write, sync::OnceLock};

use poem::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};

use crate::{
    keys::KeyRecord,
    limiter::{Decision, Policies, Policy, PolicyState},
};

pub const LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
pub const REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
pub const RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset");
pub const POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
pub const STATE: HeaderName = HeaderName::from_static("ratelimit");
/// The decision of forward-auth. A gateway must forward a request only if the status is 200 and the value is `allowed`.
pub const DECISION: HeaderName = HeaderName::from_static("x-quota-decision");
/// A header that is present if the replica could not use Redis for the decision.
pub const DEGRADED: HeaderName = HeaderName::from_static("x-quota-degraded");
pub const REDIS_AWAY: &str = "redis-away";

/// The approximate number of headers in a response. If space for this many headers is reserved, the map is allocated
/// only once.
pub const FIELDS: usize = 14;

/// The values of [`DECISION`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GatewayDecision {
    Allowed,
    Limited,
    Unauthorized,
    PaymentRequired,
    /// No decision was made, because a dependency is unavailable or the gateway's request is invalid.
    Unavailable,
}

impl GatewayDecision {
    /// Returns the decision for an error response. Never returns [`Allowed`](Self::Allowed).
    pub const fn of_error(status: StatusCode) -> Self {
        match status {
            StatusCode::UNAUTHORIZED => Self::Unauthorized,
            StatusCode::PAYMENT_REQUIRED => Self::PaymentRequired,
            StatusCode::TOO_MANY_REQUESTS => Self::Limited,
            _ => Self::Unavailable,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Limited => "limited",
            Self::Unauthorized => "unauthorized",
            Self::PaymentRequired => "payment_required",
            Self::Unavailable => "unavailable",
        }
    }

    pub const fn value(self) -> HeaderValue {
        HeaderValue::from_static(self.name())
    }
}

/// A destination for the headers of a response.
pub trait HeaderSink {
    /// Announces approximately how many headers will be set.
    fn expect(&mut self, _headers: usize) {}

    fn contains(&self, name: &HeaderName) -> bool;

    /// Sets a header. Callers set each header only once.
    fn set(&mut self, name: HeaderName, value: &HeaderValue);

    fn set_static(&mut self, name: HeaderName, value: &'static str);

    fn set_number(&mut self, name: HeaderName, value: u64);

    /// Sets a header to a value of visible ASCII characters and spaces.
    fn set_text(&mut self, name: HeaderName, value: &[u8]);
}

impl HeaderSink for HeaderMap {
    fn expect(&mut self, headers: usize) {
        self.reserve(headers.saturating_sub(self.len()));
    }

    fn contains(&self, name: &HeaderName) -> bool {
        self.contains_key(name)
    }

    fn set(&mut self, name: HeaderName, value: &HeaderValue) {
        self.insert(name, value.clone());
    }

    fn set_static(&mut self, name: HeaderName, value: &'static str) {
        self.insert(name, HeaderValue::from_static(value));
    }

    fn set_number(&mut self, name: HeaderName, value: u64) {
        self.insert(name, HeaderValue::from(value));
    }

    fn set_text(&mut self, name: HeaderName, text: &[u8]) {
        self.insert(name, value(text));
    }
}

/// Values that are the same for all requests with a key.
struct FixedValues {
    limit: HeaderValue,
    policy: HeaderValue,
    /// The value of `policy` with the tenant's quota appended.
    with_tenant: OnceLock<HeaderValue>,
}

impl FixedValues {
    fn of<'a>(record: &'a KeyRecord, decision: &Decision) -> &'a Self {
        record.plan.headers.get_or_init(|| Self {
            limit: HeaderValue::from(decision.rate.limit),
            policy: value(policy_field(&record.policies, None, None).as_bytes()),
            with_tenant: OnceLock::new(),
        })
    }

    /// Returns the value of [`POLICY`].
    fn policy(&self, policies: &Policies, decision: &Decision) -> Cow<'_, HeaderValue> {
        match decision.tenant_monthly {
            _ if !is_usual(decision) => Cow::Owned(all_policies(policies, decision)),
            None => Cow::Borrowed(&self.policy),
            Some(_) => {
                let with_tenant = || all_policies(policies, decision);
                Cow::Borrowed(self.with_tenant.get_or_init(with_tenant))
            }
        }
    }
}

/// Writes all headers that report a decision, including `Retry-After`, but not [`DECISION`].
pub fn write(headers: &mut impl HeaderSink, record: &KeyRecord, decision: &Decision) {
    let rate = decision.rate;
    let fixed = FixedValues::of(record, decision);
    headers.expect(FIELDS);
    headers.set(LIMIT, &fixed.limit);
    headers.set_number(REMAINING, rate.remaining);
    headers.set_number(RESET, rate.reset_at.secs_ceil());
    headers.set(POLICY, &fixed.policy(&record.policies, decision));
    headers.set_text(STATE, StateField::of(decision).as_bytes());
    if is_degraded(decision) {
        headers.set_static(DEGRADED, REDIS_AWAY);
    }
    if !decision.is_allowed() {
        headers.set_static(header::CACHE_CONTROL, "no-store");
        if let Some(secs) = decision.retry_after_secs() {
            headers.set_number(header::RETRY_AFTER, secs);
        }
    }
}

/// Appends, as a JSON object, the headers that [`write()`] sets, for a service that passes them on. The names are sorted.
/// Formats the JSON without serde, because this function runs for every check.
pub fn write_json(record: &KeyRecord, decision: &Decision, out: &mut Vec<u8>) {
    let rate = decision.rate;
    let fixed = FixedValues::of(record, decision);
    let policy = fixed.policy(&record.policies, decision);
    let mut number = itoa::Buffer::new();
    out.push(b'{');
    if !decision.is_allowed() {
        out.extend_from_slice(b"\"Cache-Control\":\"no-store\",");
    }
    out.extend_from_slice(b"\"RateLimit\":\"");
    write_escaped(StateField::of(decision).as_bytes(), out);
    out.extend_from_slice(b"\",\"RateLimit-Policy\":\"");
    write_escaped(policy.as_bytes(), out);
    out.extend_from_slice(b"\",");
    if !decision.is_allowed()
        && let Some(secs) = decision.retry_after_secs()
    {
        out.extend_from_slice(b"\"Retry-After\":\"");
        out.extend_from_slice(number.format(secs).as_bytes());
        out.extend_from_slice(b"\",");
    }
    if is_degraded(decision) {
        out.extend_from_slice(b"\"X-Quota-Degraded\":\"");
        out.extend_from_slice(REDIS_AWAY.as_bytes());
        out.extend_from_slice(b"\",");
    }
    out.extend_from_slice(b"\"X-RateLimit-Limit\":\"");
    out.extend_from_slice(number.format(rate.limit).as_bytes());
    out.extend_from_slice(b"\",\"X-RateLimit-Remaining\":\"");
    out.extend_from_slice(number.format(rate.remaining).as_bytes());
    out.extend_from_slice(b"\",\"X-RateLimit-Reset\":\"");
    out.extend_from_slice(number.format(rate.reset_at.secs_ceil()).as_bytes());
    out.extend_from_slice(b"\"}");
}

/// Appends the content of a JSON string. `value` consists of policy names and numbers, so only quotation marks need
/// escaping.
fn write_escaped(value: &[u8], out: &mut Vec<u8>) {
    let mut parts = value.split(|byte| *byte == b'"');
    out.extend_from_slice(parts.next().unwrap_or_default());
    for part in parts {
        out.extend_from_slice(b"\\\"");
        out.extend_from_slice(part);
    }
}

/// Returns whether the decision was made without Redis. Only such a decision can deny a request without naming a
/// violated policy.
fn is_degraded(decision: &Decision) -> bool {
    decision.degraded || (!decision.is_allowed() && decision.violated().is_empty())
}

/// Returns whether every quota applies to an entire day or month.
fn is_usual(decision: &Decision) -> bool {
    decision.states().all(|state| state.shortened_to.is_none())
}

fn all_policies(policies: &Policies, decision: &Decision) -> HeaderValue {
    value(policy_field(policies, Some(decision), decision.tenant_monthly).as_bytes())
}

/// Returns the value of [`POLICY`]. Each policy allows `q` requests per `w` seconds. A monthly policy has no `w`,
/// because the length of a month varies. For a window that a change to the time zone has shortened, uses the window's
/// own length and quota.
fn policy_field(
    policies: &Policies,
    decision: Option<&Decision>,
    tenant: Option<PolicyState>,
) -> String {
    let mut field = format!("\"rpm\";q={};w=60", policies.rate().rpm);
    let quotas = [
        (
            policies.daily(),
            decision.and_then(|it| it.daily),
            ";w=86400",
        ),
        (policies.monthly(), decision.and_then(|it| it.monthly), ""),
    ];
    for ((quota, state, usual), policy) in quotas.into_iter().zip([Policy::Daily, Policy::Monthly])
    {
        let Some(quota) = quota else { continue };
        let name = policy.name();
        let shortened = state.and_then(|state| Some((state.limit, state.shortened_to?)));
        let _ = match shortened {
            None => write!(field, ", \"{name}\";q={quota}{usual}"),
            Some((quota, seconds)) => write!(field, ", \"{name}\";q={quota};w={seconds}"),
        };
    }
    if let Some(state) = tenant {
        let _ = write!(field, ", \"{}\";q={}", state.policy.name(), state.limit);
    }
    field
}

/// The state of the policy that is closest to exhaustion: `r` requests are left, and the full limit is available again
/// in `t` seconds.
///
/// For example, `"rpm";r=412;t=23`. Written without heap allocation, because the value differs for every request.
struct StateField {
    bytes: [u8; Self::LONGEST],
    length: usize,
}

impl StateField {
    /// Enough space for the longest name and two 20-digit numbers.
    const LONGEST: usize = "\"tenant_monthly\";r=;t=".len() + 2 * 20;

    fn of(decision: &Decision) -> Self {
        let state = decision.nearest();
        let mut number = itoa::Buffer::new();
        let mut field = Self {
            bytes: [0; Self::LONGEST],
            length: 0,
        };
        field.push("\"");
        field.push(state.policy.name());
        field.push("\";r=");
        field.push(number.format(state.remaining));
        field.push(";t=");
        field.push(number.format(decision.seconds_to_reset(state)));
        field
    }

    fn push(&mut self, text: &str) {
        let end = self.length + text.len();
        self.bytes[self.length..end].copy_from_slice(text.as_bytes());
        self.length = end;
    }

    fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// Returns a header value. `text` consists of policy names and numbers, which are visible ASCII.
fn value(text: &[u8]) -> HeaderValue {
    HeaderValue::from_bytes(text).unwrap_or_else(|_| HeaderValue::from_static(""))
}

#[cfg(test)]
mod tests {
    use std::num::{NonZeroU32, NonZeroU64};

    use sfv::{BareItem, List, ListEntry, Parser};

    use super::*;
    use crate::{
        clock::{Monotonic, UnixNanos},
        limiter::{Outcome, PolicySet, PolicyState, RatePolicy, Zone},
    };

    const NOW: UnixNanos = UnixNanos(1_785_738_337_200_000_000);

    fn policies() -> Policies {
        let six_hundred = NonZeroU32::new(600).unwrap();
        let rate = RatePolicy {
            rpm: six_hundred,
            burst: six_hundred,
        };
        let (daily, monthly) = (
            NonZeroU64::new(50_000),
            NonZeroU64::new(999_999_999_999_999),
        );
        Policies::new(rate, daily, monthly, Zone::utc(), false)
    }

    fn decision() -> Decision {
        let state = |policy, limit, remaining, secs: u64| PolicyState {
            policy,
            limit,
            remaining,
            reset_at: UnixNanos(NOW.0 + secs * 1_000_000_000 - 1),
            shortened_to: None,
        };
        Decision {
            at: NOW,
            monotonic: Monotonic(0),
            outcome: Outcome::Allowed,
            rpm: NonZeroU32::new(600).unwrap(),
            rate: state(Policy::Rpm, 600, 412, 23),
            daily: Some(state(Policy::Daily, 50_000, 40_000, 3600)),
            monthly: Some(state(Policy::Monthly, 999_999_999_999_999, 7 << 47, 86_400)),
            tenant_monthly: None,
            degraded: false,
        }
    }

    fn state_field(decision: &Decision) -> String {
        String::from_utf8(StateField::of(decision).as_bytes().to_vec()).unwrap()
    }

    fn parse(field: &str) -> List {
        Parser::new(field)
            .parse()
            .expect("a structured list as defined in RFC 9651")
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
    fn policy_field_follows_the_draft() {
        let field = policy_field(&policies(), Some(&decision()), None);
        assert_eq!(field, policy_field(&policies(), None, None));
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
    fn shortened_window_states_its_own_quota_and_length() {
        let mut decision = decision();
        assert!(is_usual(&decision));
        let daily = decision.daily.as_mut().unwrap();
        daily.limit = 31_250;
        daily.shortened_to = NonZeroU32::new(54_000);
        assert!(!is_usual(&decision));
        let monthly = decision.monthly.as_mut().unwrap();
        monthly.limit = 7;
        monthly.shortened_to = NonZeroU32::new(2_592_000);
        assert_eq!(
            policy_field(&policies(), Some(&decision), None),
            "\"rpm\";q=600;w=60, \"daily\";q=31250;w=54000, \"monthly\";q=7;w=2592000"
        );
    }

    #[test]
    fn state_field_reports_the_policy_closest_to_exhaustion() {
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
        nearer.daily.as_mut().unwrap().remaining = 3;
        assert_eq!(state_field(&nearer), "\"daily\";r=3;t=3600");
    }

    #[test]
    fn denial_reports_a_policy_that_denied() {
        let denied = Decision {
            outcome: Outcome::Denied {
                violated: PolicySet::EMPTY.with(Policy::Daily),
                retry_after: NonZeroU64::new(1),
            },
            ..decision()
        };
        assert_eq!(state_field(&denied), "\"daily\";r=40000;t=3600");
    }

    /// RFC 9651 limits integers to 15 digits.
    #[test]
    fn largest_numbers_are_structured_integers() {
        let mut largest = decision();
        largest.tenant_monthly = largest.monthly.map(|state| PolicyState {
            policy: Policy::TenantMonthly,
            ..state
        });
        for state in [
            Some(&mut largest.rate),
            largest.daily.as_mut(),
            largest.monthly.as_mut(),
            largest.tenant_monthly.as_mut(),
        ]
        .into_iter()
        .flatten()
        {
            state.limit = quota_common::bounds::QUOTA_MAX;
            state.remaining = quota_common::bounds::QUOTA_MAX;
            state.reset_at = UnixNanos(u64::MAX);
        }
        parse(&state_field(&largest));
        largest.outcome = Outcome::Denied {
            violated: PolicySet::EMPTY.with(Policy::TenantMonthly),
            retry_after: NonZeroU64::new(1),
        };
        let field = state_field(&largest);
        assert!(field.starts_with("\"tenant_monthly\";r="), "{field}");
        parse(&field);
        let field = policy_field(&policies(), Some(&largest), largest.tenant_monthly);
        assert!(
            field.ends_with(", \"tenant_monthly\";q=999999999999999"),
            "{field}"
        );
        parse(&field);
    }
}
