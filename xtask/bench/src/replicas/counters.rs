//! The number of script calls, from Redis's own statistics.

use anyhow::{Context as _, Result};
use redis::aio::MultiplexedConnection;

/// Queries one Redis server on a separate connection.
pub(crate) struct Counters {
    connection: MultiplexedConnection,
}

impl Counters {
    pub(crate) async fn of(url: &str) -> Result<Self> {
        let client = redis::Client::open(url)?;
        let connection = client.get_multiplexed_async_connection().await?;
        Ok(Self { connection })
    }

    /// Returns the number of scripts that Redis has run since it started, for decisions and leases.
    pub(crate) async fn scripts(&mut self) -> Result<u64> {
        let text: String = redis::cmd("INFO")
            .arg("commandstats")
            .query_async(&mut self.connection)
            .await
            .context("cannot read Redis's statistics")?;
        Ok(scripts(&text))
    }

    /// Closes every subscription, as a network failure would. Returns the number of connections that were closed.
    pub(crate) async fn end_subscriptions(&mut self) -> Result<u64> {
        Ok(redis::cmd("CLIENT")
            .arg(&["KILL", "TYPE", "pubsub"])
            .query_async(&mut self.connection)
            .await?)
    }
}

/// Returns the number of script calls, from lines such as `cmdstat_evalsha:calls=12,usec=340,…`.
fn scripts(text: &str) -> u64 {
    let calls = |line: &str| -> Option<u64> {
        let (name, rest) = line.strip_prefix("cmdstat_")?.split_once(":calls=")?;
        let count = rest.split(',').next()?.parse().ok()?;
        matches!(name, "evalsha" | "eval" | "fcall").then_some(count)
    };
    text.lines().filter_map(calls).sum()
}

#[cfg(test)]
mod tests {
    use super::scripts;

    #[test]
    fn scripts_are_counted_and_nothing_else() {
        let text = "# Commandstats\r\ncmdstat_evalsha:calls=12,usec=340,usec_per_call=28.33\r\n\
                    cmdstat_eval:calls=1,usec=9\r\ncmdstat_hmget:calls=13,usec=9\r\n";
        assert_eq!(scripts(text), 13);
        assert_eq!(scripts(""), 0);
    }
}
