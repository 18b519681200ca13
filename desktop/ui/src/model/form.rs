//! What is typed into fields, as values.

use quota_common::plan::{CreatePlan, UpdatePlan};

/// A whole number, or nothing. People write thousands apart.
pub fn optional_number(text: &str) -> Result<Option<u64>, &'static str> {
    let digits: String = text
        .chars()
        .filter(|c| !c.is_whitespace() && !matches!(c, ',' | '_' | '\''))
        .collect();
    if digits.is_empty() {
        return Ok(None);
    }
    digits
        .parse()
        .map(Some)
        .map_err(|_| "must be a whole number")
}

/// A whole number that must be there.
pub fn number(text: &str) -> Result<u64, &'static str> {
    optional_number(text)?.ok_or("is missing")
}

/// The same, for a rate.
pub fn rate(text: &str) -> Result<u32, &'static str> {
    number(text)?.try_into().map_err(|_| "is too high")
}

pub fn optional_rate(text: &str) -> Result<Option<u32>, &'static str> {
    optional_number(text)?
        .map(|n| n.try_into().map_err(|_| "is too high"))
        .transpose()
}

/// What a field became, where it is not what it was: the rest is not sent, so that what others changed meanwhile
/// stays.
pub fn changed<T: PartialEq>(was: &T, now: T) -> Option<T> {
    (*was != now).then_some(now)
}

/// What was changed of a plan.
pub fn plan_changes(was: &CreatePlan, now: CreatePlan) -> UpdatePlan {
    UpdatePlan {
        name: changed(&was.name, now.name),
        default_rpm: changed(&was.default_rpm, now.default_rpm),
        // A burst that is the rate goes on following it.
        burst: changed(&was.burst, now.burst)
            .map(|burst| burst.unwrap_or_else(|| u32::from(now.default_rpm).into())),
        daily_quota: changed(&was.daily_quota, now.daily_quota),
        monthly_quota: changed(&was.monthly_quota, now.monthly_quota),
        strict: changed(&was.strict, now.strict).flatten(),
        on_redis_failure: changed(&was.on_redis_failure, now.on_redis_failure),
        billing: None,
    }
}

/// Where to go after signing in: a page of the console, whatever the address says.
pub fn next_page(next: Option<&str>) -> String {
    match next {
        Some(next)
            if next.starts_with("/console/") && !next.contains("//") && !next.contains('\\') =>
        {
            next.to_owned()
        }
        _ => "/console".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_people_write_them() {
        assert_eq!(optional_number(" "), Ok(None));
        assert_eq!(number("50 000"), Ok(50_000));
        assert_eq!(number("50,000"), Ok(50_000));
        assert!(number("").is_err() && number("-1").is_err() && number("1.5").is_err());
        assert!(rate("9999999999").is_err());
        assert_eq!(optional_rate(""), Ok(None));
    }

    #[test]
    fn only_what_was_changed_is_sent() {
        let was = CreatePlan {
            name: "Starter".into(),
            default_rpm: 60.into(),
            burst: None,
            daily_quota: Some(1000.into()),
            monthly_quota: None,
            strict: Some(false),
            on_redis_failure: None,
            billing: None,
        };
        assert_eq!(plan_changes(&was, was.clone()), UpdatePlan::default());
        let now = CreatePlan {
            default_rpm: 120.into(),
            daily_quota: None,
            ..was.clone()
        };
        let sent = UpdatePlan {
            default_rpm: Some(120.into()),
            daily_quota: Some(None),
            ..UpdatePlan::default()
        };
        assert_eq!(plan_changes(&was, now.clone()), sent);
        let before = CreatePlan {
            burst: Some(5.into()),
            ..was
        };
        assert_eq!(plan_changes(&before, now).burst, Some(120.into()));
    }

    #[test]
    fn signing_in_leads_nowhere_else() {
        assert_eq!(
            next_page(Some("/console/plans?cursor=x")),
            "/console/plans?cursor=x"
        );
        for elsewhere in [
            "//evil.example",
            "https://evil.example",
            "/console//evil.example",
            "/console/\\evil",
            "",
        ] {
            assert_eq!(next_page(Some(elsewhere)), "/console", "{elsewhere}");
        }
        assert_eq!(next_page(None), "/console");
    }
}
