//! Session families.

use chrono::{DateTime, Utc};
use diesel::{
    dsl::{IntervalDsl, exists, now},
    prelude::*,
    sql_types::{Bool, Timestamptz},
};
use diesel_async::RunQueryDsl;
use ipnet::IpNet;
use uuid::Uuid;

use super::{Rows, Slice};
use crate::{
    db::{DbError, SystemTx},
    schema::{refresh_tokens, sessions},
};

/// For this many seconds after its first use, but only until its successor is used, a refresh token can be used again
/// and yields the same successor. This helps two tabs that refresh at the same time, and clients that have lost a
/// response.
pub const GRACE_SECS: i32 = 10;

#[derive(Debug, Clone, Queryable, Selectable)]
#[diesel(table_name = sessions, check_for_backend(diesel::pg::Pg))]
pub struct SessionRow {
    pub id: Uuid,
    pub user_id: Uuid,
    pub tenant_id: Uuid,
    pub user_agent: Option<String>,
    pub ip: Option<IpNet>,
    pub created_at: DateTime<Utc>,
    pub last_used_at: DateTime<Utc>,
    pub expires_at: DateTime<Utc>,
}

#[derive(Debug, Insertable)]
#[diesel(table_name = sessions)]
pub struct NewSession<'a> {
    pub id: Uuid,
    pub user_id: Uuid,
    pub tenant_id: Uuid,
    pub user_agent: Option<&'a str>,
    pub ip: Option<IpNet>,
    pub secret_id: &'a [u8],
    pub expires_at: DateTime<Utc>,
}

/// Identifies the server secrets whose sessions may be refreshed.
#[derive(Debug, Clone, Copy)]
pub struct Accepted<'a> {
    /// The IDs of the accepted secrets, starting with the current one. Refreshing a session assigns it to the current
    /// secret.
    pub ids: &'a [[u8; 16]],
    /// Whether to include sessions that have no recorded secret.
    pub with_unmarked: bool,
}

/// The outcome of using a refresh token.
#[derive(Debug)]
pub enum Rotation {
    /// This was the session's current token. Its successor has been stored.
    Rotated(SessionRow),
    /// The token was first used less than [`GRACE_SECS`] seconds ago, and its successor has not been used. The client
    /// gets the same successor again. Contains the successor's index in the `successors` argument of [`rotate`].
    Repeated(SessionRow, usize),
    /// The token was used before, so someone may have copied it. The session must be revoked.
    Reused(SessionRow),
    /// The session belongs to a secret that is not accepted. The session must be revoked.
    Foreign(SessionRow),
    /// The token does not exist, or its session has ended.
    Unknown,
}

pub async fn begin(
    tx: &mut SystemTx,
    session: &NewSession<'_>,
    token_hash: &[u8],
) -> Result<(), DbError> {
    diesel::insert_into(sessions::table)
        .values(session)
        .execute(&mut **tx)
        .await?;
    add_token(tx, session.id, token_hash).await
}

async fn add_token(tx: &mut SystemTx, session: Uuid, token_hash: &[u8]) -> Result<(), DbError> {
    diesel::insert_into(refresh_tokens::table)
        .values((
            refresh_tokens::token_hash.eq(token_hash),
            refresh_tokens::session_id.eq(session),
        ))
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Uses a refresh token in a single conditional update, so that only one of two concurrent callers can use it.
///
/// `successors` starts with the hash of the next token. The other hashes are alternative successors. If the token has
/// been used before, its stored successor may be one of these.
pub async fn rotate(
    tx: &mut SystemTx,
    token_hash: &[u8],
    (successors, secrets): (&[[u8; 32]], Accepted<'_>),
    idle_days: i32,
    ip: Option<IpNet>,
) -> Result<Rotation, DbError> {
    let is_accepted = || {
        let is_unmarked = sessions::secret_id.is_null();
        let ids = secrets.ids.iter().map(<[u8; 16]>::as_slice);
        sessions::secret_id
            .eq_any(ids.collect::<Vec<_>>())
            .or(is_unmarked.and(secrets.with_unmarked.into_sql::<Bool>()))
    };
    let live = sessions::table
        .filter(sessions::id.eq(refresh_tokens::session_id))
        .filter(sessions::revoked_at.is_null())
        .filter(sessions::expires_at.gt(now))
        .filter(is_accepted());
    let used = diesel::update(
        refresh_tokens::table
            .filter(refresh_tokens::token_hash.eq(token_hash))
            .filter(refresh_tokens::used_at.is_null())
            .filter(exists(live)),
    )
    .set(refresh_tokens::used_at.eq(now))
    .returning(refresh_tokens::session_id)
    .get_result::<Uuid>(&mut **tx)
    .await
    .optional()?;
    if let (Some(session), Some(next)) = (used, successors.first()) {
        add_token(tx, session, next).await?;
        // Checks the session again while its row is locked: a password change may have ended it.
        let live = sessions::table
            .filter(sessions::id.eq(session))
            .filter(sessions::revoked_at.is_null());
        let session = diesel::update(live)
            .set((
                sessions::last_used_at.eq(now),
                sessions::expires_at.eq(now.into_sql::<Timestamptz>() + idle_days.days()),
                sessions::ip.eq(ip),
                sessions::secret_id.eq(secrets.ids.first().map(<[u8; 16]>::as_slice)),
            ))
            .returning(SessionRow::as_returning())
            .get_result(&mut **tx)
            .await
            .optional()?;
        return Ok(session.map_or(Rotation::Unknown, Rotation::Rotated));
    }

    let found = refresh_tokens::table
        .inner_join(sessions::table)
        .filter(refresh_tokens::token_hash.eq(token_hash))
        .filter(sessions::revoked_at.is_null())
        .filter(sessions::expires_at.gt(now))
        .select((
            SessionRow::as_select(),
            refresh_tokens::used_at
                .assume_not_null()
                .gt(now.into_sql::<Timestamptz>() - GRACE_SECS.seconds())
                // Null if the token has not been used. In this case, its session belongs to a secret that is not
                // accepted.
                .nullable(),
            is_accepted(),
        ))
        .first::<(SessionRow, Option<bool>, Option<bool>)>(&mut **tx)
        .await
        .optional()?;
    let Some((session, recent, accepted)) = found else {
        return Ok(Rotation::Unknown);
    };
    if accepted != Some(true) {
        return Ok(Rotation::Foreign(session));
    }
    if recent == Some(true) {
        let current = refresh_tokens::table
            .filter(refresh_tokens::token_hash.eq_any(successors.iter().map(<[u8; 32]>::as_slice)))
            .filter(refresh_tokens::used_at.is_null())
            .select(refresh_tokens::token_hash)
            .first::<Vec<u8>>(&mut **tx)
            .await
            .optional()?;
        let at = successors
            .iter()
            .position(|hash| current.as_deref() == Some(hash.as_slice()));
        if let Some(at) = at {
            return Ok(Rotation::Repeated(session, at));
        }
    }
    Ok(Rotation::Reused(session))
}

/// Finds the active session of a refresh token. The token may already have been used.
pub async fn of_token(tx: &mut SystemTx, token_hash: &[u8]) -> Result<Option<SessionRow>, DbError> {
    let query = refresh_tokens::table
        .inner_join(sessions::table)
        .filter(refresh_tokens::token_hash.eq(token_hash))
        .filter(sessions::revoked_at.is_null())
        .filter(sessions::expires_at.gt(now))
        .select(SessionRow::as_select());
    Ok(query.first(&mut **tx).await.optional()?)
}

pub async fn find_live(tx: &mut SystemTx, session: Uuid) -> Result<Option<SessionRow>, DbError> {
    let query = sessions::table
        .find(session)
        .filter(sessions::revoked_at.is_null())
        .filter(sessions::expires_at.gt(now))
        .select(SessionRow::as_select());
    Ok(query.first(&mut **tx).await.optional()?)
}

pub async fn of_user(
    tx: &mut SystemTx,
    user: Uuid,
    slice: Slice,
) -> Result<Rows<SessionRow>, DbError> {
    let active = || {
        sessions::table
            .filter(sessions::user_id.eq(user))
            .filter(sessions::revoked_at.is_null())
            .filter(sessions::expires_at.gt(now))
    };
    let total = active().count().get_result(&mut **tx).await?;
    let rows = active()
        .filter(sessions::id.lt(slice.before()))
        .order(sessions::id.desc())
        .limit(slice.fetch())
        .select(SessionRow::as_select())
        .load(&mut **tx)
        .await?;
    Ok(Rows::new(rows, slice.limit, total))
}

/// Revokes one of the user's sessions. Returns `false` if the user has no such session, or if it has already been
/// revoked.
pub async fn end(tx: &mut SystemTx, user: Uuid, session: Uuid) -> Result<bool, DbError> {
    let active = sessions::table
        .filter(sessions::id.eq(session))
        .filter(sessions::user_id.eq(user))
        .filter(sessions::revoked_at.is_null());
    Ok(diesel::update(active)
        .set(sessions::revoked_at.eq(now))
        .execute(&mut **tx)
        .await?
        == 1)
}

/// Revokes all of the user's sessions except `but`. Returns the IDs of the revoked sessions.
pub async fn end_others(tx: &mut SystemTx, user: Uuid, but: Uuid) -> Result<Vec<Uuid>, DbError> {
    let others = sessions::table
        .filter(sessions::user_id.eq(user))
        .filter(sessions::id.ne(but))
        .filter(sessions::revoked_at.is_null());
    let query = diesel::update(others)
        .set(sessions::revoked_at.eq(now))
        .returning(sessions::id);
    Ok(query.get_results(&mut **tx).await?)
}
