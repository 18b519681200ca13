//! Transactions on behalf of a tenant or of the server itself.

use std::{
    ops::{Deref, DerefMut},
    time::Duration,
};

use diesel_async::{AsyncPgConnection, SimpleAsyncConnection, pooled_connection::deadpool::Object};
use quota_common::TenantId;
use tokio::{runtime::Handle, time::timeout};

use super::{connect::ConnectionPool, error::DbError, span};
use crate::spans::Span;

/// How long the first response in a transaction may take. If PostgreSQL hangs, its host still acknowledges every byte,
/// so neither TCP timeouts nor PostgreSQL's own timeouts end the wait.
pub(super) const FIRST_ANSWER: Duration = Duration::from_secs(2);
/// How long a rollback may take.
const ROLLBACK: Duration = Duration::from_secs(2);

/// Removes an unresponsive connection from its pool, and returns the error to report.
pub(super) fn close_silent(conn: Object<AsyncPgConnection>) -> DbError {
    let _ = Object::take(conn);
    DbError::Unavailable("PostgreSQL does not respond".into())
}

struct Tx {
    /// `None` after the transaction has ended.
    conn: Option<Object<AsyncPgConnection>>,
    /// The transaction's span, if its request is traced.
    span: Option<Span>,
}

impl Tx {
    async fn begin(pool: &ConnectionPool, statements: &str) -> Result<Self, DbError> {
        let mut span = span::of_transaction();
        let mut conn = pool.get().await.inspect_err(|_| {
            if let Some(span) = &mut span {
                span.fail("no connection");
            }
        })?;
        if let Some(span) = &span {
            span::trace_statements(&mut conn, span);
        }
        // If the caller's future is dropped after this point, dropping `tx` rolls the transaction back.
        let mut tx = Self {
            conn: Some(conn),
            span,
        };
        let began = timeout(FIRST_ANSWER, tx.get().batch_execute(statements)).await;
        match (began, tx.conn.take()) {
            (Err(_), Some(conn)) => Err(close_silent(conn)),
            (began, conn) => {
                tx.conn = conn;
                began.unwrap_or(Ok(()))?;
                Ok(tx)
            }
        }
    }

    fn get(&mut self) -> &mut AsyncPgConnection {
        self.conn
            .as_mut()
            .expect("only `commit` ends the transaction")
    }

    async fn commit(mut self) -> Result<(), DbError> {
        self.get().batch_execute("COMMIT").await?;
        self.stop_tracing();
        self.conn = None;
        Ok(())
    }

    fn stop_tracing(&mut self) {
        if self.span.is_some()
            && let Some(conn) = &mut self.conn
        {
            span::stop_tracing(conn);
        }
    }
}

impl Drop for Tx {
    fn drop(&mut self) {
        self.stop_tracing();
        let Some(mut conn) = self.conn.take() else {
            return;
        };
        let Ok(runtime) = Handle::try_current() else {
            let _ = Object::take(conn);
            return;
        };
        runtime.spawn(async move {
            let rollback = timeout(ROLLBACK, conn.batch_execute("ROLLBACK")).await;
            if !matches!(rollback, Ok(Ok(()))) {
                // Closing the connection also rolls the transaction back.
                let _ = Object::take(conn);
            }
        });
    }
}

/// A tenant's transaction. Dropping it without calling [`commit`](Self::commit) rolls it back.
pub struct TenantTx {
    tx: Tx,
    tenant: TenantId,
}

impl TenantTx {
    pub(super) async fn begin(pool: &ConnectionPool, tenant: TenantId) -> Result<Self, DbError> {
        // No injection is possible, because a UUID contains only hexadecimal digits and dashes.
        let begin = format!("BEGIN; SET LOCAL ROLE quota_app; SET LOCAL quota.tenant = '{tenant}'");
        Ok(Self {
            tx: Tx::begin(pool, &begin).await?,
            tenant,
        })
    }

    pub const fn tenant(&self) -> TenantId {
        self.tenant
    }

    pub async fn commit(self) -> Result<(), DbError> {
        self.tx.commit().await
    }
}

/// A transaction on behalf of the server itself. Dropping it without calling [`commit`](Self::commit) rolls it back.
pub struct SystemTx {
    tx: Tx,
}

impl SystemTx {
    pub(super) async fn begin(pool: &ConnectionPool) -> Result<Self, DbError> {
        Ok(Self {
            tx: Tx::begin(pool, "BEGIN; SET LOCAL ROLE quota_system").await?,
        })
    }

    pub async fn commit(self) -> Result<(), DbError> {
        self.tx.commit().await
    }
}

macro_rules! connection {
    ($($name:ident),+) => {$(
        impl Deref for $name {
            type Target = AsyncPgConnection;

            fn deref(&self) -> &AsyncPgConnection {
                self.tx.conn.as_ref().expect("only `commit` ends the transaction")
            }
        }

        impl DerefMut for $name {
            fn deref_mut(&mut self) -> &mut AsyncPgConnection {
                self.tx.get()
            }
        }
    )+};
}
connection!(TenantTx, SystemTx);
