//! The secret that the first replica generates and stores in the database. It is the server secret, unless the operator
//! sets `QUOTA_SECRET`.

use diesel::prelude::*;
use diesel_async::RunQueryDsl;

use crate::{
    db::{DbError, SystemTx},
    schema::server_secrets,
};

/// Returns the stored secret. If there is none, stores and returns `candidate`. Replicas that start at the same time
/// all get the same secret.
pub async fn get_or_insert(tx: &mut SystemTx, candidate: &[u8]) -> Result<Vec<u8>, DbError> {
    diesel::insert_into(server_secrets::table)
        .values(server_secrets::secret.eq(candidate))
        .on_conflict_do_nothing()
        .execute(&mut **tx)
        .await?;
    Ok(server_secrets::table
        .select(server_secrets::secret)
        .first(&mut **tx)
        .await?)
}

/// Returns the ID of the secret that was current when the server started to record the secret of each session. If this
/// ID has not been stored yet, stores and returns `current`.
pub async fn first_of_sessions(tx: &mut SystemTx, current: &[u8]) -> Result<Vec<u8>, DbError> {
    let unset = server_secrets::table.filter(server_secrets::first_session_secret_id.is_null());
    diesel::update(unset)
        .set(server_secrets::first_session_secret_id.eq(current))
        .execute(&mut **tx)
        .await?;
    Ok(server_secrets::table
        .select(server_secrets::first_session_secret_id.assume_not_null())
        .first(&mut **tx)
        .await?)
}
