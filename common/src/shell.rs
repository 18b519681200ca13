//! Messages between the console's page and the desktop app around it. The browser does not use them.
//!
//! The page sends [`Call`](crate::call::Call)s and a few commands. It never receives a token, and its calls only go to a
//! server on the list.

use serde::{Deserialize, Serialize};

use crate::{problem::Problem, time::Timestamp};

/// The server's response to a call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answered {
    /// JSON, or empty.
    pub body: String,
    /// Set if the server could not be reached: the body is an earlier response, received at this time.
    pub loaded_at: Option<Timestamp>,
}

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "code", rename_all = "snake_case")]
pub enum Refusal {
    /// The server rejected it.
    Problem { problem: Box<Problem> },
    /// The server could not be reached.
    Unreachable,
    /// The response was not what the call expects.
    Unreadable,
}

/// The result of testing a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tried {
    pub status: u16,
    /// The response headers that are in [`LIMIT_FIELDS`](crate::call::LIMIT_FIELDS).
    pub headers: Vec<(String, String)>,
}

/// A server on the list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    /// Its origin, such as `https://quota.example.com`.
    pub address: String,
    /// The user's name for it. May be empty.
    pub name: String,
}

/// The state of the desktop app.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// The address of the current server.
    pub current: String,
    pub servers: Vec<Profile>,
    /// Whether sessions survive a restart of the app. They do not without a keychain.
    pub keeps_sessions: bool,
}
