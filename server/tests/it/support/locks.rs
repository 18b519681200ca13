//! Observes locks in PostgreSQL, so that a test can continue when a statement of the server waits.

use std::time::{Duration, Instant};

use tokio_postgres::Client;

/// How long a test waits before it fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// Returns the number of locks in the observer's database that meet `condition`, an SQL condition on `pg_locks`. Locks
/// that belong to no database, such as those on transaction IDs, are not counted.
pub(crate) async fn count_locks(observer: &Client, condition: &str) -> i64 {
    let sql = format!(
        "SELECT count(*) FROM pg_locks JOIN pg_database d ON d.oid = database \
         WHERE datname = current_database() AND {condition}"
    );
    let row = observer.query_one(&sql, &[]).await;
    row.expect("a valid condition").get(0)
}

/// Waits until a lock meets `condition`. See [`count_locks`].
pub(crate) async fn wait_for_lock(observer: &Client, condition: &str) {
    let began = Instant::now();
    while count_locks(observer, condition).await == 0 {
        assert!(began.elapsed() < PATIENCE, "no lock with {condition}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
