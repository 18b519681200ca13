//! Raises the open-file limit (`RLIMIT_NOFILE`) at startup, and computes how many connections it allows.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// The number of files reserved for uses other than client and database connections, such as the runtime, usage
/// segments, Redis, webhooks, the metrics listener, and sockets that are being closed.
const OTHER_FILES: usize = 256;
/// The minimum number of client connections, even if the limit is so low that `accept` sometimes fails. With fewer
/// connections, the server would be useless.
const LEAST: usize = 16;

/// Raises the soft limit to the hard limit if possible, and returns the resulting soft limit. Returns `None` if the
/// limit is unknown.
pub fn raise() -> Option<usize> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
    let limit = if soft < hard && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() {
        hard
    } else {
        soft
    };
    Some(usize::try_from(limit).unwrap_or(usize::MAX))
}

/// Returns the number of client connections to allow: `wanted`, or fewer if the limit would not leave room for
/// `database` connections and other files.
pub fn connections(wanted: usize, limit: Option<usize>, database: usize) -> usize {
    let Some(limit) = limit else {
        return wanted;
    };
    let left = limit.saturating_sub(OTHER_FILES + database);
    wanted.min(left.max(LEAST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_stay_below_the_limit_of_files() {
        assert_eq!(connections(10_000, Some(20_000), 16), 10_000);
        assert_eq!(connections(10_000, Some(1024), 16), 752);
        assert_eq!(connections(10_000, Some(64), 16), LEAST);
        assert_eq!(connections(500, None, 16), 500);
    }
}
