//! The messages that the console and the desktop app around it exchange. Not used in a browser.
//!
//! The console passes [`Call`](crate::call::Call)s and a few commands to the app. It never sees a token, and its calls
//! go only to servers in the app's list.

use serde::{Deserialize, Serialize};

use crate::{call::Call, problem::Problem, time::Timestamp};

/// The response to a call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallResponse {
    /// JSON, or empty.
    pub body: String,
    /// If the server was unreachable and this is an earlier response, the time at which it was received.
    pub loaded_at: Option<Timestamp>,
}

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "code", rename_all = "snake_case")]
pub enum CallError {
    /// The server rejected it.
    Problem { problem: Box<Problem> },
    /// The server could not be reached.
    Unreachable,
    /// The response was not what the call expects.
    Unreadable,
    /// The system's browser could not be opened.
    NoBrowser,
}

/// The response to a request sent with an API key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TestResponse {
    pub status: u16,
    /// The response's [`LIMIT_FIELDS`](crate::call::LIMIT_FIELDS).
    pub headers: Vec<(String, String)>,
    /// The server's error response.
    pub problem: Option<Box<Problem>>,
}

/// A server in the app's list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    /// Its origin, such as `https://quota.example.com`.
    pub address: String,
    /// The user's name for it; may be empty.
    pub name: String,
}

/// The state of the desktop app.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostStatus {
    /// The address of the server that calls are sent to.
    pub current: String,
    pub servers: Vec<Profile>,
    /// Whether sessions outlive the app. They do not if there is no keychain.
    pub keeps_sessions: bool,
}

/// A Stripe page, which the app opens in the system's browser.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BillingPage {
    Checkout,
    Portal,
}

impl BillingPage {
    /// Returns the call that requests the page's address.
    pub const fn call(self) -> Call {
        match self {
            Self::Checkout => Call::StartCheckout,
            Self::Portal => Call::OpenBillingPortal,
        }
    }
}
