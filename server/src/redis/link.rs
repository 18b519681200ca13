//! Calls on one connection.

use std::{
    pin::pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use redis::{Cmd, ErrorKind, RedisError, ServerErrorKind, ToRedisArgs, Value};

use super::{
    connection::{Connection, is_of_the_connection, send},
    shared::{CallError, Live, Script, Shared},
    span,
};
use crate::deadline::{self, Late};

/// A handle to one connection, which may break at any time.
#[derive(Clone)]
pub struct Link {
    pub(super) live: Live,
    pub(super) at: usize,
    pub(super) shared: Arc<Shared>,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link")
            .field("generation", &self.live.generation)
            .field("run_id", &self.live.run_id)
            .finish_non_exhaustive()
    }
}

impl Link {
    /// Returns a number that differs for each connection.
    pub fn generation(&self) -> u64 {
        self.live.generation
    }

    /// Returns the server's run ID, which changes with every restart. Returns `None` if the server hides its run ID.
    /// Also returns `None` for a cluster, because each node has a different run ID.
    pub fn run_id(&self) -> Option<&str> {
        self.live.run_id.as_deref()
    }

    /// Runs a script by its hash or, if the server does not have the script, by its source. Waits for the response for
    /// at most `QUOTA_REDIS_TIMEOUT`, or `patience` if that is longer. In a cluster, all keys must have the same hash
    /// tag.
    pub async fn eval(
        &self,
        script: &Script,
        keys: &[&str],
        args: &[impl ToRedisArgs],
        patience: Option<Duration>,
    ) -> Result<Value, CallError> {
        let call = |name: &str, script: &str| {
            let mut cmd = Cmd::with_capacity(3 + keys.len() + args.len(), 256);
            cmd.arg(name).arg(script).arg(keys.len());
            cmd.arg(keys).arg(args);
            cmd
        };
        let known = call("EVALSHA", &script.hash);
        let span = span::of_script(script);
        let answer = self
            .within(patience, async |mut connection: Connection| {
                match send(&mut connection, &known).await {
                    Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                        send(&mut connection, &call("EVAL", script.code)).await
                    }
                    answer => answer,
                }
            })
            .await;
        span::end(span, &answer);
        answer
    }

    /// Sends one command and waits for its response for at most `QUOTA_REDIS_TIMEOUT`.
    pub async fn query(&self, cmd: &Cmd) -> Result<Value, CallError> {
        let span = span::of_command(cmd);
        let answer = self
            .within(None, async |mut connection: Connection| {
                send(&mut connection, cmd).await
            })
            .await;
        span::end(span, &answer);
        answer
    }

    async fn within(
        &self,
        patience: Option<Duration>,
        call: impl AsyncFnOnce(Connection) -> Result<Value, RedisError>,
    ) -> Result<Value, CallError> {
        let counts = &self.shared.counts;
        counts.calls.fetch_add(1, Ordering::Relaxed);
        let limit = self.shared.settings.timeout;
        let mut call = pin!(call(self.live.connection.clone()));
        let mut answer = deadline::within(limit, &mut call).await;
        if answer.is_err() {
            counts.timed_out.fetch_add(1, Ordering::Relaxed);
            // The supervisor checks whether the connection is dead or merely slow.
            self.shared.slots[self.at].check.notify_one();
            if let Some(more) = patience.and_then(|it| it.checked_sub(limit)) {
                answer = deadline::within(more, call).await;
            }
        }
        match answer {
            Err(Late) => Err(CallError::TimedOut(
                patience.map_or(limit, |it| it.max(limit)),
            )),
            Ok(answer) => answer.map_err(|error| {
                counts.failed.fetch_add(1, Ordering::Relaxed);
                if is_of_the_connection(&error) {
                    self.discard();
                }
                CallError::Failed(error)
            }),
        }
    }

    /// Causes the supervisor to replace this connection. A connection to a cluster remains in use until it has been
    /// replaced. A connection to a single server is not used for further calls.
    fn discard(&self) {
        let slot = &self.shared.slots[self.at];
        let mut live = slot.live.write();
        if live
            .as_ref()
            .is_some_and(|it| it.generation == self.live.generation)
        {
            match self.live.connection {
                Connection::One(_) => *live = None,
                Connection::Cluster(_) => slot.is_broken.store(true, Ordering::Release),
            }
        }
        drop(live);
        slot.check.notify_one();
    }
}
