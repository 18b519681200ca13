//! Who calls: passwords, access tokens, session families.
//!
//! Owns how people prove who they are and stay signed in. Knows no HTTP. Passwords are hashed on a small pool
//! of threads of their own, so that a flood of sign-ins takes neither the memory nor the time of anything
//! else. While PostgreSQL is unreachable nobody signs in, and sessions that were in use stay in use for
//! `QUOTA_STALE_GRACE`. While Redis is unreachable, each replica limits sign-ins by itself.

pub mod account;
pub mod attempts;
pub mod device;
pub mod password;
pub mod secret;
pub mod session;
pub mod token;

use std::time::Duration;

use crate::db::DbError;

/// Why an account or session could not be had.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    #[error("incorrect email or password")]
    WrongCredentials,
    #[error("the token opens nothing")]
    Unauthorized,
    #[error("the email is taken")]
    EmailTaken,
    /// Why a password is refused.
    #[error("{0}")]
    WeakPassword(String),
    #[error("too many failed sign-ins")]
    TooManyTries(Duration),
    /// Too many passwords are being hashed.
    #[error("too many passwords are being hashed")]
    Busy,
    #[error(transparent)]
    Db(#[from] DbError),
    #[error("the machine has no randomness")]
    Random(#[from] getrandom::Error),
    #[error("internal")]
    Internal(String),
}
