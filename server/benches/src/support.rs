//! The part of the tests' support that starts a server with a database.

use quota_server::db;
use secrecy::SecretString;

use self::postgres::TestDatabase;

#[expect(dead_code, reason = "the tests use the rest")]
#[path = "../../tests/it/support/app.rs"]
pub(crate) mod app;
#[cfg_attr(not(test), expect(dead_code, reason = "the tests use the rest"))]
#[path = "../../tests/it/support/postgres.rs"]
mod postgres;

/// Creates the database that the databases of servers are copied from, unless it exists. Unlike the rest, this needs a
/// runtime with several threads.
pub fn migrate() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    let database =
        TestDatabase::create(
            |url| async move { db::migrate(&SecretString::from(url)).await.map(drop) },
        );
    drop(runtime.block_on(database));
}

mod quota {
    use std::{fs::Permissions, os::unix::fs::PermissionsExt as _};

    /// Returns a data directory that PostgreSQL can access even if root runs the benchmark.
    pub(crate) fn data_dir() -> tempfile::TempDir {
        tempfile::Builder::new()
            .prefix("quota-bench-")
            .permissions(Permissions::from_mode(0o711))
            .tempdir_in("/tmp")
            .expect("a directory")
    }
}
