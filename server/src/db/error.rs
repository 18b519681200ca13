//! Errors of queries and transactions.

use std::error::Error;

use diesel::result::{DatabaseErrorKind, Error as DieselError};

/// Why a query failed.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// PostgreSQL is unreachable, starting, shutting down or too slow, or no connection became available. Also used for
    /// conflicts with another transaction: a lock timeout, a deadlock, a serialization failure, or a partition that was
    /// created at the same time. The same request may succeed when it is retried.
    #[error("PostgreSQL is unavailable")]
    Unavailable(#[source] Box<dyn Error + Send + Sync>),
    /// The change violates a named constraint.
    #[error("constraint {0}")]
    Constraint(String),
    #[error("the query failed")]
    Query(#[source] DieselError),
}

/// Substrings by which the messages of temporary errors are recognized.
const TRANSIENT: [&str; 7] = [
    "statement timeout",
    "lock timeout",
    "deadlock detected",
    "terminating connection",
    "the database system is",
    "connection closed",
    // The row's partition was created after the statement had looked for it.
    "violates partition constraint",
];

impl From<DieselError> for DbError {
    fn from(error: DieselError) -> Self {
        if let DieselError::DatabaseError(kind, info) = &error {
            if let Some(name) = info.constraint_name() {
                return Self::Constraint(name.to_owned());
            }
            let is_transient_kind = matches!(
                kind,
                DatabaseErrorKind::ClosedConnection
                    | DatabaseErrorKind::UnableToSendCommand
                    | DatabaseErrorKind::SerializationFailure
            );
            // Diesel does not expose the SQLSTATE, so some errors are recognized by their message. If `lc_messages` is
            // not English, these errors become `Query`.
            if is_transient_kind || TRANSIENT.iter().any(|part| info.message().contains(part)) {
                return Self::Unavailable(Box::new(error));
            }
        }
        Self::Query(error)
    }
}

impl<E: Error + Send + Sync + 'static> From<deadpool::managed::PoolError<E>> for DbError {
    fn from(error: deadpool::managed::PoolError<E>) -> Self {
        Self::Unavailable(Box::new(error))
    }
}
