//! What the console's page and the desktop app around it say to each other. In a browser nobody speaks these words.
//!
//! The page hands over [`Call`](crate::call::Call)s and a few wishes besides; it is never told a token, and what it asks
//! goes to a server of the list alone.

use serde::{Deserialize, Serialize};

use crate::{problem::Problem, time::Timestamp};

/// The server's answer to a call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answered {
    /// JSON, or nothing.
    pub body: String,
    /// Set when the server could not be reached: this is what it had answered then.
    pub loaded_at: Option<Timestamp>,
}

/// Why a call came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "code", rename_all = "snake_case")]
pub enum Refusal {
    /// The server said no.
    Problem { problem: Box<Problem> },
    /// It could not be asked.
    Unreachable,
    /// It answered something else than what was asked for.
    Unreadable,
}

/// What a try of a key came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tried {
    pub status: u16,
    /// Those of [`LIMIT_FIELDS`](crate::call::LIMIT_FIELDS) that the answer had.
    pub headers: Vec<(String, String)>,
}

/// A server of the list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    /// Its origin, such as `https://quota.example.com`.
    pub address: String,
    /// What the person calls it; may be empty.
    pub name: String,
}

/// How the app stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// The address of the server that calls go to.
    pub current: String,
    pub servers: Vec<Profile>,
    /// Whether sessions outlive the app: without a keychain they do not.
    pub keeps_sessions: bool,
}
