//! Restarts replicas behind Caddy under load.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// Returns the directory of PostgreSQL's programs.
fn programs() -> PathBuf {
    let output = Command::new("pg_config").arg("--bindir").output();
    if let Ok(output) = output
        && output.status.success()
    {
        return PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    }
    let newest = std::fs::read_dir("/usr/lib/postgresql")
        .expect("PostgreSQL is installed")
        .map(|entry| entry.expect("an entry").path())
        .max();
    newest.expect("PostgreSQL is installed").join("bin")
}

/// Returns the number in the row whose first cell is `row`.
fn number(table: &str, row: &str) -> u64 {
    let cell = table.lines().find_map(|line| {
        let (name, cell) = line.trim_matches('|').split_once('|')?;
        (name.trim().trim_matches('*') == row).then(|| cell.trim())
    });
    let cell = cell.unwrap_or_else(|| panic!("{row:?} is not in\n{table}"));
    cell.parse().expect("a number")
}

#[test]
fn restarts_behind_caddy_fail_no_request() {
    let bench = Path::new(env!("CARGO_BIN_EXE_quota-bench"));
    let quota = bench.with_file_name("quota");
    assert!(
        quota.exists(),
        "the server is not built: `cargo build --package quota-server`, or run all tests"
    );
    let tools = bench.ancestors().nth(2).expect("a target directory");
    let output = Command::new(bench)
        .arg("restarts")
        .arg(quota)
        .args(["2", "--kills", "0", "--rate", "50"])
        // Other tests may keep the machine busy.
        .args(["--redis-timeout", "5s"])
        .arg("--programs")
        .arg(programs())
        .arg("--tools")
        .arg(tools.join("tools"))
        .output()
        .expect("the binary runs");
    let table = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{table}\n{errors}");
    assert_eq!(number(&table, "restarts with SIGTERM"), 2);
    assert_eq!(number(&table, "failed"), 0);
    assert_eq!(number(&table, "lost"), 0);
    // Requests are sent before, between and after the restarts.
    let requests = number(&table, "requests");
    assert!(requests >= 350, "{table}");
    assert_eq!(number(&table, "rows in the usage log"), requests);
}
