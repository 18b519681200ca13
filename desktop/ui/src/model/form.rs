//! What is typed into fields, as values.

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
