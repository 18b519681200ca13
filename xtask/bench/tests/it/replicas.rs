//! Checks that the benchmark with several replicas detects exceeded limits, and raises no false alarms.

use std::{
    path::PathBuf,
    process::{Command, Output},
};

use quota_server::db::embedded::EmbeddedPostgres;
use serde_json::Value;

/// The results of a run: the tables, and whether the run succeeded.
struct Found {
    tables: Vec<Value>,
    content: bool,
}

impl Found {
    fn rows(&self) -> &[Value] {
        self.tables[0]["rows"].as_array().expect("rows")
    }

    fn faults(&self) -> &[Value] {
        self.tables[0]["faults"].as_array().expect("faults")
    }
}

fn number(row: &Value, column: &str) -> f64 {
    let cell = row[column].as_str().expect("a cell");
    let digits = cell
        .trim_end_matches('%')
        .trim_end()
        .trim_start_matches('+');
    digits.parse().expect("a number")
}

/// Runs `quota-bench replicas --quick` with these arguments.
async fn measured(arguments: &[&str]) -> Found {
    let dir = tempfile::Builder::new()
        .prefix("quota-bench-it-")
        .tempdir_in("/tmp")
        .expect("a directory");
    #[expect(clippy::disallowed_methods, reason = "tests have no `Config`")]
    let shared = std::env::var("QUOTA_TEST_POSTGRES");
    let (url, own) = match shared {
        Ok(url) => (url, None),
        Err(_) => {
            let postgres = EmbeddedPostgres::start(&dir.path().join("database"))
                .await
                .expect("PostgreSQL starts");
            let url = postgres.database_url();
            let (cluster, _) = url.rsplit_once('/').expect("a URL ends in a database");
            (format!("{cluster}/postgres"), Some(postgres))
        }
    };
    let bench = PathBuf::from(env!("CARGO_BIN_EXE_quota-bench"));
    let quota = bench.with_file_name("quota");
    assert!(
        quota.exists(),
        "the server is not built: `cargo build --package quota-server`, or run all tests"
    );
    let json = dir.path().join("tables.json");
    let mut command = Command::new(bench);
    command
        .arg("replicas")
        .arg(quota)
        .args(["--postgres", &url, "--quick", "--json"])
        .arg(&json)
        .args(arguments);
    // Run the command on another thread, because this runtime keeps the database running.
    let (done, ran) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || done.send(command.output()));
    let Output { status, stderr, .. } = ran
        .await
        .expect("the command ran")
        .expect("the measurement can be started");
    let said = String::from_utf8_lossy(&stderr);
    let tables = std::fs::read(&json).unwrap_or_else(|_| panic!("no tables: {said}"));
    if let Some(postgres) = own {
        postgres.stop().await;
    }
    Found {
        tables: serde_json::from_slice(&tables).expect("JSON"),
        content: status.success(),
    }
}

#[tokio::test]
async fn missing_sharing_is_detected_and_a_single_replica_is_not_reported() {
    let found = measured(&["--only", "limits", "--no-redis", "--replicas", "1,2"]).await;
    assert!(!found.content, "a violation is a failure");
    let mut seen = 0;
    for row in found.rows() {
        let excess = number(row, "excess, tokens");
        if row["replicas"] == "1" {
            assert!(excess <= 0.0, "{row}");
        } else {
            // There are two buckets, each with the full burst and the full rate.
            assert!(number(row, "served") > 150.0, "{row}");
            assert!(excess >= 1.0, "{row}");
            seen += 1;
        }
    }
    assert_eq!(found.faults().len(), seen, "{:?}", found.faults());
    assert!(seen > 0, "both were measured");
}

#[tokio::test]
async fn replicas_that_share_a_redis_stay_within_the_envelope() {
    let found = measured(&["--only", "limits", "--replicas", "2"]).await;
    for row in found.rows() {
        assert!(number(row, "admitted") > 0.0, "{row}");
        assert!(number(row, "excess, tokens") <= 0.0, "{row}");
        assert!(number(row, "Redis calls per 1,000") > 0.0, "{row}");
    }
}

#[tokio::test]
async fn a_daily_quota_is_exact_across_replicas_that_share_nothing_else() {
    let found = measured(&["--only", "daily", "--no-redis", "--replicas", "2"]).await;
    assert!(found.content, "{:?}", found.faults());
    let row = &found.rows()[0];
    assert_eq!(row["served in total"], row["quota"], "{row}");
}

#[tokio::test]
async fn requests_that_cost_several_tokens_stay_within_the_envelope() {
    let found = measured(&["--only", "weighted"]).await;
    for row in found.rows() {
        let (admitted, tokens) = (number(row, "admitted"), number(row, "tokens admitted"));
        assert!(admitted > 0.0 && tokens >= admitted, "{row}");
        assert!(number(row, "excess, tokens") <= 0.0, "{row}");
    }
}

#[tokio::test]
async fn after_a_clean_stop_exactly_the_used_tokens_are_counted() {
    let found = measured(&["--only", "drain", "--no-redis"]).await;
    assert!(found.content, "{:?}", found.faults());
    for row in found.rows() {
        assert!(number(row, "admitted") > 0.0, "{row}");
        assert_eq!(row["never served"], "0", "{row}");
    }
}

#[tokio::test]
async fn changes_are_detected_and_timed() {
    let found = measured(&["--only", "changes", "--no-redis"]).await;
    assert_eq!(found.rows().len(), 4);
    for row in found.rows() {
        assert!(number(row, "count") > 0.0, "{row}");
        assert_eq!(row["fell back"], "0", "{row}");
    }
}
