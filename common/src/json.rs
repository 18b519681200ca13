//! Parses the server's responses in the console.
//!
//! With serde, the parsers for all types would make up a tenth of the console's download. Instead, this module parses
//! text into [`Json`], from which each type takes its fields. Errors contain no message, because the console would not
//! show it. Unknown fields are ignored, and missing fields are treated as `null`.

use std::collections::BTreeMap;

use serde_json::{Map, Value};
use uuid::Uuid;

use crate::{
    id::{
        ApiKeyId, AuditEventId, PlanId, QuotaAlertId, ServiceTokenId, SessionId, TenantId, UserId,
        WebhookDeliveryId, WebhookId,
    },
    time::Timestamp,
};

/// The text is not JSON or does not match the expected type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Invalid;

#[derive(Debug, Clone, PartialEq)]
pub enum Json {
    Null,
    Bool(bool),
    /// The number as it was written.
    Number(String),
    String(String),
    Array(Vec<Json>),
    Object(Fields),
}

#[derive(Debug, Clone, PartialEq)]
pub struct Fields(Vec<(String, Json)>);

impl Fields {
    /// Removes and returns a field. Returns `null` if it is missing.
    pub fn take(&mut self, name: &str) -> Json {
        let at = self.0.iter().position(|(it, _)| it == name);
        at.map_or(Json::Null, |at| self.0.swap_remove(at).1)
    }

    pub fn read<T: FromJson>(&mut self, name: &str) -> Result<T, Invalid> {
        T::from_json(self.take(name))
    }
}

pub trait FromJson: Sized {
    fn from_json(json: Json) -> Result<Self, Invalid>;
}

pub fn read<T: FromJson>(text: &str) -> Result<T, Invalid> {
    T::from_json(parse(text)?)
}

impl Json {
    pub fn fields(self) -> Result<Fields, Invalid> {
        match self {
            Self::Object(fields) => Ok(fields),
            _ => Err(Invalid),
        }
    }

    /// Returns the fields of an object that has only strings as values.
    pub fn entries(self) -> Result<Vec<(String, String)>, Invalid> {
        let fields = self.fields()?.0.into_iter();
        fields.map(|(name, it)| Ok((name, it.string()?))).collect()
    }

    pub fn string(self) -> Result<String, Invalid> {
        match self {
            Self::String(text) => Ok(text),
            _ => Err(Invalid),
        }
    }

    fn array(self) -> Result<Vec<Self>, Invalid> {
        match self {
            Self::Array(items) => Ok(items),
            _ => Err(Invalid),
        }
    }

    fn number(self) -> Result<String, Invalid> {
        match self {
            Self::Number(text) => Ok(text),
            _ => Err(Invalid),
        }
    }
}

impl FromJson for () {
    fn from_json(_: Json) -> Result<Self, Invalid> {
        Ok(())
    }
}

impl FromJson for bool {
    fn from_json(json: Json) -> Result<Self, Invalid> {
        match json {
            Json::Bool(it) => Ok(it),
            _ => Err(Invalid),
        }
    }
}

macro_rules! integers {
    ($($name:ident)+) => {$(
        impl FromJson for $name {
            fn from_json(json: Json) -> Result<Self, Invalid> {
                json.number()?.parse().map_err(|_| Invalid)
            }
        }
    )+};
}
integers!(u16 u32 u64);

impl FromJson for f64 {
    fn from_json(json: Json) -> Result<Self, Invalid> {
        json.number().map(|text| float(&text))
    }
}

impl FromJson for String {
    fn from_json(json: Json) -> Result<Self, Invalid> {
        json.string()
    }
}

impl<T: FromJson> FromJson for Option<T> {
    fn from_json(json: Json) -> Result<Self, Invalid> {
        match json {
            Json::Null => Ok(None),
            json => T::from_json(json).map(Some),
        }
    }
}

impl<T: FromJson> FromJson for Vec<T> {
    fn from_json(json: Json) -> Result<Self, Invalid> {
        json.array()?.into_iter().map(T::from_json).collect()
    }
}

impl FromJson for BTreeMap<String, String> {
    fn from_json(json: Json) -> Result<Self, Invalid> {
        json.entries().map(Self::from_iter)
    }
}

/// Implements [`FromJson`] for types that are strings in JSON.
macro_rules! parsed {
    ($($name:ty),+) => {$(
        impl FromJson for $name {
            fn from_json(json: Json) -> Result<Self, Invalid> {
                json.string()?.parse().map_err(|_| Invalid)
            }
        }
    )+};
}
parsed!(
    Uuid,
    Timestamp,
    ApiKeyId,
    AuditEventId,
    PlanId,
    QuotaAlertId,
    ServiceTokenId,
    SessionId,
    TenantId,
    UserId,
    WebhookDeliveryId,
    WebhookId
);

/// Arbitrary JSON, as in audit events and in the payloads of webhook deliveries.
impl FromJson for Value {
    fn from_json(json: Json) -> Result<Self, Invalid> {
        Ok(match json {
            Json::Null => Self::Null,
            Json::Bool(it) => Self::Bool(it),
            Json::Number(text) => match (text.parse::<u64>(), text.parse::<i64>()) {
                (Ok(n), _) => n.into(),
                (_, Ok(n)) => n.into(),
                _ => float(&text).into(),
            },
            Json::String(text) => Self::String(text),
            Json::Array(items) => {
                let items: Result<_, _> = items.into_iter().map(Self::from_json).collect();
                Self::Array(items?)
            }
            Json::Object(Fields(fields)) => {
                let mut object = Map::new();
                for (name, value) in fields {
                    object.insert(name, Self::from_json(value)?);
                }
                Self::Object(object)
            }
        })
    }
}

/// Larger exponents, positive or negative, are clamped to this limit. Clamping makes no difference, because the number
/// is zero or infinity with either exponent.
const MAX_EXPONENT: i32 = 1_000_000_000;

/// Parses a floating-point number. The last bits can differ from the exact result: the standard library's exact
/// algorithm needs tables that would add ten kilobytes to the download.
fn float(text: &str) -> f64 {
    let (digits, exponent) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
    let mut exponent = match exponent.parse::<i32>() {
        Ok(exponent) => exponent.clamp(-MAX_EXPONENT, MAX_EXPONENT),
        Err(_) if exponent.starts_with('-') => -MAX_EXPONENT,
        Err(_) => MAX_EXPONENT,
    };
    let (mut value, mut in_fraction) = (0.0, false);
    for digit in digits.bytes() {
        match digit {
            b'.' => in_fraction = true,
            b'0'..=b'9' => {
                value = value * 10.0 + f64::from(digit - b'0');
                exponent -= i32::from(in_fraction);
            }
            _ => {}
        }
    }
    // Zero times an infinite power of ten would be NaN.
    value = if value == 0.0 {
        0.0
    } else if exponent < 0 {
        value / 10_f64.powi(-exponent)
    } else {
        value * 10_f64.powi(exponent)
    };
    if text.starts_with('-') { -value } else { value }
}

/// The maximum nesting depth, which keeps parsing from overflowing the stack.
const MAX_DEPTH: u32 = 100;

fn parse(text: &str) -> Result<Json, Invalid> {
    let mut parser = Parser { text, at: 0 };
    let value = parser.value(MAX_DEPTH)?;
    match parser.peek() {
        None => Ok(value),
        Some(_) => Err(Invalid),
    }
}

struct Parser<'a> {
    text: &'a str,
    /// The index of the next byte to read.
    at: usize,
}

impl Parser<'_> {
    /// Skips whitespace, and returns the next byte without consuming it.
    fn peek(&mut self) -> Option<u8> {
        let rest = &self.text.as_bytes()[self.at..];
        let blank = |byte: &u8| matches!(byte, b' ' | b'\n' | b'\r' | b'\t');
        self.at += rest.iter().take_while(|byte| blank(byte)).count();
        self.text.as_bytes().get(self.at).copied()
    }

    fn expect(&mut self, text: &str) -> Result<(), Invalid> {
        if !self.text[self.at..].starts_with(text) {
            return Err(Invalid);
        }
        self.at += text.len();
        Ok(())
    }

    /// Skips whitespace. If the next byte is `byte`, consumes it and returns `true`.
    fn skip(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    fn value(&mut self, depth: u32) -> Result<Json, Invalid> {
        let depth = depth.checked_sub(1).ok_or(Invalid)?;
        match self.peek().ok_or(Invalid)? {
            b'n' => self.expect("null").map(|()| Json::Null),
            b't' => self.expect("true").map(|()| Json::Bool(true)),
            b'f' => self.expect("false").map(|()| Json::Bool(false)),
            b'"' => self.string().map(Json::String),
            b'[' => self.array(depth),
            b'{' => self.object(depth),
            b'-' | b'0'..=b'9' => Ok(self.number()),
            _ => Err(Invalid),
        }
    }

    fn array(&mut self, depth: u32) -> Result<Json, Invalid> {
        self.at += 1;
        let mut items = Vec::new();
        if self.skip(b']') {
            return Ok(Json::Array(items));
        }
        loop {
            items.push(self.value(depth)?);
            if self.skip(b']') {
                return Ok(Json::Array(items));
            }
            if !self.skip(b',') {
                return Err(Invalid);
            }
        }
    }

    fn object(&mut self, depth: u32) -> Result<Json, Invalid> {
        self.at += 1;
        let mut fields = Vec::new();
        if self.skip(b'}') {
            return Ok(Json::Object(Fields(fields)));
        }
        loop {
            if self.peek() != Some(b'"') {
                return Err(Invalid);
            }
            let name = self.string()?;
            if !self.skip(b':') {
                return Err(Invalid);
            }
            fields.push((name, self.value(depth)?));
            if self.skip(b'}') {
                return Ok(Json::Object(Fields(fields)));
            }
            if !self.skip(b',') {
                return Err(Invalid);
            }
        }
    }

    fn number(&mut self) -> Json {
        let rest = &self.text[self.at..];
        let part = |c: char| matches!(c, '0'..='9' | '-' | '+' | '.' | 'e' | 'E');
        let end = rest.find(|c| !part(c)).unwrap_or(rest.len());
        self.at += end;
        Json::Number(rest[..end].to_owned())
    }

    fn string(&mut self) -> Result<String, Invalid> {
        self.at += 1;
        let mut out = String::new();
        loop {
            let rest = &self.text[self.at..];
            let end = rest.find(['"', '\\']).ok_or(Invalid)?;
            out.push_str(&rest[..end]);
            self.at += end + 1;
            if rest.as_bytes()[end] == b'"' {
                return Ok(out);
            }
            let escape = *self.text.as_bytes().get(self.at).ok_or(Invalid)?;
            self.at += 1;
            out.push(match escape {
                b'"' | b'\\' | b'/' => char::from(escape),
                b'n' => '\n',
                b't' => '\t',
                b'r' => '\r',
                b'b' => '\u{8}',
                b'f' => '\u{c}',
                b'u' => self.escaped_char()?,
                _ => return Err(Invalid),
            });
        }
    }

    fn escaped_char(&mut self) -> Result<char, Invalid> {
        let mut code = self.hex()?;
        if (0xd800..0xdc00).contains(&code) {
            self.expect("\\u")?;
            let low = self.hex()?.wrapping_sub(0xdc00);
            if low >= 0x400 {
                return Err(Invalid);
            }
            code = 0x1_0000 + ((code - 0xd800) << 10) + low;
        }
        char::from_u32(code).ok_or(Invalid)
    }

    fn hex(&mut self) -> Result<u32, Invalid> {
        let digits = self.text.get(self.at..self.at + 4).ok_or(Invalid)?;
        self.at += 4;
        // `from_str_radix` would also accept a plus sign.
        if !digits.bytes().all(|it| it.is_ascii_hexdigit()) {
            return Err(Invalid);
        }
        u32::from_str_radix(digits, 16).map_err(|_| Invalid)
    }
}

#[cfg(test)]
mod tests;
