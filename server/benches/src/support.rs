//! The part of the tests' support that starts a server with a database.

#[expect(dead_code, reason = "the tests use the rest")]
#[path = "../../tests/it/support/app.rs"]
pub(crate) mod app;
#[cfg_attr(not(test), expect(dead_code, reason = "the tests use the rest"))]
#[path = "../../tests/it/support/postgres.rs"]
mod postgres;

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
