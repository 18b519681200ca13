//! A connection to one server or to a cluster.

use std::time::Duration;

use redis::{
    Cmd, ErrorKind, RedisError, RedisFuture, ServerErrorKind, Value,
    aio::{ConnectionLike, MultiplexedConnection},
    cluster_async::ClusterConnection,
};

/// The pause before a command is resent because its key has moved to another node of the cluster.
const MOVING: Duration = Duration::from_millis(3);

#[derive(Clone)]
pub(super) enum Connection {
    One(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl ConnectionLike for Connection {
    fn req_packed_command<'a>(&'a mut self, cmd: &'a Cmd) -> RedisFuture<'a, Value> {
        match self {
            Self::One(it) => it.req_packed_command(cmd),
            Self::Cluster(it) => it.req_packed_command(cmd),
        }
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        cmd: &'a redis::Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        match self {
            Self::One(it) => it.req_packed_commands(cmd, offset, count),
            Self::Cluster(it) => it.req_packed_commands(cmd, offset, count),
        }
    }

    fn get_db(&self) -> i64 {
        match self {
            Self::One(it) => it.get_db(),
            Self::Cluster(it) => it.get_db(),
        }
    }
}

/// Sends a command, and resends it if a key has moved to another node of the cluster.
pub(super) async fn send(connection: &mut Connection, cmd: &Cmd) -> Result<Value, RedisError> {
    loop {
        let answer = connection.req_packed_command(cmd).await;
        match answer.and_then(Value::extract_error) {
            // The command was not executed, so it can be sent again. Meanwhile, the connection refreshes its map of the
            // cluster.
            Err(error) if is_elsewhere(&error) => tokio::time::sleep(MOVING).await,
            answer => return answer,
        }
    }
}

/// Returns whether a node did not execute the command because the key has moved, or is being moved, to another node.
fn is_elsewhere(error: &RedisError) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Server(
            ServerErrorKind::Moved | ServerErrorKind::Ask | ServerErrorKind::TryAgain
        )
    )
}

/// Returns whether the command might succeed on another connection, because this connection is broken or its server is
/// not a master.
pub(super) fn is_of_the_connection(error: &RedisError) -> bool {
    error.is_io_error()
        || error.is_unrecoverable_error()
        || matches!(
            error.kind(),
            ErrorKind::Server(ServerErrorKind::ReadOnly | ServerErrorKind::MasterDown)
        )
}
