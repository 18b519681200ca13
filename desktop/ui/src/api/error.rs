//! The errors of calls.

use quota_common::{Problem, ProblemCode};

/// Why a call failed.
#[derive(Debug, Clone, PartialEq)]
pub enum CallError {
    /// The server rejected it.
    Problem(Box<Problem>),
    /// The server could not be reached.
    Unreachable,
    /// The response was not what the call expects.
    Unreadable,
    /// A part of the console could not be loaded.
    NoCode,
    /// Another window signed in to another account; the call was not sent on that account's behalf.
    AccountChanged,
    /// The desktop app could not open the system's browser.
    #[cfg(feature = "desktop")]
    NoBrowser,
    /// Signing in succeeded, but the browser did not store the session's cookies.
    CookiesBlocked,
}

pub type CallResult<T> = Result<T, CallError>;

impl CallError {
    pub fn is(&self, code: ProblemCode) -> bool {
        matches!(self, Self::Problem(problem) if problem.kind.ends_with(&format!("/{}", code.slug())))
    }

    pub fn message(&self) -> String {
        match self {
            Self::Problem(problem) => return problem.detail.clone(),
            Self::Unreachable => "Can't reach the server. Check your connection and try again.",
            Self::Unreadable => "Unexpected response from the server. Reload the page.",
            Self::NoCode => {
                "A part of the console is missing. Check your connection, or reload the page: there may be a new version."
            }
            Self::AccountChanged => {
                "A different account is now signed in in this browser. No changes were made."
            }
            #[cfg(feature = "desktop")]
            Self::NoBrowser => "Couldn't open your browser.",
            Self::CookiesBlocked => "Cookies are blocked. Allow them, then sign in.",
        }
        .to_owned()
    }

    /// Returns the ID under which the server logged the request. `None` for self-explanatory errors, such as invalid
    /// fields or a wrong password.
    pub fn request_id(&self) -> Option<&str> {
        match self {
            Self::Problem(problem)
                if !problem.request_id.is_empty()
                    && !matches!(problem.status, 401 | 403 | 404 | 409 | 422 | 429) =>
            {
                Some(&problem.request_id)
            }
            _ => None,
        }
    }
}

/// The response to a request sent with an API key.
#[derive(Debug, Clone, PartialEq)]
pub struct TestResponse {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    /// The server's error response.
    pub problem: Option<Box<Problem>>,
}

impl TestResponse {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(it, _)| *it == name)
            .map(|(_, value)| value.as_str())
    }
}
