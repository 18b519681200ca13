//! PostgreSQL arrays whose elements are encoded as they are added.
//!
//! Diesel encodes an array from a `Vec`, element by element, only when the statement is executed. A batch of usage can
//! have hundreds of thousands of elements, so they are encoded when the batch is prepared, straight into the bytes that
//! are sent.

use std::{io::Write as _, marker::PhantomData};

use chrono::{DateTime, Utc};
use diesel::{
    pg::Pg,
    serialize::{self, IsNull, Output, ToSql},
    sql_types::{
        Array, BigInt, Bool, HasSqlType, Integer, Nullable, Text, Timestamptz, Uuid as SqlUuid,
    },
};
use uuid::Uuid;

/// The time that PostgreSQL counts from, 2000-01-01, in microseconds since the Unix epoch.
const POSTGRES_EPOCH: i64 = 946_684_800_000_000;

/// A one-dimensional array with elements of the SQL type `T`.
///
/// The format is the one that `array_recv` in PostgreSQL's `arrayfuncs.c` reads: each element is its length, as a
/// 32-bit number in network byte order, followed by its bytes. The length of NULL is -1.
#[derive(Debug)]
pub(super) struct EncodedArray<T> {
    elements: Vec<u8>,
    len: usize,
    sql_type: PhantomData<T>,
}

impl<T> EncodedArray<T> {
    /// Creates an array with space for `len` elements of `size` bytes each.
    pub fn with_capacity(len: usize, size: usize) -> Self {
        Self {
            elements: Vec::with_capacity(len * (size + size_of::<i32>())),
            len: 0,
            sql_type: PhantomData,
        }
    }

    #[inline]
    fn push_fixed<const SIZE: usize>(&mut self, bytes: [u8; SIZE]) {
        let size = i32::try_from(SIZE).unwrap_or(i32::MAX);
        self.elements.extend_from_slice(&size.to_be_bytes());
        self.elements.extend_from_slice(&bytes);
        self.len += 1;
    }

    #[inline]
    fn push_text(&mut self, text: &str) {
        let size = i32::try_from(text.len()).unwrap_or(i32::MAX);
        self.elements.extend_from_slice(&size.to_be_bytes());
        self.elements.extend_from_slice(text.as_bytes());
        self.len += 1;
    }

    #[inline]
    fn push_null(&mut self) {
        self.elements.extend_from_slice(&(-1_i32).to_be_bytes());
        self.len += 1;
    }
}

impl EncodedArray<SqlUuid> {
    #[inline]
    pub fn push(&mut self, id: Uuid) {
        self.push_fixed(id.into_bytes());
    }
}

impl EncodedArray<Timestamptz> {
    #[inline]
    pub fn push(&mut self, at: DateTime<Utc>) {
        self.push_fixed((at.timestamp_micros() - POSTGRES_EPOCH).to_be_bytes());
    }
}

impl EncodedArray<BigInt> {
    #[inline]
    pub fn push(&mut self, number: i64) {
        self.push_fixed(number.to_be_bytes());
    }
}

impl EncodedArray<Integer> {
    #[inline]
    pub fn push(&mut self, number: i32) {
        self.push_fixed(number.to_be_bytes());
    }
}

impl EncodedArray<Nullable<Integer>> {
    #[inline]
    pub fn push(&mut self, number: Option<i32>) {
        match number {
            Some(number) => self.push_fixed(number.to_be_bytes()),
            None => self.push_null(),
        }
    }
}

impl EncodedArray<Bool> {
    #[inline]
    pub fn push(&mut self, value: bool) {
        self.push_fixed([u8::from(value)]);
    }
}

impl EncodedArray<Text> {
    #[inline]
    pub fn push(&mut self, text: &str) {
        self.push_text(text);
    }
}

impl EncodedArray<Nullable<Text>> {
    #[inline]
    pub fn push(&mut self, text: Option<&str>) {
        match text {
            Some(text) => self.push_text(text),
            None => self.push_null(),
        }
    }
}

impl<T: std::fmt::Debug> ToSql<Array<T>, Pg> for EncodedArray<T>
where
    Pg: HasSqlType<T>,
{
    fn to_sql<'b>(&'b self, out: &mut Output<'b, '_, Pg>) -> serialize::Result {
        let element = <Pg as HasSqlType<T>>::metadata(out.metadata_lookup()).oid()?;
        let (dimensions, flags, first_index) = (1_i32, 0_i32, 1_i32);
        out.write_all(&dimensions.to_be_bytes())?;
        out.write_all(&flags.to_be_bytes())?;
        out.write_all(&element.to_be_bytes())?;
        out.write_all(&i32::try_from(self.len)?.to_be_bytes())?;
        out.write_all(&first_index.to_be_bytes())?;
        out.write_all(&self.elements)?;
        Ok(IsNull::No)
    }
}
