//! Pages of lists: what is asked for, and where the next one begins.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use poem_openapi::types::{ParseFromJSON, ToJSON};
use quota_common::{
    Page, ProblemCode,
    page::{DEFAULT_LIMIT, MAX_LIMIT},
};
use uuid::Uuid;

use super::problem::ApiError;
use crate::repo::{Rows, Slice};

/// So that a cursor of another form can come later.
const VERSION: u8 = 1;

/// Reads `?limit=&cursor=`.
pub fn slice(limit: Option<u32>, cursor: Option<&str>) -> Result<Slice, ApiError> {
    let limit = limit.unwrap_or(DEFAULT_LIMIT);
    if !(1..=MAX_LIMIT).contains(&limit) {
        return Err(ApiError::invalid(
            "limit",
            format!("must be from 1 to {MAX_LIMIT}"),
        ));
    }
    let after = cursor.map(read).transpose()?;
    Ok(Slice { after, limit })
}

fn read(cursor: &str) -> Result<Uuid, ApiError> {
    let malformed = || {
        ApiError::new(
            ProblemCode::Malformed,
            "The cursor is none that this server has given.",
        )
    };
    let bytes = URL_SAFE_NO_PAD.decode(cursor).map_err(|_| malformed())?;
    match bytes.split_first() {
        Some((&VERSION, id)) => Uuid::from_slice(id).map_err(|_| malformed()),
        _ => Err(malformed()),
    }
}

fn write(id: Uuid) -> String {
    let mut bytes = vec![VERSION];
    bytes.extend_from_slice(id.as_bytes());
    URL_SAFE_NO_PAD.encode(bytes)
}

/// The page that shows some rows.
pub fn page<R, T: ParseFromJSON + ToJSON>(
    rows: Rows<R>,
    id: impl Fn(&R) -> Uuid,
    show: impl Fn(R) -> T,
) -> Page<T> {
    let next_cursor = if rows.more {
        rows.rows.last().map(|row| write(id(row)))
    } else {
        None
    };
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

    proptest! {
        #[test]
        fn every_cursor_is_read_back(id: u128) {
            let id = Uuid::from_u128(id);
            prop_assert_eq!(read(&write(id)).unwrap(), id);
        }

        #[test]
        fn no_text_makes_it_panic(text: String) {
            let _ = read(&text);
        }
    }
}
