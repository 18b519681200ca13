//! Messages between the console and the desktop app that contains it. In browsers, no messages are sent, and only
//! [`BillingPage`] is used.
//!
//! The console passes [`Call`]s and a few commands to the app. The console never receives the session's tokens, and the
//! app sends calls only to servers in its list.

use serde::{Deserialize, Serialize};

use crate::{call::Call, problem::Problem, time::Timestamp};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallResponse {
    /// The response body: JSON, or an empty string.
    pub body: String,
    /// `None` if the server sent this response in full. Otherwise, the app has returned a stored response.
    pub stored: Option<Stored>,
}

/// Describes a stored response.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// When the app received the response.
    pub loaded_at: Timestamp,
    /// Whether the server has sent a newer response that did not arrive completely. Otherwise, the server is
    /// unreachable.
    pub server_responded: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "code", rename_all = "snake_case")]
pub enum CallError {
    /// The server returned an error.
    Problem {
        problem: Box<Problem>,
    },
    Unreachable,
    /// The response to a change did not arrive, or not completely. The change may still take effect.
    NoResponse,
    /// The response to any other call did not arrive completely.
    Incomplete,
    /// The response could not be parsed.
    Unreadable,
    /// The default browser could not be opened.
    NoBrowser,
}

/// The response to a request that was sent with an API key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TestResponse {
    pub status: u16,
    /// The response headers in [`LIMIT_FIELDS`](crate::call::LIMIT_FIELDS).
    pub headers: Vec<(String, String)>,
    pub problem: Option<Box<Problem>>,
}

/// A server in the app's list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    /// The server's origin, such as `https://quota.example.com`.
    pub address: String,
    /// The name that the user gave the server. The name may be empty.
    pub name: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostStatus {
    /// The address of the server in use.
    pub current: String,
    pub servers: Vec<Profile>,
    /// Whether sessions survive a restart of the app. False if no keychain is available.
    pub keeps_sessions: bool,
}

/// A Stripe page that the app opens in the default browser.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BillingPage {
    Checkout,
    Portal,
}

impl BillingPage {
    /// Returns the call whose response contains the page's URL.
    pub const fn call(self) -> Call {
        match self {
            Self::Checkout => Call::StartCheckout,
            Self::Portal => Call::OpenBillingPortal,
        }
    }
}
