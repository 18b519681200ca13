//! Tests that the API counts and returns exactly the records that were appended to the log.
//!
//! The tests append records in the same way as the shipper does, so they know every record in the log.

mod bench;
mod decisions;
mod oracle;
mod recount;
mod reports;
mod tables;

use chrono::{DateTime, NaiveDate, Utc};
use quota_server::{
    db::DbError,
    repo::{
        usage_append::{self, Appended},
        usage_batch::{UsageBatch, UsageRecord},
        usage_partition::{self, Partitioned},
    },
};
use uuid::Uuid;

use crate::support::app::{Account, TestApp};

/// Returns the current time.
#[expect(
    clippy::disallowed_methods,
    reason = "these tests are about today and yesterday, by PostgreSQL's clock"
)]
pub(crate) fn now() -> DateTime<Utc> {
    Utc::now()
}

/// Appends the records in one transaction, as a shipper appends a batch.
pub(crate) async fn append(app: &TestApp, records: &[UsageRecord]) -> Appended {
    let batch = records.iter().collect::<UsageBatch>();
    for attempt in 0.. {
        let appended = async {
            let mut tx = app.state.db.system().await?;
            let appended = usage_append::append(&mut tx, &batch).await?;
            tx.commit().await?;
            Ok(appended)
        };
        match appended.await {
            Ok(appended) => return appended,
            // Try again: a partition may have just been created, or the machine may be busy.
            Err(DbError::Unavailable(_)) if attempt < 10 => {}
            Err(error) => panic!("{error:?}"),
        }
    }
    unreachable!("the last attempt returns or panics")
}

/// Creates the partitions of the given days.
pub(crate) async fn create_partitions(app: &TestApp, days: impl Iterator<Item = NaiveDate>) {
    for day in days {
        for table in Partitioned::ALL {
            let mut tx = app.state.db.system().await.expect("a transaction");
            usage_partition::create(&mut tx, table, day)
                .await
                .expect("a partition");
            tx.commit().await.expect("a commit");
        }
    }
}

/// Returns the record of an allowed request with a cost of 1.
pub(crate) fn record(account: &Account, key: &str, plan: &str, at: DateTime<Utc>) -> UsageRecord {
    let event_id = Uuid::now_v7();
    UsageRecord {
        event_id,
        tenant_id: account.tenant_id.parse().expect("an ID"),
        key_id: key.parse().expect("an ID"),
        plan_id: plan.parse().expect("an ID"),
        at,
        billing: "free",
        endpoint: "GET /orders".into(),
        was_rejected: false,
        policy: None,
        retry_after_seconds: None,
        cost: 1,
        request_id: event_id.to_string(),
    }
}

/// Changes a record to that of a request that `policy` denied.
pub(crate) fn rejected(record: UsageRecord, policy: &'static str) -> UsageRecord {
    UsageRecord {
        was_rejected: true,
        policy: Some(policy),
        retry_after_seconds: Some(7),
        ..record
    }
}
