//! Access to the header fields of a request, regardless of how they are stored.

use poem::http::{HeaderMap, HeaderValue};

use crate::plain_request::PlainRequest;

pub trait Fields: Sync {
    /// Returns the values of a field in order. `name` must be lowercase.
    fn values<'a>(&'a self, name: &str) -> impl DoubleEndedIterator<Item = &'a [u8]>;
}

impl Fields for HeaderMap {
    fn values<'a>(&'a self, name: &str) -> impl DoubleEndedIterator<Item = &'a [u8]> {
        self.get_all(name).iter().map(HeaderValue::as_bytes)
    }
}

impl Fields for PlainRequest<'_> {
    #[inline]
    fn values<'a>(&'a self, name: &str) -> impl DoubleEndedIterator<Item = &'a [u8]> {
        self.field(name).into_iter()
    }
}

/// Returns a value as text if it contains only visible ASCII characters, spaces, and tabs.
pub fn text(value: &[u8]) -> Option<&str> {
    // Branch-free, so that the compiler can vectorize the check.
    let is_text = value.iter().fold(true, |is_text, byte| {
        is_text & ((*byte == b'\t') | (b' '..0x7f).contains(byte))
    });
    if is_text {
        str::from_utf8(value).ok()
    } else {
        None
    }
}

/// The value of a field that may be sent at most once.
pub enum Sent<'a> {
    Never,
    Once(&'a str),
    Several,
}

impl<'a> Sent<'a> {
    #[inline]
    pub fn of(fields: &'a impl Fields, name: &str) -> Self {
        let mut values = fields.values(name);
        match (values.next(), values.next()) {
            (None, _) => Self::Never,
            // A value that is not text becomes `?`, which is invalid in every such field.
            (Some(value), None) => Self::Once(text(value).unwrap_or("?").trim_ascii()),
            (Some(_), Some(_)) => Self::Several,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_what_the_http_crate_considers_text() {
        for byte in 0..=u8::MAX {
            let value = [b'a', byte];
            let expected = HeaderValue::from_bytes(&value);
            let expected = expected.as_ref().ok().and_then(|it| it.to_str().ok());
            assert_eq!(text(&value), expected, "{byte}");
        }
    }
}
