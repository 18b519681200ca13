//! `quota usage`: a usage report for operators.
//!
//! Needs only PostgreSQL, so it works while no server is running.

use std::fmt::Write as _;

use uuid::Uuid;

use crate::{
    db::{Db, DbError},
    repo::{
        usage_shipper::{self, ShipperReport, Times},
        usage_shipping,
        usage_top::{self, TopKey, TopTenant},
    },
};

/// A replica that has not reported for this long has stopped or cannot reach PostgreSQL.
const SILENT_SECONDS: i64 = 30;

/// The minimum age of a report before an operator may remove it.
const FORGET_SECONDS: i64 = 60;

/// The result of [`forget`].
#[derive(Debug)]
pub enum Forgotten {
    Unknown,
    /// The report is less than a minute old, so the replica that owns the directory may still be running.
    Recent(ShipperReport),
    Removed(ShipperReport),
}

/// Removes the report about a lost usage directory, so that usage is considered complete without this directory.
pub async fn forget(db: &Db, directory: Uuid) -> Result<Forgotten, DbError> {
    let mut tx = db.system().await?;
    let Some(report) = usage_shipper::report_of(&mut tx, directory).await? else {
        return Ok(Forgotten::Unknown);
    };
    if report.seconds_since_report < FORGET_SECONDS {
        return Ok(Forgotten::Recent(report));
    }
    usage_shipping::remove_report(&mut tx, directory).await?;
    tx.commit().await?;
    Ok(Forgotten::Removed(report))
}

/// Formats a report as text.
pub fn table(report: &ShipperReport) -> String {
    let mut text = String::new();
    reports_table(&mut text, std::slice::from_ref(report));
    text
}

/// Returns the usage report as text.
pub async fn report(db: &Db, hours: u16, top: u16) -> Result<String, DbError> {
    let mut tx = db.system().await?;
    let times = usage_shipper::times(&mut tx).await?;
    let reports = usage_shipper::reports(&mut tx).await?;
    let tenants = usage_top::tenants(&mut tx, hours, top).await?;
    let keys = usage_top::keys(&mut tx, hours, top).await?;
    tx.commit().await?;
    let mut text = String::new();
    delivery(&mut text, times, &reports);
    let hours_text = if hours == 1 { "hour" } else { "hours" };
    let _ = writeln!(
        text,
        "\nTenants with the most requests in the last {hours} {hours_text}"
    );
    rows(
        &mut text,
        &["tenant", "name", "allowed", "denied", "cost"],
        tenants.iter().map(tenant),
    );
    let _ = writeln!(
        text,
        "\nAPI keys with the most requests in the last {hours} {hours_text}"
    );
    rows(
        &mut text,
        &["key", "prefix", "tenant", "allowed", "denied", "cost"],
        keys.iter().map(key),
    );
    Ok(text)
}

fn tenant(row: &TopTenant) -> Vec<String> {
    vec![
        row.tenant_id.to_string(),
        row.name.clone().unwrap_or_else(|| "(deleted)".into()),
        row.counts.allowed.to_string(),
        row.counts.rejected.to_string(),
        row.counts.cost.to_string(),
    ]
}

fn key(row: &TopKey) -> Vec<String> {
    vec![
        row.key_id.to_string(),
        row.prefix.clone().unwrap_or_else(|| "(deleted)".into()),
        row.tenant_id.to_string(),
        row.counts.allowed.to_string(),
        row.counts.rejected.to_string(),
        row.counts.cost.to_string(),
    ]
}

fn delivery(text: &mut String, times: Times, reports: &[ShipperReport]) {
    let lag = (times.now - times.complete_until).num_seconds().max(0);
    let pending: i64 = reports.iter().map(|it| it.pending_records).sum();
    let bytes: i64 = reports.iter().map(|it| it.pending_bytes).sum();
    let _ = writeln!(
        text,
        "Usage is complete up to {} ({lag} s ago). Not shipped yet: {pending} records, {bytes} bytes.",
        times.complete_until.format("%Y-%m-%dT%H:%M:%SZ"),
    );
    if reports.is_empty() {
        return;
    }
    text.push('\n');
    reports_table(text, reports);
}

fn reports_table(text: &mut String, reports: &[ShipperReport]) {
    let row = |it: &ShipperReport| {
        let is_silent = it.seconds_since_report > SILENT_SECONDS;
        let oldest = it
            .oldest_pending_at
            .map(|at| at.format("%Y-%m-%dT%H:%M:%SZ").to_string());
        vec![
            it.directory_id.to_string(),
            it.host.clone(),
            it.pending_records.to_string(),
            it.pending_bytes.to_string(),
            oldest.unwrap_or_else(|| "-".into()),
            format!(
                "{} s ago{}",
                it.seconds_since_report,
                if is_silent { " (silent)" } else { "" }
            ),
        ]
    };
    rows(
        text,
        &[
            "directory",
            "host",
            "records",
            "bytes",
            "oldest",
            "last report",
        ],
        reports.iter().map(row),
    );
}

/// Writes columns, each as wide as its longest value.
fn rows(text: &mut String, header: &[&str], rows: impl Iterator<Item = Vec<String>>) {
    let header = header.iter().map(|it| (*it).to_owned()).collect::<Vec<_>>();
    let all = std::iter::once(header).chain(rows).collect::<Vec<_>>();
    let columns = all.first().map_or(0, Vec::len);
    let width = |column: usize| {
        let cells = all.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths = (0..columns).map(width).collect::<Vec<_>>();
    for row in &all {
        let cells = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"));
        let line = cells.collect::<Vec<_>>().join("  ");
        let _ = writeln!(text, "{}", line.trim_end());
    }
    if all.len() == 1 {
        let _ = writeln!(text, "(none)");
    }
}
