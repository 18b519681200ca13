//! The tests' support code that starts a server with a database.

use quota_server::db;
use secrecy::SecretString;

use self::postgres::TestDatabase;

#[expect(dead_code, reason = "the tests use the rest")]
#[path = "../../tests/it/support/app.rs"]
pub(crate) mod app;
#[cfg_attr(not(test), expect(dead_code, reason = "the tests use the rest"))]
#[path = "../../tests/it/support/postgres.rs"]
mod postgres;

/// Creates the template database if it does not exist. The servers' databases are copied from the template. Unlike the
/// rest of the benchmark, this function needs a multi-threaded runtime.
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
