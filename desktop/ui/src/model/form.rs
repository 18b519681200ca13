//! Conversions between form fields and values.

use quota_common::{
    bounds::{NAME_MAX, RPM_MAX},
    field::Metadata,
    plan::{CreatePlan, UpdatePlan},
};

/// Parses a whole number, with or without thousands separators. Returns `None` if the field is empty.
pub fn optional_number(text: &str) -> Result<Option<u64>, &'static str> {
    let digits: String = text
        .chars()
        .filter(|c| !c.is_whitespace() && !matches!(c, ',' | '_' | '\''))
        .collect();
    if digits.is_empty() {
        return Ok(None);
    }
    digits.parse().map(Some).map_err(|_| "Enter a whole number")
}

/// Parses a rate or burst. Returns `None` if the field is empty.
pub fn optional_rate(text: &str) -> Result<Option<u32>, &'static str> {
    optional_number(text)?
        .map(|n| match u32::try_from(n) {
            Ok(0) => Err("Must be at least 1"),
            Ok(rate) if rate <= RPM_MAX => Ok(rate),
            _ => Err("Must be at most 60,000,000"),
        })
        .transpose()
}

pub fn check_number(text: &str) -> Result<(), &'static str> {
    optional_number(text).map(drop)
}

pub fn check_rate(text: &str) -> Result<(), &'static str> {
    optional_rate(text).map(drop)
}

pub fn check_email(text: &str) -> Result<(), &'static str> {
    match text.trim().split_once('@') {
        Some((local, domain)) if !local.is_empty() && !domain.is_empty() => Ok(()),
        _ => Err("Enter an email address"),
    }
}

/// Trims a field's text. Returns `None` if the field is empty.
pub fn optional_text(text: &str) -> Option<String> {
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// Formats metadata for editing: one `name=value` pair per line.
pub fn metadata_text(metadata: &Metadata) -> String {
    let lines: Vec<_> = metadata
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    lines.join("\n")
}

/// Parses metadata in the format of [`metadata_text`].
pub fn metadata(text: &str) -> Result<Metadata, &'static str> {
    let lines = text.lines().filter(|line| !line.trim().is_empty());
    lines
        .map(|line| {
            let (name, value) = line.split_once('=')?;
            Some((name.trim().to_owned(), value.trim().to_owned()))
        })
        .collect::<Option<_>>()
        .ok_or("Enter one name=value pair per line")
}

pub fn check_metadata(text: &str) -> Result<(), &'static str> {
    metadata(text).map(drop)
}

/// Returns the new value if it differs from the old value. Unchanged fields are not sent, so that an edit does not undo
/// changes made by other users.
pub fn changed<T: PartialEq>(was: &T, now: T) -> Option<T> {
    (*was != now).then_some(now)
}

pub fn plan_changes(was: &CreatePlan, now: CreatePlan) -> UpdatePlan {
    UpdatePlan {
        name: changed(&was.name, now.name),
        default_rpm: changed(&was.default_rpm, now.default_rpm),
        // If the field is blank, send the rate as the burst: if both are equal, the burst follows changes to the rate.
        burst: changed(&was.burst, now.burst)
            .map(|burst| burst.unwrap_or_else(|| u32::from(now.default_rpm).into())),
        daily_quota: changed(&was.daily_quota, now.daily_quota),
        monthly_quota: changed(&was.monthly_quota, now.monthly_quota),
        strict: changed(&was.strict, now.strict).flatten(),
        on_redis_failure: changed(&was.on_redis_failure, now.on_redis_failure),
        billing: changed(&was.billing, now.billing).flatten(),
    }
}

/// Returns the name for a copy of a plan, truncated to the maximum length of a name.
pub fn copy_name(name: &str) -> String {
    const SUFFIX: &str = " (copy)";
    let kept = NAME_MAX - SUFFIX.len();
    let start: String = name.chars().take(kept).collect();
    format!("{start}{SUFFIX}")
}

/// Returns the page to open after sign-in. Ignores URLs outside the console.
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
    use quota_common::plan::Billing;

    use super::*;

    #[test]
    fn metadata_is_read_as_it_was_written() {
        let entries = [("crm.id", "42"), ("note", "a=b, c"), ("empty", "")];
        let entries = entries.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let own: Metadata = entries.into_iter().collect();
        assert_eq!(metadata_text(&own), "crm.id=42\nnote=a=b, c\nempty=");
        assert_eq!(metadata(&metadata_text(&own)), Ok(own));
        let typed = metadata(" region = eu \r\n\n").expect("an entry");
        assert_eq!(metadata_text(&typed), "region=eu");
        assert_eq!(metadata(" \n"), Ok(Metadata::default()));
        assert!(check_metadata("region").is_err());
    }

    #[test]
    fn numbers_may_have_separators() {
        assert_eq!(optional_number(" "), Ok(None));
        assert_eq!(optional_number("50 000"), Ok(Some(50_000)));
        assert_eq!(optional_number("50,000"), Ok(Some(50_000)));
        assert!(check_number("-1").is_err() && check_number("1.5").is_err());
        assert_eq!(optional_rate(""), Ok(None));
        assert_eq!(optional_rate("60,000,000"), Ok(Some(RPM_MAX)));
        assert_eq!(check_rate("60,000,001"), Err("Must be at most 60,000,000"));
        assert_eq!(check_rate("9999999999"), Err("Must be at most 60,000,000"));
        assert_eq!(check_rate("0"), Err("Must be at least 1"));
    }

    #[test]
    fn email_needs_two_parts() {
        assert_eq!(check_email(" ada@example.com "), Ok(()));
        for text in ["", "ada", "ada@", "@example.com"] {
            assert!(check_email(text).is_err(), "{text}");
        }
    }

    #[test]
    fn only_changed_fields_are_sent() {
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
        let (free, paid) = [Billing::Free, Billing::Paid]
            .map(|billing| CreatePlan {
                billing: Some(billing),
                ..before.clone()
            })
            .into();
        assert_eq!(plan_changes(&free, paid).billing, Some(Billing::Paid));
    }

    #[test]
    fn copy_has_a_valid_name() {
        assert_eq!(copy_name("Starter"), "Starter (copy)");
        let longest = "é".repeat(NAME_MAX);
        assert_eq!(copy_name(&longest).chars().count(), NAME_MAX);
        assert!(copy_name(&longest).ends_with("é (copy)"));
    }

    #[test]
    fn next_page_never_leaves_the_console() {
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
