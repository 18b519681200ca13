//! Pagination: parses `limit` and `cursor`, and creates the cursor of the next page.

use std::borrow::Cow;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::{DateTime, Datelike as _, Utc};
use poem_openapi::{
    registry::{MetaSchema, MetaSchemaRef},
    types::{ParseError, ParseFromJSON, ParseFromParameter, ParseResult, ToJSON, Type},
};
use quota_common::{
    Page, ProblemCode,
    page::{DEFAULT_LIMIT, MAX_LIMIT},
};
use uuid::Uuid;

use super::problem::ApiError;
use crate::repo::{CursorKey, Order, Rows, Slice, SortBy, Sorted, SortedSlice};

/// The `limit` parameter, from 1 to [`MAX_LIMIT`].
#[derive(Debug, Clone, Copy)]
pub struct PageSize(u32);

impl Type for PageSize {
    const IS_REQUIRED: bool = true;
    type RawValueType = Self;
    type RawElementValueType = Self;

    // The name must not be that of `u32`, because error messages depend on the name of the type.
    fn name() -> Cow<'static, str> {
        "PageSize".into()
    }

    fn schema_ref() -> MetaSchemaRef {
        u32::schema_ref().merge(MetaSchema {
            minimum: Some(1.0),
            maximum: Some(f64::from(MAX_LIMIT)),
            ..MetaSchema::ANY
        })
    }

    fn as_raw_value(&self) -> Option<&Self> {
        Some(self)
    }

    fn raw_element_iter<'a>(&'a self) -> Box<dyn Iterator<Item = &'a Self> + 'a> {
        Box::new(std::iter::once(self))
    }
}

impl ParseFromParameter for PageSize {
    fn parse_from_parameter(value: &str) -> ParseResult<Self> {
        match value.parse() {
            Ok(size) if (1..=MAX_LIMIT).contains(&size) => Ok(Self(size)),
            _ => Err(ParseError::custom(format_args!(
                "must be between 1 and {MAX_LIMIT}"
            ))),
        }
    }
}

/// The first byte of a cursor that contains only an ID. Used for lists that are sorted newest first.
const ID: u8 = 1;
/// The first byte of a cursor that contains a sort order, an ID and, if the list is sorted by name or last use, the
/// value by which the row with that ID is sorted.
const SORTED: u8 = 2;

/// Parses `limit` and `cursor` for a list that is always sorted newest first.
pub fn slice(limit: Option<PageSize>, cursor: Option<&str>) -> Result<Slice, ApiError> {
    Ok(Slice {
        after: cursor.map(read).transpose()?,
        limit: size(limit),
    })
}

/// Parses `limit` and `cursor` for a list in this sort order.
pub fn sorted(
    order: Order,
    limit: Option<PageSize>,
    cursor: Option<&str>,
) -> Result<SortedSlice, ApiError> {
    let after = cursor.map(|cursor| read_sorted(order, cursor));
    Ok(SortedSlice {
        order,
        after: after.transpose()?,
        limit: size(limit),
    })
}

pub fn size(limit: Option<PageSize>) -> u32 {
    limit.map_or(DEFAULT_LIMIT, |limit| limit.0)
}

/// Checks a string that filters a list. An empty string means no filter. Rejects NUL, which PostgreSQL text cannot
/// contain.
pub fn filter(name: &'static str, text: Option<String>) -> Result<Option<String>, ApiError> {
    match text {
        Some(text) if text.contains('\0') => {
            Err(ApiError::invalid(name, "must not contain NUL characters"))
        }
        text => Ok(text.filter(|text| !text.is_empty())),
    }
}

fn malformed() -> ApiError {
    ApiError::new(
        ProblemCode::Malformed,
        "Invalid cursor for this sort order.",
    )
}

fn read(cursor: &str) -> Result<Uuid, ApiError> {
    let bytes = URL_SAFE_NO_PAD.decode(cursor).map_err(|_| malformed())?;
    match bytes.split_first() {
        Some((&ID, id)) => Uuid::from_slice(id).map_err(|_| malformed()),
        _ => Err(malformed()),
    }
}

fn write(id: Uuid) -> String {
    let mut bytes = vec![ID];
    bytes.extend_from_slice(id.as_bytes());
    URL_SAFE_NO_PAD.encode(bytes)
}

const NEWEST_FIRST: Order = Order {
    by: SortBy::CreatedAt,
    descending: true,
};

const fn code(order: Order) -> u8 {
    let by = match order.by {
        SortBy::CreatedAt => b'm',
        SortBy::Name => b'n',
        SortBy::LastUsed => b'u',
    };
    if order.descending {
        by.to_ascii_uppercase()
    } else {
        by
    }
}

fn read_sorted(order: Order, cursor: &str) -> Result<(CursorKey, Uuid), ApiError> {
    if order == NEWEST_FIRST {
        return Ok((CursorKey::CreatedAt, read(cursor)?));
    }
    let bytes = URL_SAFE_NO_PAD.decode(cursor).map_err(|_| malformed())?;
    let rest = bytes
        .strip_prefix(&[SORTED, code(order)])
        .ok_or_else(malformed)?;
    let (id, rest) = rest.split_at_checked(16).ok_or_else(malformed)?;
    let id = Uuid::from_slice(id).map_err(|_| malformed())?;
    let cursor_key = match order.by {
        SortBy::CreatedAt if rest.is_empty() => CursorKey::CreatedAt,
        SortBy::Name => std::str::from_utf8(rest)
            .ok()
            // PostgreSQL text cannot contain NUL.
            .filter(|name| !name.contains('\0'))
            .map(|name| CursorKey::Name(name.to_owned()))
            .ok_or_else(malformed)?,
        SortBy::LastUsed if rest.is_empty() => CursorKey::LastUsed(None),
        SortBy::LastUsed => {
            let micros = rest.try_into().map_err(|_| malformed())?;
            let at = DateTime::from_timestamp_micros(i64::from_be_bytes(micros));
            CursorKey::LastUsed(Some(at.filter(is_storable).ok_or_else(malformed)?))
        }
        SortBy::CreatedAt => return Err(malformed()),
    };
    Ok((cursor_key, id))
}

/// Returns whether the year is from 0 to 9999, as in every time that Quota stores. PostgreSQL supports all of these
/// years.
fn is_storable(at: &DateTime<Utc>) -> bool {
    (0..=9999).contains(&at.year())
}

fn write_sorted(order: Order, cursor_key: &CursorKey, id: Uuid) -> String {
    if order == NEWEST_FIRST {
        return write(id);
    }
    let mut bytes = vec![SORTED, code(order)];
    bytes.extend_from_slice(id.as_bytes());
    match cursor_key {
        CursorKey::CreatedAt | CursorKey::LastUsed(None) => {}
        CursorKey::Name(name) => bytes.extend_from_slice(name.as_bytes()),
        CursorKey::LastUsed(Some(at)) => {
            bytes.extend_from_slice(&at.timestamp_micros().to_be_bytes());
        }
    }
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Returns a page of a list that is always sorted newest first.
pub fn page<R, T: ParseFromJSON + ToJSON>(
    rows: Rows<R>,
    id: impl Fn(&R) -> Uuid,
    item: impl Fn(R) -> T,
) -> Page<T> {
    with_cursor(rows, |row| write(id(row)), item)
}

/// Returns a page of a list in this sort order.
pub fn sorted_page<R: Sorted, T: ParseFromJSON + ToJSON + From<R>>(
    rows: Rows<R>,
    order: Order,
) -> Page<T> {
    let cursor = |row: &R| write_sorted(order, &row.cursor_key(order.by), row.id());
    with_cursor(rows, cursor, T::from)
}

fn with_cursor<R, T: ParseFromJSON + ToJSON>(
    rows: Rows<R>,
    cursor: impl Fn(&R) -> String,
    item: impl Fn(R) -> T,
) -> Page<T> {
    let last = rows.rows.last().filter(|_| rows.more);
    let next_cursor = last.map(cursor);
    Page {
        items: rows.rows.into_iter().map(item).collect(),
        next_cursor,
        total: rows.total,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn order() -> impl Strategy<Value = Order> {
        let by = prop_oneof![
            Just(SortBy::CreatedAt),
            Just(SortBy::Name),
            Just(SortBy::LastUsed)
        ];
        (by, any::<bool>()).prop_map(|(by, descending)| Order { by, descending })
    }

    proptest! {
        #[test]
        fn cursor_reads_back(id: u128) {
            let id = Uuid::from_u128(id);
            prop_assert_eq!(read(&write(id)).unwrap(), id);
        }

        #[test]
        fn sorted_cursor_reads_back_only_in_its_own_order(
            id: u128,
            order in order(),
            other in order(),
            name in "[^\0]{0,200}",
            micros in proptest::option::of(0_i64..4_000_000_000_000_000),
        ) {
            let cursor_key = match order.by {
                SortBy::CreatedAt => CursorKey::CreatedAt,
                SortBy::Name => CursorKey::Name(name),
                SortBy::LastUsed => CursorKey::LastUsed(micros.and_then(DateTime::from_timestamp_micros)),
            };
            let id = Uuid::from_u128(id);
            let cursor = write_sorted(order, &cursor_key, id);
            prop_assert_eq!(read_sorted(order, &cursor).unwrap(), (cursor_key, id));
            prop_assert!(other == order || read_sorted(other, &cursor).is_err());
        }

        #[test]
        fn arbitrary_text_does_not_panic(text: String, bytes: Vec<u8>, order in order()) {
            for cursor in [text, URL_SAFE_NO_PAD.encode(&bytes), URL_SAFE_NO_PAD.encode([&[SORTED, code(order)][..], &bytes].concat())] {
                let _ = read(&cursor);
                let _ = read_sorted(order, &cursor);
            }
        }
    }
}
