//! Pages of lists: what is asked for, and where the next one begins.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::{DateTime, Datelike as _, Utc};
use poem_openapi::types::{ParseFromJSON, ToJSON};
use quota_common::{
    Page, ProblemCode,
    page::{DEFAULT_LIMIT, MAX_LIMIT},
};
use uuid::Uuid;

use super::problem::ApiError;
use crate::repo::{By, Mark, Order, Rows, Slice, SortedSlice};

/// A cursor begins with its form. This one holds an id: of a list that is read newest first.
const ID: u8 = 1;
/// This one holds an order, an id, and what the row with that id was ordered by.
const SORTED: u8 = 2;

/// Reads `?limit=&cursor=`.
pub fn slice(limit: Option<u32>, cursor: Option<&str>) -> Result<Slice, ApiError> {
    let limit = checked(limit)?;
    let after = cursor.map(read).transpose()?;
    Ok(Slice { after, limit })
}

/// The same, of a list that can be read in this order.
pub fn sorted(
    order: Order,
    limit: Option<u32>,
    cursor: Option<&str>,
) -> Result<SortedSlice, ApiError> {
    let limit = checked(limit)?;
    let after = cursor
        .map(|cursor| read_sorted(order, cursor))
        .transpose()?;
    Ok(SortedSlice {
        order,
        after,
        limit,
    })
}

fn checked(limit: Option<u32>) -> Result<u32, ApiError> {
    let limit = limit.unwrap_or(DEFAULT_LIMIT);
    if !(1..=MAX_LIMIT).contains(&limit) {
        return Err(ApiError::invalid(
            "limit",
            format!("must be between 1 and {MAX_LIMIT}"),
        ));
    }
    Ok(limit)
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
    by: By::Made,
    descending: true,
};

const fn code(order: Order) -> u8 {
    let by = match order.by {
        By::Made => b'm',
        By::Name => b'n',
        By::LastUsed => b'u',
    };
    if order.descending {
        by.to_ascii_uppercase()
    } else {
        by
    }
}

fn read_sorted(order: Order, cursor: &str) -> Result<(Mark, Uuid), ApiError> {
    if order == NEWEST_FIRST {
        return Ok((Mark::Made, read(cursor)?));
    }
    let bytes = URL_SAFE_NO_PAD.decode(cursor).map_err(|_| malformed())?;
    let rest = bytes
        .strip_prefix(&[SORTED, code(order)])
        .ok_or_else(malformed)?;
    let (id, rest) = rest.split_at_checked(16).ok_or_else(malformed)?;
    let id = Uuid::from_slice(id).map_err(|_| malformed())?;
    let mark = match order.by {
        By::Made if rest.is_empty() => Mark::Made,
        By::Name => std::str::from_utf8(rest)
            .ok()
            // PostgreSQL knows no such text.
            .filter(|name| !name.contains('\0'))
            .map(|name| Mark::Name(name.to_owned()))
            .ok_or_else(malformed)?,
        By::LastUsed if rest.is_empty() => Mark::LastUsed(None),
        By::LastUsed => {
            let micros = rest.try_into().map_err(|_| malformed())?;
            let at = DateTime::from_timestamp_micros(i64::from_be_bytes(micros));
            Mark::LastUsed(Some(at.filter(is_storable).ok_or_else(malformed)?))
        }
        By::Made => return Err(malformed()),
    };
    Ok((mark, id))
}

/// PostgreSQL's times begin in 4713 BC; ours have a year of four digits.
fn is_storable(at: &DateTime<Utc>) -> bool {
    (0..=9999).contains(&at.year())
}

fn write_sorted(order: Order, mark: &Mark, id: Uuid) -> String {
    if order == NEWEST_FIRST {
        return write(id);
    }
    let mut bytes = vec![SORTED, code(order)];
    bytes.extend_from_slice(id.as_bytes());
    match mark {
        Mark::Made | Mark::LastUsed(None) => {}
        Mark::Name(name) => bytes.extend_from_slice(name.as_bytes()),
        Mark::LastUsed(Some(at)) => bytes.extend_from_slice(&at.timestamp_micros().to_be_bytes()),
    }
    URL_SAFE_NO_PAD.encode(bytes)
}

/// The page that shows some rows.
pub fn page<R, T: ParseFromJSON + ToJSON>(
    rows: Rows<R>,
    id: impl Fn(&R) -> Uuid,
    show: impl Fn(R) -> T,
) -> Page<T> {
    shown(rows, |row| write(id(row)), show)
}

/// The same, in this order; `at` tells of a row what that is by, and the id.
pub fn sorted_page<R, T: ParseFromJSON + ToJSON>(
    rows: Rows<R>,
    order: Order,
    at: impl Fn(&R, By) -> (Mark, Uuid),
    show: impl Fn(R) -> T,
) -> Page<T> {
    let cursor = |row: &R| {
        let (mark, id) = at(row, order.by);
        write_sorted(order, &mark, id)
    };
    shown(rows, cursor, show)
}

fn shown<R, T: ParseFromJSON + ToJSON>(
    rows: Rows<R>,
    cursor: impl Fn(&R) -> String,
    show: impl Fn(R) -> T,
) -> Page<T> {
    let last = rows.rows.last().filter(|_| rows.more);
    let next_cursor = last.map(cursor);
    Page {
        items: rows.rows.into_iter().map(show).collect(),
        next_cursor,
        total: rows.total,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn order() -> impl Strategy<Value = Order> {
        let by = prop_oneof![Just(By::Made), Just(By::Name), Just(By::LastUsed)];
        (by, any::<bool>()).prop_map(|(by, descending)| Order { by, descending })
    }

    proptest! {
        #[test]
        fn every_cursor_is_read_back(id: u128) {
            let id = Uuid::from_u128(id);
            prop_assert_eq!(read(&write(id)).unwrap(), id);
        }

        #[test]
        fn every_cursor_is_read_back_in_its_order_alone(
            id: u128,
            order in order(),
            other in order(),
            name in "[^\0]{0,200}",
            micros in proptest::option::of(0_i64..4_000_000_000_000_000),
        ) {
            let mark = match order.by {
                By::Made => Mark::Made,
                By::Name => Mark::Name(name),
                By::LastUsed => Mark::LastUsed(micros.and_then(DateTime::from_timestamp_micros)),
            };
            let id = Uuid::from_u128(id);
            let cursor = write_sorted(order, &mark, id);
            prop_assert_eq!(read_sorted(order, &cursor).unwrap(), (mark, id));
            prop_assert!(other == order || read_sorted(other, &cursor).is_err());
        }

        #[test]
        fn no_text_makes_it_panic(text: String, bytes: Vec<u8>, order in order()) {
            for cursor in [text, URL_SAFE_NO_PAD.encode(&bytes), URL_SAFE_NO_PAD.encode([&[SORTED, code(order)][..], &bytes].concat())] {
                let _ = read(&cursor);
                let _ = read_sorted(order, &cursor);
            }
        }
    }
}
