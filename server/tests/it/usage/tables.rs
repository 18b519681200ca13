//! Tests the contents of the tables: ordered rows, consistent rollups, a bounded number of endpoints, and partitions
//! that are created and dropped.

use std::collections::BTreeSet;

use chrono::{Days, TimeDelta};
use quota_server::repo::{
    usage_append::{self, Appended},
    usage_batch::{UsageBatch, UsageRecord},
    usage_check,
    usage_shipping::open_cursor,
};
use serde_json::Value;
use tokio_postgres::Client;
use uuid::Uuid;

use super::{append, create_partitions, now, record, rejected};
use crate::support::app::{Account, TestApp};

const KEY: &str = "00000000-0000-7000-8000-00000000000a";
const OTHER_KEY: &str = "00000000-0000-7000-8000-00000000000c";
const PLAN: &str = "00000000-0000-7000-8000-00000000000b";

async fn number(client: &Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).await.expect("a query").get(0)
}

fn batch(account: &Account, count: usize) -> Vec<UsageRecord> {
    let yesterday = now() - TimeDelta::days(1);
    (0..count)
        .map(|n| {
            let mut it = record(
                account,
                KEY,
                PLAN,
                yesterday + TimeDelta::milliseconds(i64::try_from(n).expect("small")),
            );
            it.key_id = Uuid::from_u128(it.key_id.as_u128() + (n % 3) as u128);
            it.endpoint = format!("GET /{}", n % 7);
            if n % 5 == 0 { rejected(it, "rpm") } else { it }
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_shippers_of_the_same_tenants_wait_for_each_other_and_leave_no_gap() {
    // Concurrent batches may have to wait for a connection.
    let app = TestApp::setup()
        .without_jobs()
        .flag("--database-wait=10s")
        .start()
        .await;
    let mut tenants = Vec::new();
    for _ in 0..4 {
        tenants.push(app.register().await);
    }
    // Every batch contains records of all tenants, in a different order.
    let batches = (0..12).map(|n| {
        let mut records = Vec::new();
        for i in 0..tenants.len() {
            records.extend(batch(&tenants[(i + n) % tenants.len()], 50));
        }
        records
    });
    let tasks = batches.collect::<Vec<_>>();
    let appended = futures_util::future::join_all(tasks.iter().map(|it| append(&app, it))).await;
    assert!(
        appended.iter().all(|it| *it
            == Appended {
                rows: 200,
                folded: 0
            }),
        "{appended:?}"
    );
    let client = app.database.connect().await;
    let gaps = "SELECT count(*) FROM (SELECT seq - lag(seq, 1, 0) OVER (PARTITION BY tenant_id ORDER BY seq) AS step \
        FROM usage_log) t WHERE step <> 1";
    assert_eq!(number(&client, gaps).await, 0);
    assert_eq!(
        number(&client, "SELECT count(*) FROM usage_log").await,
        2400
    );
    let ends = "SELECT count(*) FROM usage_tenants WHERE last_seq = 600";
    assert_eq!(number(&client, ends).await, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolled_back_batch_leaves_nothing_and_can_be_sent_again() {
    let app = TestApp::setup().without_jobs().start().await;
    let account = app.register().await;
    let records = batch(&account, 100);
    let mut tx = app.state.db.system().await.expect("a transaction");
    usage_append::append(&mut tx, &records.iter().collect::<UsageBatch>())
        .await
        .expect("the records fit");
    drop(tx);
    let client = app.database.connect().await;
    let rows = "SELECT (SELECT count(*) FROM usage_log) + (SELECT count(*) FROM usage_quarters) \
        + (SELECT count(*) FROM usage_tenants)";
    assert_eq!(number(&client, rows).await, 0);
    append(&app, &records).await;
    assert_eq!(
        number(&client, "SELECT max(last_seq) FROM usage_tenants").await,
        100
    );
    assert_eq!(append(&app, &[]).await, Appended::default());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_needs_several_statements_is_appended_row_by_row_as_it_is() {
    let app = TestApp::setup().without_jobs().start().await;
    let (one, two) = (app.register().await, app.register().await);
    let mut records = [batch(&one, 4500), batch(&two, 4500)].concat();
    for (n, record) in records.iter_mut().enumerate() {
        record.cost = 1 + i64::try_from(n % 4).expect("small");
        record.billing = ["free", "paid"][n % 2];
    }
    fastrand::Rng::with_seed(7).shuffle(&mut records);
    assert_eq!(append(&app, &records).await.rows, 9000);
    records.sort_by_key(|it| (it.tenant_id, it.at, it.event_id));
    let expected = records
        .chunk_by(|one, next| one.tenant_id == next.tenant_id)
        .flat_map(|of_tenant| of_tenant.iter().zip(1..))
        .map(|(it, seq)| {
            format!(
                "{} {seq} {} {} {} {} {} {:?} {} {} {:?} {} {}",
                it.tenant_id,
                it.at.timestamp_micros(),
                it.event_id,
                it.key_id,
                it.plan_id,
                it.cost,
                it.retry_after_seconds,
                it.was_rejected,
                it.billing,
                it.policy,
                it.endpoint,
                it.request_id
            )
        });
    let client = app.database.connect().await;
    let rows = client
        .query(
            "SELECT format('%s %s %s %s %s %s %s %s %s %s %s %s %s', tenant_id, seq, \
                 (extract(epoch FROM \"timestamp\") * 1000000)::bigint, event_id, key_id, plan_id, cost, \
                 coalesce('Some(' || retry_after_seconds || ')', 'None'), was_rejected::text, billing, \
                 coalesce('Some(\"' || policy || '\")', 'None'), endpoint, request_id) \
             FROM usage_log ORDER BY tenant_id, seq",
            &[],
        )
        .await
        .expect("a query");
    let rows = rows.iter().map(|it| it.get::<_, String>(0));
    assert!(rows.eq(expected));
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoints_above_the_limit_count_together_and_keep_their_names_in_the_log() {
    let app = TestApp::setup().without_jobs().start().await;
    let account = app.register().await;
    let at = now() - TimeDelta::hours(2);
    let named = |n: i64| UsageRecord {
        endpoint: format!("GET /{n:03}"),
        ..record(&account, KEY, PLAN, at + TimeDelta::seconds(n))
    };
    let first = (0..200).map(named).collect::<Vec<_>>();
    assert_eq!(append(&app, &first).await.folded, 0);
    // The limit is 256: of the next 100 endpoints, the first 56 by time still fit.
    let second = (200..300).rev().map(named).collect::<Vec<_>>();
    assert_eq!(append(&app, &second).await.folded, 44);
    // An endpoint that was listed once remains listed.
    assert_eq!(append(&app, &first).await.folded, 0);
    let list = async |query: &str| {
        let path = format!("/admin/usage?{query}");
        app.act(&account, "GET", &path, Value::Null).await.body
    };
    let key = format!("key_id={KEY}");
    assert_eq!(
        list(&format!("{key}&endpoint=GET%20/255")).await["total"]["allowed"],
        1
    );
    assert_eq!(
        list(&format!("{key}&endpoint=GET%20/256")).await["total"]["allowed"],
        0
    );
    assert_eq!(list(&key).await["total"]["allowed"], 500);
    // The tenant's list can contain more endpoints than the list of a key. An endpoint is added to the tenant's list
    // only if the key's list contains the endpoint, so one consumer cannot fill the tenant's list.
    assert_eq!(list("endpoint=GET%20/255").await["total"]["allowed"], 1);
    assert_eq!(list("endpoint=GET%20/256").await["total"]["allowed"], 0);
    let other = UsageRecord {
        key_id: OTHER_KEY.parse().expect("an ID"),
        ..named(256)
    };
    assert_eq!(append(&app, &[other]).await.folded, 0);
    assert_eq!(list("endpoint=GET%20/256").await["total"]["allowed"], 1);
    let grouped = list(&format!("{key}&group_by=endpoint")).await;
    let groups = grouped["groups"].as_array().expect("groups");
    let sum: u64 = groups
        .iter()
        .map(|it| it["allowed"].as_u64().expect("a number"))
        .sum();
    assert_eq!((groups.len(), sum), (21, 500));
    let client = app.database.connect().await;
    let names = "SELECT count(DISTINCT endpoint) FROM usage_log";
    assert_eq!(number(&client, names).await, 300);
    let lists = "SELECT count(*) FROM usage_endpoints WHERE key_id = '00000000-0000-0000-0000-000000000000'";
    assert_eq!(number(&client, lists).await, 257);

    // An endpoint's last use is recorded at most once a day.
    let age = "UPDATE usage_endpoints SET seen_on = CURRENT_DATE - 9 WHERE endpoint IN ('GET /000', 'GET /001')";
    client.batch_execute(age).await.expect("older endpoints");
    append(&app, &first[1..]).await;
    let old =
        "SELECT count(*) FROM usage_endpoints WHERE seen_on < CURRENT_DATE AND endpoint = 'GET /";
    assert_eq!(number(&client, &format!("{old}000'")).await, 2);
    assert_eq!(number(&client, &format!("{old}001'")).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn log_and_rollups_agree_and_a_difference_is_found_at_every_level() {
    let app = TestApp::setup().without_jobs().start().await;
    let (one, two) = (app.register().await, app.register().await);
    append(&app, &batch(&one, 300)).await;
    append(&app, &batch(&two, 200)).await;
    let client = app.database.connect().await;
    let differences = async || {
        let mut tx = app.state.db.system().await.expect("a transaction");
        let day = (now() - TimeDelta::days(1)).date_naive();
        let found = usage_check::differences(&mut tx, day)
            .await
            .expect("a comparison");
        tx.commit().await.expect("a commit");
        found.expect("no other process compares").log_and_rollups
    };
    assert_eq!(differences().await, 0);
    for damage in [
        "DELETE FROM usage_log WHERE seq = 7",
        "UPDATE usage_quarters SET requests = requests + 1 WHERE endpoint = E'\\x01' \
            AND plan_id = '00000000-0000-0000-0000-000000000000'",
        "UPDATE usage_days SET requests = requests + 1 WHERE endpoint = E'\\x01' \
            AND plan_id = '00000000-0000-0000-0000-000000000000'",
        "UPDATE usage_days SET requests = requests + 1 WHERE endpoint = E'\\x01' AND key_id::text LIKE '%a'",
        "UPDATE usage_days SET requests = requests - 1 WHERE endpoint = 'GET /1' AND policy = ''",
        "DELETE FROM usage_days WHERE plan_id <> '00000000-0000-0000-0000-000000000000' \
            AND key_id = '00000000-0000-0000-0000-000000000000'",
    ] {
        client.batch_execute("CREATE TABLE kept_log AS TABLE usage_log; CREATE TABLE kept_quarters AS TABLE usage_quarters; \
            CREATE TABLE kept_days AS TABLE usage_days").await.expect("copies");
        client.batch_execute(damage).await.expect("damage");
        assert!(differences().await > 0, "{damage}");
        client.batch_execute("TRUNCATE usage_log, usage_quarters, usage_days; INSERT INTO usage_log TABLE kept_log; \
            INSERT INTO usage_quarters TABLE kept_quarters; INSERT INTO usage_days TABLE kept_days; \
            DROP TABLE kept_log, kept_quarters, kept_days").await.expect("repair");
        assert_eq!(differences().await, 0, "repaired after {damage}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ledger_is_compared_with_windows_that_have_ended() {
    let app = TestApp::setup().without_jobs().start().await;
    let account = app.register().await;
    let plan = app
        .plan(&account, serde_json::json!({"daily_quota": 1000}))
        .await;
    let key = app.key(&account, &plan).await;
    let midnight = (now() - TimeDelta::hours(2))
        .date_naive()
        .and_hms_opt(0, 0, 0)
        .expect("midnight")
        .and_utc();
    let (start, end) = (
        midnight - TimeDelta::days(1),
        midnight.min(now() - TimeDelta::hours(2)),
    );
    let records = (0..10)
        .map(|n| record(&account, &key.id, &plan, start + TimeDelta::hours(n)))
        .map(|it| UsageRecord { cost: 3, ..it })
        .collect::<Vec<_>>();
    append(&app, &records).await;
    append(
        &app,
        &[rejected(record(&account, &key.id, &plan, start), "daily")],
    )
    .await;
    let client = app.database.connect().await;
    let mut found = Vec::new();
    // In the last two cases, the plan was edited, so it may have had no quota during a part of the window.
    for (used, is_changed) in [
        (30_i64, false),
        (42, false),
        (11, false),
        (11, true),
        (42, true),
    ] {
        if is_changed {
            client
                .execute(
                    "UPDATE plans SET daily_quota = daily_quota + 1 WHERE id = $1::text::uuid",
                    &[&plan],
                )
                .await
                .expect("the plan changes");
        }
        client
            .execute(
                "INSERT INTO quota_usage (tenant_id, key_id, policy, window_start, used, window_end, period_seconds) \
                 VALUES ($1::text::uuid, $2::text::uuid, 'daily', $3::text::timestamptz, $4, $5::text::timestamptz, 86400) \
                 ON CONFLICT ON CONSTRAINT quota_usage_pkey DO UPDATE SET used = excluded.used",
                &[&account.tenant_id, &key.id, &start.to_rfc3339(), &used, &end.to_rfc3339()],
            )
            .await
            .expect("a window");
        let mut tx = app.state.db.system().await.expect("a transaction");
        let it = usage_check::differences(&mut tx, start.date_naive())
            .await
            .expect("a comparison");
        tx.commit().await.expect("a commit");
        let it = it.expect("no other process compares");
        found.push((it.ledger_excess, it.rollup_excess));
    }
    assert_eq!(found, [(0, 0), (12, 0), (0, 19), (0, 0), (12, 0)]);
}

async fn partitions(client: &Client, table: &str) -> BTreeSet<String> {
    let rows = client
        .query(
            "SELECT right(c.relname, 8) FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid \
             WHERE i.inhparent = $1::text::regclass AND c.relname !~ 'default'",
            &[&table],
        )
        .await
        .expect("the catalog is readable");
    rows.iter().map(|row| row.get(0)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn partitions_are_created_ahead_and_rows_that_came_first_move_there() {
    let app = TestApp::setup().without_jobs().start().await;
    let account = app.register().await;
    append(&app, &batch(&account, 100)).await;
    let client = app.database.connect().await;
    let in_default = "SELECT (SELECT count(*) FROM usage_log_default) + (SELECT count(*) FROM usage_quarters_default) \
        + (SELECT count(*) FROM usage_days_default)";
    assert!(number(&client, in_default).await > 100);
    let replica = TestApp::setup()
        .database(app.database.clone())
        .start()
        .await;
    let last = (now() + Days::new(7)).format("%Y%m%d").to_string();
    // Yesterday's partition is created last.
    let yesterday = (now() - Days::new(1)).format("%Y%m%d").to_string();
    holds(async || partitions(&client, "usage_days").await.contains(&yesterday)).await;
    for table in ["usage_log", "usage_quarters", "usage_days"] {
        let created = partitions(&client, table).await;
        assert_eq!(
            created.len(),
            9,
            "{table}: yesterday, today and 7 days: {created:?}"
        );
        assert_eq!(created.last(), Some(&last));
    }
    assert_eq!(number(&client, in_default).await, 0);
    assert_eq!(number(&client, "SELECT count(*) FROM usage_log").await, 100);
    // More records of about the same time go into yesterday's partitions.
    append(&app, &batch(&account, 100)).await;
    assert_eq!(number(&client, in_default).await, 0);
    let usage = app
        .act(&account, "GET", "/admin/usage?bucket=day", Value::Null)
        .await;
    assert_eq!(usage.body["total"]["allowed"], 160);
    replica.stop().await;
}

/// Waits until a condition holds, but gives up after about a minute. Returns whether the condition holds in the end.
async fn holds(mut check: impl AsyncFnMut() -> bool) -> bool {
    for _ in 0..1200 {
        if check().await {
            return true;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    false
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_whose_partitions_cannot_be_created_holds_up_no_other() {
    let app = TestApp::setup().without_jobs().start().await;
    let reader = app.database.connect().await;
    // Hold a lock, as a long query would.
    reader
        .batch_execute("BEGIN; LOCK TABLE usage_log_default IN ACCESS SHARE MODE")
        .await
        .expect("the lock is acquired");
    let client = app.database.connect().await;
    let replica = TestApp::setup()
        .database(app.database.clone())
        .start()
        .await;
    for table in ["usage_quarters", "usage_days"] {
        let created = holds(async || partitions(&client, table).await.len() == 9).await;
        assert!(created, "{table}: {:?}", partitions(&client, table).await);
    }
    assert_eq!(partitions(&client, "usage_log").await, BTreeSet::new());
    reader
        .batch_execute("COMMIT")
        .await
        .expect("the lock is released");
    let created = holds(async || partitions(&client, "usage_log").await.len() == 9).await;
    assert!(created, "the creation was not retried");
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn partitions_are_created_however_long_it_takes() {
    let app = TestApp::setup().without_jobs().start().await;
    let client = app.database.connect().await;
    // Each partition takes longer to create than the statement timeout allows.
    client
        .batch_execute(
            "CREATE FUNCTION wait_for_partition() RETURNS event_trigger LANGUAGE plpgsql AS \
                 $$ BEGIN PERFORM pg_sleep(0.6); END $$; \
             CREATE EVENT TRIGGER wait_for_partition ON ddl_command_end WHEN TAG IN ('CREATE TABLE') \
                 EXECUTE FUNCTION wait_for_partition()",
        )
        .await
        .expect("the superuser may create event triggers");
    let replica = TestApp::setup()
        .database(app.database.clone())
        .flag("--database-statement-timeout=500ms")
        .start()
        .await;
    for table in ["usage_log", "usage_quarters", "usage_days"] {
        let created = holds(async || partitions(&client, table).await.len() == 9).await;
        assert!(created, "{table}: {:?}", partitions(&client, table).await);
    }
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn old_rows_without_a_partition_are_deleted_in_bounded_steps() {
    let app = TestApp::setup().without_jobs().start().await;
    let account = app.register().await;
    let old = now() - Days::new(30);
    let records = (0..5).map(|_| record(&account, KEY, PLAN, old));
    append(&app, &records.collect::<Vec<_>>()).await;
    append(&app, &[record(&account, KEY, PLAN, now())]).await;
    let client = app.database.connect().await;
    let step = "SELECT usage_delete_unpartitioned('usage_log', current_date - 1, 2)::bigint";
    let mut deleted = Vec::new();
    for _ in 0..4 {
        deleted.push(number(&client, step).await);
    }
    assert_eq!(deleted, [2, 2, 1, 0]);
    assert_eq!(number(&client, "SELECT count(*) FROM usage_log").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn days_beyond_the_retention_are_dropped_and_no_others() {
    let app = TestApp::setup().without_jobs().start().await;
    let account = app.register().await;
    let today = now();
    let ages = [0, 1, 2, 3, 4, 5, 6];
    let days = ages.map(|age| (today - Days::new(age)).date_naive());
    create_partitions(&app, days.into_iter()).await;
    for age in ages {
        append(&app, &[record(&account, KEY, PLAN, today - Days::new(age))]).await;
    }
    // Append a record from a day that has no partition, far in the past.
    append(&app, &[record(&account, KEY, PLAN, today - Days::new(30))]).await;
    let client = app.database.connect().await;
    client
        .batch_execute(
            "INSERT INTO usage_segments (segment_id, position, started_at, updated_at) VALUES \
             (gen_random_uuid(), 1, now() - interval '6 days', now() - interval '6 days'), \
             (gen_random_uuid(), 2, now() - interval '6 days', now()), \
             (gen_random_uuid(), 3, now() - interval '1 day', now() - interval '1 day')",
        )
        .await
        .expect("segments");
    client
        .batch_execute(
            "INSERT INTO usage_endpoints (tenant_id, key_id, endpoint, seen_on) \
             SELECT gen_random_uuid(), gen_random_uuid(), n::text, CURRENT_DATE - n FROM generate_series(4, 1500) n",
        )
        .await
        .expect("endpoints");
    let endpoints = "SELECT count(*) FROM usage_endpoints";
    let listed = number(&client, endpoints).await;
    let replica = TestApp::setup()
        .database(app.database.clone())
        .flag("--usage-retention=3")
        .flag("--usage-rollup-retention=5")
        .start()
        .await;
    let segments = "SELECT coalesce(sum(position), 0)::bigint FROM usage_segments";
    for _ in 0..200 {
        if number(&client, segments).await == 5 && number(&client, endpoints).await == listed - 1495
        {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_eq!(
        number(&client, segments).await,
        5,
        "cursors are kept as long as they are needed"
    );
    // After the retention period of the log has been extended, a copy of a segment whose cursor has been deleted is
    // still rejected.
    let days = |days: u64| std::time::Duration::from_secs(days * 24 * 60 * 60);
    let cursor_of = async |age, retention| {
        let mut tx = app.state.db.system().await.expect("PostgreSQL responds");
        let started_at = now() - Days::new(age);
        let opened = open_cursor(&mut tx, Uuid::now_v7(), 64, started_at, days(retention)).await;
        opened.expect("a query")
    };
    assert_eq!(cursor_of(7, 90).await, None);
    assert_eq!(cursor_of(5, 90).await, Some(64));
    assert_eq!(cursor_of(5, 3).await, None);
    // Endpoints from 4 and 5 days ago are kept, and so are the endpoints of the requests above.
    assert_eq!(number(&client, endpoints).await, listed - 1495);
    // Only whole days are dropped: a day that ended within the retention period is kept.
    assert_eq!(number(&client, "SELECT count(*) FROM usage_log").await, 4);
    let quarters = "SELECT count(DISTINCT start) FROM usage_quarters";
    assert_eq!(number(&client, quarters).await, 6);
    assert_eq!(
        number(&client, "SELECT count(DISTINCT start) FROM usage_days").await,
        6
    );
    replica.stop().await;
}
