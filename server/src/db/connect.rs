//! New connections: TLS, keepalive and session settings.

use std::{error::Error, time::Duration};

use diesel::{ConnectionError, ConnectionResult};
use diesel_async::{AsyncPgConnection, SimpleAsyncConnection, pooled_connection::deadpool::Pool};
use futures_util::{FutureExt, future::BoxFuture};
use tokio_postgres::{NoTls, config::SslMode};

use crate::{config::DatabaseSettings, error_chain::chain};

pub(super) type ConnectionPool = Pool<AsyncPgConnection>;

/// How long a transaction may be idle between two statements.
const IDLE_IN_TRANSACTION: Duration = Duration::from_secs(5);
/// How long a connection is idle before the first TCP keepalive probe.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
/// The interval between keepalive probes.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// The number of unanswered keepalive probes after which the kernel closes a connection. Linux uses [`UNACKNOWLEDGED`]
/// instead.
const KEEPALIVE_RETRIES: u32 = 3;
/// The kernel closes a connection if sent bytes remain unacknowledged for this long.
const UNACKNOWLEDGED: Duration = Duration::from_secs(5);

/// Returns the session settings of pooled connections. They include timeouts, which PostgreSQL itself enforces, because
/// dropping a query's future does not stop the query.
pub(super) fn session(settings: &DatabaseSettings) -> String {
    format!(
        "SET timezone = 'UTC'; SET jit = off; SET statement_timeout = {}; SET lock_timeout = {}; \
         SET idle_in_transaction_session_timeout = {}; SET application_name = 'quota'",
        settings.statement_timeout.as_millis(),
        settings.lock_timeout.as_millis(),
        IDLE_IN_TRANSACTION.as_millis(),
    )
}

/// Connects and applies the session settings. `limit` is the connect timeout.
pub(super) fn connect(
    url: &str,
    session: String,
    limit: Duration,
) -> BoxFuture<'_, ConnectionResult<AsyncPgConnection>> {
    async move {
        let bad = |error: &dyn Error| ConnectionError::BadConnection(chain(error));
        let mut config: tokio_postgres::Config =
            url.parse().map_err(|e: tokio_postgres::Error| bad(&e))?;
        config
            .connect_timeout(limit)
            .keepalives_idle(KEEPALIVE_IDLE)
            .keepalives_interval(KEEPALIVE_INTERVAL)
            .keepalives_retries(KEEPALIVE_RETRIES)
            .tcp_user_timeout(UNACKNOWLEDGED);
        let mut conn = if config.get_ssl_mode() == SslMode::Require {
            let (client, connection) = config.connect(tls()).await.map_err(|e| bad(&e))?;
            AsyncPgConnection::try_from_client_and_connection(client, connection).await?
        } else {
            let (client, connection) = config.connect(NoTls).await.map_err(|e| bad(&e))?;
            AsyncPgConnection::try_from_client_and_connection(client, connection).await?
        };
        conn.batch_execute(&session)
            .await
            .map_err(ConnectionError::CouldntSetupConfiguration)?;
        Ok(conn)
    }
    .boxed()
}

/// Returns a TLS connector that verifies certificates against the system's trusted roots. Used for `sslmode=require`.
fn tls() -> tokio_postgres_rustls::MakeRustlsConnect {
    let mut roots = rustls::RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let config = rustls::ClientConfig::builder_with_provider(
        rustls::crypto::aws_lc_rs::default_provider().into(),
    )
    .with_safe_default_protocol_versions()
    .expect("the provider supports the default versions")
    .with_root_certificates(roots)
    .with_no_client_auth();
    tokio_postgres_rustls::MakeRustlsConnect::new(config)
}
