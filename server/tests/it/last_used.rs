//! Tests how the last use of keys and service tokens is recorded. The last use of a key is stored with its usage. The
//! last use of a token and, without metering, the last use of a key are kept in memory and stored in batches.

use quota_common::{ApiKeyId, ServiceTokenId};
use quota_server::clock::UnixNanos;
use serde_json::{Value, json};
use tokio_postgres::{Client, Transaction};
use uuid::Uuid;

use crate::support::{
    app::{Account, TestApp},
    locks::wait_for_lock,
};

/// Enough keys for more than two batches.
const KEYS: u128 = 2_500;
const BATCH: usize = 1_000;
const SECOND: u64 = 1_785_738_360;

fn at(secs: u64) -> UnixNanos {
    UnixNanos::from_secs(SECOND + secs)
}

/// Inserts `count` keys in descending order of their IDs. Returns the IDs in ascending order.
async fn insert_keys(
    app: &TestApp,
    account: &Account,
    database: &Client,
    count: u128,
) -> Vec<Uuid> {
    let plan = app.plan(account, json!({})).await;
    let insert = format!(
        "INSERT INTO api_keys (tenant_id, id, plan_id, name, prefix, key_hash) \
         SELECT '{}', lpad(to_hex(n), 32, '0')::uuid, '{plan}', 'Key', 'qk_00000000', \
         sha256(n::text::bytea) FROM generate_series({count}, 1, -1) AS n",
        account.tenant_id
    );
    database.batch_execute(&insert).await.unwrap();
    (1..=count).map(Uuid::from_u128).collect()
}

/// Locks a key until the end of the transaction.
async fn lock(transaction: &Transaction<'_>, id: Uuid) {
    let lock = format!("SELECT FROM api_keys WHERE id = '{id}' FOR UPDATE");
    transaction.batch_execute(&lock).await.unwrap();
}

/// Returns the time at which each key was last used, in seconds after [`SECOND`], in the order of the keys' IDs.
async fn written(database: &Client) -> Vec<Option<u64>> {
    let sql = "SELECT extract(epoch FROM last_used_at)::bigint FROM api_keys ORDER BY id";
    let rows = database.query(sql, &[]).await.unwrap();
    let secs = |row: &tokio_postgres::Row| {
        let secs = row.get::<_, Option<i64>>(0)?;
        Some(u64::try_from(secs).unwrap() - SECOND)
    };
    rows.iter().map(secs).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn batch_that_fails_is_written_later_and_those_before_it_are_written_now() {
    let app = TestApp::setup()
        .flag("--database-lock-timeout=200ms")
        .without_jobs()
        .start()
        .await;
    let account = app.register().await;
    let mut database = app.database.connect().await;
    let ids = insert_keys(&app, &account, &database, KEYS).await;
    for id in &ids {
        app.state.last_used.key(ApiKeyId(*id), at(1));
    }
    // A key of the second batch is locked.
    let locked = database.transaction().await.unwrap();
    lock(&locked, ids[1_500]).await;
    assert!(app.state.last_used.flush(&app.state.db).await.is_err());
    // In the meantime, one key is used again. Two keys are used at an earlier time, as if by a replica whose clock is
    // behind.
    app.state.last_used.key(ApiKeyId(ids[1_500]), at(3));
    app.state.last_used.key(ApiKeyId(ids[1_501]), at(0));
    app.state.last_used.key(ApiKeyId(ids[0]), at(0));
    locked.rollback().await.unwrap();

    let now = written(&database).await;
    assert!(now[..BATCH].iter().all(|it| *it == Some(1)));
    assert!(now[BATCH..].iter().all(Option::is_none));

    app.state.last_used.flush(&app.state.db).await.unwrap();
    let now = written(&database).await;
    let mut expected = vec![Some(1); ids.len()];
    expected[1_500] = Some(3);
    assert!(now == expected, "a time was lost or moved back");
    // There is nothing left to write.
    let reset = "UPDATE api_keys SET last_used_at = NULL";
    database.batch_execute(reset).await.unwrap();
    app.state.last_used.flush(&app.state.db).await.unwrap();
    assert!(written(&database).await.iter().all(Option::is_none));
}

/// PostgreSQL reads a table of this size in the order in which its rows were inserted, which is not the order of the
/// IDs.
#[tokio::test(flavor = "multi_thread")]
async fn keys_are_locked_in_the_order_of_their_ids() {
    let app = TestApp::setup()
        .flag("--database-lock-timeout=60s")
        .flag("--database-statement-timeout=60s")
        .without_jobs()
        .start()
        .await;
    let account = app.register().await;
    let mut database = app.database.connect().await;
    let ids = insert_keys(&app, &account, &database, 300).await;
    database.batch_execute("ANALYZE api_keys").await.unwrap();
    let observer = app.database.connect().await;
    for id in &ids[..10] {
        app.state.last_used.key(ApiKeyId(*id), at(1));
    }
    let locked = database.transaction().await.unwrap();
    lock(&locked, ids[5]).await;
    let (last_used, db) = (app.state.last_used.clone(), app.state.db.clone());
    let flush = tokio::spawn(async move { last_used.flush(&db).await });
    wait_for_lock(&observer, "locktype = 'tuple' AND granted").await;
    let free = "SELECT id::text FROM api_keys ORDER BY id FOR NO KEY UPDATE SKIP LOCKED";
    let free = observer.query(free, &[]).await.unwrap();
    let free: Vec<Uuid> = free
        .iter()
        .map(|row| row.get::<_, String>(0).parse().unwrap())
        .collect();
    assert!(free == ids[6..], "{} keys are free", free.len());
    locked.rollback().await.unwrap();
    flush.await.unwrap().unwrap();
    let now = written(&database).await;
    assert!(now[..10].iter().all(|it| *it == Some(1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn later_use_wins_also_when_two_replicas_write_at_once() {
    let one = TestApp::setup().without_jobs().start().await;
    let other = TestApp::setup()
        .database(one.database.clone())
        .without_jobs()
        .start()
        .await;
    let account = one.register().await;
    let database = one.database.connect().await;
    let ids = insert_keys(&one, &account, &database, KEYS).await;
    for (n, id) in ids.iter().enumerate() {
        let (early, late) = if n % 2 == 0 {
            (&one, &other)
        } else {
            (&other, &one)
        };
        early.state.last_used.key(ApiKeyId(*id), at(5));
        late.state.last_used.key(ApiKeyId(*id), at(9));
        late.state.last_used.key(ApiKeyId(*id), at(7));
    }
    // A key and a token that do not exist do not cause an error.
    one.state.last_used.key(ApiKeyId(Uuid::max()), at(1));
    one.state
        .last_used
        .service_token(ServiceTokenId(Uuid::max()), at(1));
    let (first, second) = tokio::join!(
        one.state.last_used.flush(&one.state.db),
        other.state.last_used.flush(&other.state.db),
    );
    first.unwrap();
    second.unwrap();
    assert!(written(&database).await.iter().all(|it| *it == Some(9)));
}

#[tokio::test(flavor = "multi_thread")]
async fn clean_stop_writes_everything() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({})).await;
    let mut keys = Vec::new();
    for _ in 0..20 {
        keys.push(app.key(&account, &plan).await);
    }
    let token = app.service_token(&account).await;
    let list = app.act(&account, "GET", "/admin/api-keys", Value::Null);
    assert_eq!(list.await.body["items"][0]["last_used_at"], Value::Null);
    let database = app.database.clone();
    for key in &keys {
        assert_eq!(app.echo(&key.text).await.status, 200);
    }
    let check = app.post("/v1/check", json!({"key": keys[0].text}));
    assert_eq!(check.bearer(&token).send().await.status, 200);
    app.stop().await;
    let client = database.connect().await;
    for (table, used) in [("api_keys", 20), ("service_tokens", 1)] {
        let sql = format!("SELECT count(last_used_at) FROM {table}");
        let count = client.query_one(&sql, &[]).await.unwrap();
        assert_eq!(count.get::<_, i64>(0), used, "{table}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn last_use_of_a_key_is_written_with_its_usage_and_never_moves_back() {
    let app = TestApp::setup().without_jobs().start().await;
    let account = app.register().await;
    let plan = app
        .plan(&account, json!({"default_rpm": 1, "burst": 1}))
        .await;
    let (used, unused) = (
        app.key(&account, &plan).await,
        app.key(&account, &plan).await,
    );
    assert_eq!(app.echo(&used.text).await.status, 200);
    // With metering, a flush does not write the last use of keys, which is written only with their usage.
    app.state.last_used.flush(&app.state.db).await.unwrap();
    let database = app.database.connect().await;
    let times = async || {
        let sql = "SELECT id::text, extract(epoch FROM last_used_at)::float8 FROM api_keys";
        let rows = database.query(sql, &[]).await.unwrap();
        let times = rows.iter().map(|row| (row.get(0), row.get(1)));
        times.collect::<std::collections::BTreeMap<String, Option<f64>>>()
    };
    assert_eq!(times().await[&used.id], None);
    app.ship_usage().await;
    let sql = "SELECT extract(epoch FROM now())::float8";
    let now: f64 = database.query_one(sql, &[]).await.unwrap().get(0);
    let first = times().await[&used.id].expect("the key was used");
    assert!((now - 60.0..=now + 1.0).contains(&first), "{first} {now}");
    assert_eq!(times().await[&unused.id], None);
    // A denied request also counts as a use.
    tokio::time::sleep(std::time::Duration::from_millis(1_200)).await;
    assert_eq!(app.echo(&used.text).await.status, 429);
    app.ship_usage().await;
    let second = times().await[&used.id].expect("the key was used");
    assert!(second > first + 1.0, "{first} {second}");
    let ahead = "UPDATE api_keys SET last_used_at = now() + interval '1 hour' WHERE last_used_at IS NOT NULL";
    database.batch_execute(ahead).await.unwrap();
    assert_eq!(app.echo(&used.text).await.status, 429);
    app.ship_usage().await;
    let third = times().await[&used.id].expect("the key was used");
    assert!(third > now + 3_000.0, "{third}");
}
