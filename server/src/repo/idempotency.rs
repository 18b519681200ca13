//! Answers to requests that carry an `Idempotency-Key`.

use std::time::Duration;

use diesel::{
    dsl::{IntervalDsl, now},
    prelude::*,
    sql_types::{BigInt, Bool, Timestamptz},
};
use diesel_async::RunQueryDsl;
use serde_json::Value;

use crate::{
    db::{DbError, TenantTx},
    schema::idempotency_keys,
};

/// For how many hours an answer is kept.
pub const KEPT_HOURS: i32 = 24;

/// What is known of a key.
#[derive(Debug)]
pub enum Known {
    /// Nothing: go on, and [`store`] the answer in the same transaction.
    Nothing,
    /// Another request with it is under way.
    InProgress,
    Answered {
        request_hash: Vec<u8>,
        status: u16,
        response: Value,
    },
}

/// How often the lock is tried for, and how long is waited in between: a request that was refused has its answer
/// before its transaction is rolled back, and whoever repeats it at once is not to meet what is left of it.
const ATTEMPTS: u32 = 6;
const PAUSE: Duration = Duration::from_millis(40);

#[derive(QueryableByName)]
struct Got {
    #[diesel(sql_type = Bool)]
    got: bool,
}

/// Looks it up, and where nothing is known holds it against others until the transaction ends.
pub async fn claim(tx: &mut TenantTx, operation: &str, key: &str) -> Result<Known, DbError> {
    // Before the lock: an answer that is kept does not change, and two who ask for it need not exclude each
    // other. A replay that held the lock would have the next one told that it is still in progress.
    let known = find(tx, operation, key).await?;
    if !matches!(known, Known::Nothing) {
        return Ok(known);
    }
    // A lock on a hash of the name: two names with one hash only wait for each other once in 2^64.
    let name = format!("{} {operation} {key}", tx.tenant());
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, name.as_bytes());
    let number = digest
        .as_ref()
        .first_chunk()
        .map_or(0, |bytes| i64::from_be_bytes(*bytes));

    for attempt in 0..ATTEMPTS {
        let lock = diesel::sql_query("SELECT pg_try_advisory_xact_lock($1) AS got")
            .bind::<BigInt, _>(number)
            .get_result::<Got>(&mut **tx)
            .await?;
        if lock.got {
            // Again: whoever held the lock may have ended in between.
            return find(tx, operation, key).await;
        }
        if attempt + 1 < ATTEMPTS {
            tokio::time::sleep(PAUSE).await;
        }
    }
    Ok(Known::InProgress)
}

async fn find(tx: &mut TenantTx, operation: &str, key: &str) -> Result<Known, DbError> {
    let known = idempotency_keys::table
        .find((tx.tenant().0, operation, key))
        .filter(idempotency_keys::created_at.gt(now.into_sql::<Timestamptz>() - KEPT_HOURS.hours()))
        .select((
            idempotency_keys::request_hash,
            idempotency_keys::status,
            idempotency_keys::response,
        ))
        .first::<(Vec<u8>, Option<i16>, Option<Value>)>(&mut **tx)
        .await
        .optional()?;
    Ok(match known {
        Some((request_hash, Some(status), Some(response))) => Known::Answered {
            request_hash,
            status: u16::try_from(status).unwrap_or(200),
            response,
        },
        _ => Known::Nothing,
    })
}

pub async fn store(
    tx: &mut TenantTx,
    operation: &str,
    key: &str,
    request_hash: &[u8],
    status: u16,
    response: &Value,
) -> Result<(), DbError> {
    let values = (
        idempotency_keys::request_hash.eq(request_hash),
        idempotency_keys::status.eq(i16::try_from(status).ok()),
        idempotency_keys::response.eq(response),
        idempotency_keys::created_at.eq(now),
    );
    diesel::insert_into(idempotency_keys::table)
        .values((
            idempotency_keys::tenant_id.eq(tx.tenant().0),
            idempotency_keys::operation.eq(operation),
            idempotency_keys::key.eq(key),
            values,
        ))
        // One from more than a day ago, which was not looked at.
        .on_conflict((
            idempotency_keys::tenant_id,
            idempotency_keys::operation,
            idempotency_keys::key,
        ))
        .do_update()
        .set(values)
        .execute(&mut **tx)
        .await?;
    Ok(())
}
