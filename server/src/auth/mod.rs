//! Authentication: passwords, access tokens, and session families.
//!
//! This module does not depend on HTTP. A small pool of dedicated threads hashes passwords, so that a flood of sign-ins
//! does not use up memory and CPU time that other work needs. While PostgreSQL is unreachable, sign-in is not possible,
//! and cached sessions can be used for `QUOTA_STALE_GRACE`. While Redis is unreachable, each replica limits sign-in
//! attempts separately.

pub mod account;
pub mod attempts;
pub mod device;
pub mod password;
pub mod secret;
pub mod session;
pub mod token;

use std::time::Duration;

use crate::db::DbError;

#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    #[error("incorrect email or password")]
    WrongCredentials,
    #[error("invalid token")]
    Unauthorized,
    #[error("the email is already in use")]
    EmailTaken,
    /// The password is too weak. Contains the reason.
    #[error("{0}")]
    WeakPassword(String),
    #[error("too many failed sign-ins")]
    TooManyTries(Duration),
    #[error("too many registrations from this network")]
    TooManyRegistrations(Duration),
    #[error("too many passwords are being hashed")]
    Busy,
    #[error(transparent)]
    Db(#[from] DbError),
    #[error("cannot generate random numbers")]
    Random(#[from] getrandom::Error),
    #[error("internal error")]
    Internal(String),
}
