//! Usage as CSV (RFC 4180), for spreadsheets.
//!
//! API consumers can choose the names of endpoints, and spreadsheets evaluate cells that look like formulas. Such cells
//! are prefixed with an apostrophe, which turns them into text.

use std::{borrow::Cow, cmp::Reverse};

use mime::Mime;
use poem::{
    Response,
    http::{HeaderMap, HeaderValue, header},
};
use poem_openapi::registry::{MetaSchema, MetaSchemaRef};
use quota_common::usage::Usage;

use crate::{
    api::{large_response, problem::ApiError},
    limiter::Zone,
};

pub(super) const MEDIA_TYPE: &str = "text/csv; charset=utf-8";

const COLUMNS: [&str; 12] = [
    "start",
    "local_start",
    "key_id",
    "name",
    "endpoint",
    "policy",
    "plan_id",
    "other",
    "allowed",
    "rejected",
    "allowed_cost",
    "rejected_cost",
];

/// Returns whether the client prefers CSV to JSON (RFC 9110, section 12.5.1). If the quality values are equal, the
/// format that is listed first is preferred, or JSON if neither format is listed by name.
pub(super) fn is_preferred(headers: &HeaderMap) -> bool {
    let accepted: Vec<(Mime, f32)> = headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|it| it.to_str().ok())
        .flat_map(|it| it.split(','))
        .filter_map(|it| {
            let range = it.trim().parse::<Mime>().ok()?;
            let quality = match range.get_param("q") {
                None => 1.0,
                Some(value) => value.as_str().parse().ok()?,
            };
            (0.0..=1.0).contains(&quality).then_some((range, quality))
        })
        .collect();
    // Returns the quality of the most specific range that includes a media type, and the position of the media type
    // itself in the list. An earlier position is better.
    let preference = |ranges: [&str; 3]| {
        let find = |wanted| {
            accepted
                .iter()
                .position(|(it, _)| it.essence_str() == wanted)
        };
        let explicit = find(ranges[0]);
        let found = ranges.into_iter().find_map(find);
        let quality = found.map_or(0.0, |index| accepted[index].1);
        (quality, Reverse(explicit.unwrap_or(usize::MAX)))
    };
    let csv = preference(["text/csv", "text/*", "*/*"]);
    let json = preference(["application/json", "application/*", "*/*"]);
    csv.0 > 0.0 && csv > json
}

/// Returns the schema of a CSV file, with an example.
pub(super) fn schema() -> MetaSchemaRef {
    let line =
        "2026-08-03T00:00:00.000Z,2026-08-03T02:00:00+02:00,,,GET /orders,,,false,1204,38,1204,38";
    MetaSchemaRef::Inline(Box::new(MetaSchema {
        example: Some(format!("{}\r\n{line}\r\n", COLUMNS.join(",")).into()),
        ..MetaSchema::new("string")
    }))
}

/// Returns the cell in a form that spreadsheets do not evaluate.
fn cell(text: &str) -> Cow<'_, str> {
    let is_formula =
        text.starts_with(['=', '+', '-', '@', '\t', '\r', '\n', '＝', '＋', '－', '＠']);
    if is_formula {
        Cow::Owned(format!("'{text}"))
    } else {
        Cow::Borrowed(text)
    }
}

/// Returns the content of the file: a header line, and one line for each element of `usage.buckets`.
pub(super) fn write(usage: &Usage, zone: &Zone) -> Result<String, ApiError> {
    let failed = |error: ::csv::Error| ApiError::internal(error);
    let mut writer = ::csv::WriterBuilder::new()
        .terminator(::csv::Terminator::CRLF)
        .from_writer(Vec::new());
    writer.write_record(COLUMNS).map_err(failed)?;
    for it in &usage.buckets {
        let group = usage.groups.iter().find(|group| {
            group.other == it.other && (group.key_id, group.plan_id) == (it.key_id, it.plan_id)
        });
        let name = group
            .and_then(|group| group.name.as_deref())
            .unwrap_or_default();
        let text = |value: &Option<String>| value.as_deref().map(|it| cell(it).into_owned());
        writer
            .write_record([
                it.start.to_string(),
                zone.local(super::range::nanos(it.start.inner())),
                it.key_id.map(|id| id.to_string()).unwrap_or_default(),
                cell(name).into_owned(),
                text(&it.endpoint).unwrap_or_default(),
                text(&it.policy).unwrap_or_default(),
                it.plan_id.map(|id| id.to_string()).unwrap_or_default(),
                it.other.to_string(),
                it.allowed.to_string(),
                it.rejected.to_string(),
                it.allowed_cost.to_string(),
                it.rejected_cost.to_string(),
            ])
            .map_err(failed)?;
    }
    let bytes = writer
        .into_inner()
        .map_err(|error| ApiError::internal(error.to_string()))?;
    String::from_utf8(bytes).map_err(ApiError::internal)
}

pub(super) fn respond(text: String) -> Response {
    let length = text.len();
    let mut response = Response::builder().body(text);
    large_response::mark(&mut response, length);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
    headers.insert(
        header::CONTENT_DISPOSITION,
        HeaderValue::from_static("attachment; filename=\"usage.csv\""),
    );
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_that_a_spreadsheet_would_evaluate_become_text() {
        for formula in [
            "=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1",
        ] {
            assert_eq!(cell(formula), format!("'{formula}"));
        }
        for harmless in ["", "GET /orders", "a=b", "1-2", "'=1"] {
            assert_eq!(cell(harmless), harmless);
        }
    }

    #[test]
    fn format_is_the_one_that_the_client_prefers() {
        let chosen = |fields: &[&str]| {
            let mut headers = HeaderMap::new();
            for field in fields {
                headers.append(header::ACCEPT, field.parse().unwrap());
            }
            if is_preferred(&headers) {
                "csv"
            } else {
                "json"
            }
        };
        for (accept, format) in [
            ("text/csv", "csv"),
            ("text/csv;charset=utf-8", "csv"),
            ("TEXT/CSV", "csv"),
            ("text/*", "csv"),
            ("application/json", "json"),
            ("application/*", "json"),
            ("*/*", "json"),
            ("image/png", "json"),
            // If the quality values are equal, the format that is named first is used, or the only one that is named.
            ("text/csv, application/json", "csv"),
            ("application/json, text/csv", "json"),
            ("text/csv, */*", "csv"),
            ("*/*, text/csv", "csv"),
            ("text/csv;q=0.9, application/json", "json"),
            ("application/json;q=0.5, text/csv;q=0.8", "csv"),
            ("text/csv;charset=utf-8;q=0.1, */*;q=0.2", "json"),
            ("text/csv;q=0", "json"),
            ("text/csv;q=0, */*", "json"),
            ("application/json;q=0, */*", "csv"),
            ("application/json;Q=0.5, text/csv", "csv"),
            // An element with an invalid quality value is ignored.
            ("text/csv;q=high, application/json;q=0.1", "json"),
            ("text/csv;q=2, application/json;q=0.1", "json"),
            (
                "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
                "json",
            ),
        ] {
            assert_eq!(chosen(&[accept]), format, "{accept}");
        }
        assert_eq!(chosen(&[]), "json");
        assert_eq!(chosen(&["application/json;q=0.5", "text/csv"]), "csv");
    }
}
