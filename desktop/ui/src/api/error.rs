use quota_common::{Problem, ProblemCode};

#[derive(Debug, Clone, PartialEq)]
pub enum CallError {
    /// The server returned an error.
    Problem(Box<Problem>),
    Unreachable,
    /// The response to a change did not arrive, or not completely. The change may still take effect.
    NoResponse,
    /// The response to any other call did not arrive completely.
    Incomplete,
    /// The response could not be parsed.
    Unreadable,
    /// One of the console's code or data files could not be loaded.
    NoCode,
    /// The user has signed in to another account in another window, so the call was not sent.
    AccountChanged,
    /// The desktop app could not open the default browser.
    #[cfg(feature = "desktop")]
    NoBrowser,
    /// Sign-in succeeded, but the browser did not store the session's cookies.
    CookiesBlocked,
}

pub type CallResult<T> = Result<T, CallError>;

impl CallError {
    pub fn is(&self, code: ProblemCode) -> bool {
        matches!(self, Self::Problem(problem) if problem.kind.ends_with(&format!("/{}", code.slug())))
    }

    /// Returns the message, without the request ID if the ID is shown separately.
    pub fn message(&self) -> String {
        let message = self.full_message();
        self.request_id().map_or_else(
            || message.clone(),
            |id| message.replace(&format!(" Quote request ID {id} when reporting it."), ""),
        )
    }

    /// Returns the message, which for an internal error contains the request ID.
    pub fn full_message(&self) -> String {
        match self {
            Self::Problem(problem) => return problem.detail.clone(),
            Self::Unreachable => "Can't reach the server. Check your connection and try again.",
            Self::NoResponse => {
                "The server's response didn't arrive. The change may still take effect, so reload the page before you try again."
            }
            Self::Incomplete => {
                "The server's response didn't arrive completely. Check your connection and try again."
            }
            Self::Unreadable => "Unexpected response from the server. Reload the page.",
            Self::NoCode => {
                "Couldn't load part of the console. Check your connection, or reload the page to get the latest version."
            }
            Self::AccountChanged => {
                "This browser is now signed in to a different account. No changes were made."
            }
            #[cfg(feature = "desktop")]
            Self::NoBrowser => "Couldn't open your browser.",
            Self::CookiesBlocked => "Cookies are blocked. Allow them, then sign in.",
        }
        .to_owned()
    }

    /// Returns the request's ID in the server's log. Returns `None` for errors that users can resolve on their own,
    /// such as invalid fields or a wrong password.
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

/// The response to a request that was sent with an API key.
#[derive(Debug, Clone, PartialEq)]
pub struct TestResponse {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
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
