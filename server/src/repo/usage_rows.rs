//! A batch's rows in the usage log, sorted and encoded for PostgreSQL.
//!
//! Most columns have the same values in many rows, so they are sent once per group of rows.

use std::{ops::Range, thread};

use chrono::{DateTime, Utc};
use diesel::sql_types::{BigInt, Bool, Integer, Nullable, Text, Timestamptz, Uuid as SqlUuid};
use uuid::Uuid;

use super::usage_array::EncodedArray;

/// The maximum number of rows per statement. Copying more rows to the connection would block a request-serving thread
/// for too long.
const CHUNK: usize = 4_000;

/// The columns that can differ in every row.
#[derive(Debug, Clone)]
pub(super) struct LogRow {
    pub at: DateTime<Utc>,
    pub event_id: Uuid,
    pub cost: i64,
    pub retry_after_seconds: Option<i32>,
    /// The position of the request ID in the concatenated request IDs.
    pub request_id: Range<usize>,
    /// The index of the row's group.
    pub group: usize,
}

/// The columns that a group of rows has in common.
#[derive(Debug, Clone, Copy)]
pub(super) struct LogGroup<'a> {
    /// The index of the tenant among the tenants of the batch, which are in order of ID.
    pub tenant_index: usize,
    pub tenant: Uuid,
    pub key: Uuid,
    pub plan: Uuid,
    pub was_rejected: bool,
    pub billing: &'static str,
    pub policy: Option<&'static str>,
    pub request_id_has_time: bool,
    pub endpoint: &'a str,
}

/// Consecutive rows of the log.
#[derive(Debug)]
pub(super) struct LogRows {
    /// The number of rows in the batch before these.
    pub offset: usize,
    /// The place of each row's group in `groups`, starting at 1.
    pub group_place: EncodedArray<Integer>,
    pub at: EncodedArray<Timestamptz>,
    pub event_id: EncodedArray<SqlUuid>,
    pub cost: EncodedArray<BigInt>,
    pub retry_after_seconds: EncodedArray<Nullable<Integer>>,
    pub request_id: EncodedArray<Text>,
    pub groups: LogGroups,
}

/// The groups of [`LogRows`].
#[derive(Debug)]
pub(super) struct LogGroups {
    /// The index of each group's tenant among the tenants of the batch.
    pub tenant_indexes: Vec<usize>,
    pub tenant: EncodedArray<SqlUuid>,
    pub key: EncodedArray<SqlUuid>,
    pub plan: EncodedArray<SqlUuid>,
    pub was_rejected: EncodedArray<Bool>,
    pub billing: EncodedArray<Text>,
    pub policy: EncodedArray<Nullable<Text>>,
    pub request_id_has_time: EncodedArray<Bool>,
    pub endpoint: EncodedArray<Text>,
}

impl LogGroups {
    fn new() -> Self {
        Self {
            tenant_indexes: Vec::new(),
            tenant: EncodedArray::with_capacity(0, 0),
            key: EncodedArray::with_capacity(0, 0),
            plan: EncodedArray::with_capacity(0, 0),
            was_rejected: EncodedArray::with_capacity(0, 0),
            billing: EncodedArray::with_capacity(0, 0),
            policy: EncodedArray::with_capacity(0, 0),
            request_id_has_time: EncodedArray::with_capacity(0, 0),
            endpoint: EncodedArray::with_capacity(0, 0),
        }
    }

    fn push(&mut self, group: &LogGroup<'_>) {
        self.tenant_indexes.push(group.tenant_index);
        self.tenant.push(group.tenant);
        self.key.push(group.key);
        self.plan.push(group.plan);
        self.was_rejected.push(group.was_rejected);
        self.billing.push(group.billing);
        self.policy.push(group.policy);
        self.request_id_has_time.push(group.request_id_has_time);
        self.endpoint.push(group.endpoint);
    }
}

/// Sorts rows into the order of the log, and encodes them.
pub(super) fn encode(
    mut rows: Vec<LogRow>,
    request_ids: &str,
    groups: &[LogGroup<'_>],
) -> Vec<LogRows> {
    rows.sort_by_key(|it| (groups[it.group].tenant_index, it.at, it.event_id));
    // For each group, the last chunk so far that contains the group, and the group's place in that chunk.
    let mut places = vec![(usize::MAX, 0); groups.len()];
    let encode_chunk = |(chunk, rows): (usize, &[LogRow])| {
        let mut encoded = LogRows {
            offset: chunk * CHUNK,
            group_place: EncodedArray::with_capacity(rows.len(), size_of::<i32>()),
            at: EncodedArray::with_capacity(rows.len(), size_of::<i64>()),
            event_id: EncodedArray::with_capacity(rows.len(), size_of::<Uuid>()),
            cost: EncodedArray::with_capacity(rows.len(), size_of::<i64>()),
            retry_after_seconds: EncodedArray::with_capacity(rows.len(), 0),
            request_id: EncodedArray::with_capacity(rows.len(), uuid::fmt::Hyphenated::LENGTH),
            groups: LogGroups::new(),
        };
        for row in rows {
            let (found_in, place) = &mut places[row.group];
            if *found_in != chunk {
                encoded.groups.push(&groups[row.group]);
                *found_in = chunk;
                *place = i32::try_from(encoded.groups.tenant_indexes.len()).unwrap_or(i32::MAX);
            }
            encoded.group_place.push(*place);
            encoded.at.push(row.at);
            encoded.event_id.push(row.event_id);
            encoded.cost.push(row.cost);
            encoded.retry_after_seconds.push(row.retry_after_seconds);
            encoded
                .request_id
                .push(&request_ids[row.request_id.clone()]);
        }
        // A large batch takes milliseconds, for which requests on the same core must not wait.
        thread::yield_now();
        encoded
    };
    rows.chunks(CHUNK).enumerate().map(encode_chunk).collect()
}
