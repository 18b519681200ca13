//! Stored responses to requests with an `Idempotency-Key`.

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

pub const KEPT_HOURS: i32 = 24;

/// The result of looking up an `Idempotency-Key`.
#[derive(Debug)]
pub enum PriorRequest {
    /// The key is new. Process the request, and [`store`] its response in the same transaction.
    Nothing,
    /// Another request with the same key is being processed.
    InProgress,
    Answered {
        request_hash: Vec<u8>,
        status: u16,
        response: Value,
    },
}

/// The number of attempts to acquire the lock. A client can receive an error response shortly before the request's
/// transaction has been rolled back. If the client retries immediately, the lock is still held.
const ATTEMPTS: u32 = 6;
/// The pause between attempts to acquire the lock.
const PAUSE: Duration = Duration::from_millis(40);

#[derive(QueryableByName)]
struct Lock {
    #[diesel(sql_type = Bool)]
    acquired: bool,
}

/// Looks up a key. If it is unknown, locks it against other requests until the transaction ends.
pub async fn claim(tx: &mut TenantTx, operation: &str, key: &str) -> Result<PriorRequest, DbError> {
    // The key is looked up before locking, because several requests must be able to get a stored response at the same
    // time. If they needed the lock, all but one of them would report that the request was still being processed.
    let known = find(tx, operation, key).await?;
    if !matches!(known, PriorRequest::Nothing) {
        return Ok(known);
    }
    // The lock is on a 64-bit hash of `name`. If two names have the same hash, the only effect is that a request with
    // one of them may be rejected while a request with the other is being processed.
    let name = format!("{} {operation} {key}", tx.tenant());
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, name.as_bytes());
    let number = digest
        .as_ref()
        .first_chunk()
        .map_or(0, |bytes| i64::from_be_bytes(*bytes));

    for attempt in 0..ATTEMPTS {
        let lock = diesel::sql_query("SELECT pg_try_advisory_xact_lock($1) AS acquired")
            .bind::<BigInt, _>(number)
            .get_result::<Lock>(&mut **tx)
            .await?;
        if lock.acquired {
            // The key is looked up again, because the previous holder of the lock may have stored its response.
            return find(tx, operation, key).await;
        }
        if attempt + 1 < ATTEMPTS {
            tokio::time::sleep(PAUSE).await;
        }
    }
    Ok(PriorRequest::InProgress)
}

#[derive(Queryable, Selectable)]
#[diesel(table_name = idempotency_keys, check_for_backend(diesel::pg::Pg))]
struct StoredResponse {
    request_hash: Vec<u8>,
    status: Option<i16>,
    response: Option<Value>,
}

async fn find(tx: &mut TenantTx, operation: &str, key: &str) -> Result<PriorRequest, DbError> {
    let stored = idempotency_keys::table
        .find((tx.tenant().0, operation, key))
        .filter(idempotency_keys::created_at.gt(now.into_sql::<Timestamptz>() - KEPT_HOURS.hours()))
        .select(StoredResponse::as_select())
        .first(&mut **tx)
        .await
        .optional()?;
    Ok(match stored {
        Some(StoredResponse {
            request_hash,
            status: Some(status),
            response: Some(response),
        }) => PriorRequest::Answered {
            request_hash,
            status: u16::try_from(status).unwrap_or(200),
            response,
        },
        _ => PriorRequest::Nothing,
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
        // An existing row contains an expired response, which `find` has ignored.
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
