//! Tests of long lists of keys: pages and searches return the right keys, however many keys exist, and use the indexes.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use quota_server::db;
use secrecy::SecretString;
use serde_json::{Value, json};
use tokio_postgres::Client;

use crate::support::{
    app::{Account, TestApp},
    postgres::TestDatabase,
};

/// A key that the test has inserted.
#[derive(Debug, Clone)]
struct Key {
    id: String,
    name: String,
    prefix: String,
    external_id: Option<String>,
    is_active: bool,
}

/// Creates an account with `count` keys. Their names have eight different beginnings, a random middle and, for one in
/// 1,000 keys, a rare ending. Half of the keys have an external ID.
async fn account_with_keys(app: &TestApp, count: usize) -> (Account, Vec<Key>) {
    let account = app.register().await;
    let plan = app.plan(&account, json!({"name": "Plan"})).await;
    let client = app.database.connect().await;
    let insert = format!(
        "INSERT INTO api_keys (tenant_id, id, plan_id, name, prefix, key_hash, external_id, is_active, last_used_at) \
         SELECT '{0}', overlay(overlay(md5('{0}' || i)::text placing '7' from 13) placing '8' from 17)::uuid, '{plan}', \
             (ARRAY['Mobile app', 'PARTNER portal', 'Batch_import', 'Staging 100%', 'Reporting', 'Élan', 'ios', 'Web'])\
                 [1 + i % 8] || ' ' || substr(md5(i::text), 1, 6) || CASE WHEN i % 1000 = 7 THEN ' Zebra' ELSE '' END, \
             'qk_' || substr(md5('p' || i), 1, 8), sha256((i || '{plan}')::bytea), \
             CASE WHEN i % 2 = 0 THEN 'customer-' || i END, i % 10 <> 0, \
             CASE WHEN i % 3 > 0 THEN now() - i * interval '1 s' END \
         FROM generate_series(1, {count}) AS i",
        account.tenant_id
    );
    client.batch_execute(&insert).await.expect("inserted");
    client
        .batch_execute("VACUUM ANALYZE api_keys")
        .await
        .expect("analyzed");
    let rows = client
        .query(
            "SELECT id::text, name, prefix, external_id, is_active FROM api_keys WHERE tenant_id = $1::text::uuid",
            &[&account.tenant_id],
        )
        .await
        .expect("rows");
    let keys = rows.iter().map(|row| Key {
        id: row.get(0),
        name: row.get(1),
        prefix: row.get(2),
        external_id: row.get(3),
        is_active: row.get(4),
    });
    (account, keys.collect())
}

/// Returns whether a search finds the key: by a part of its name in any case, or by the beginning of its prefix or
/// external ID.
fn is_found(key: &Key, search: &str) -> bool {
    let is_in_name = key.name.to_lowercase().contains(&search.to_lowercase());
    let begins = |text: &str| text.starts_with(search);
    is_in_name || begins(&key.prefix) || key.external_id.as_deref().is_some_and(begins)
}

async fn page(app: &TestApp, account: &Account, query: &str) -> Value {
    let path = format!("/admin/api-keys?{query}");
    let answer = app.get(&path).bearer(&account.access_token).send().await;
    assert_eq!(answer.status, 200, "{path}: {}", answer.body);
    answer.body
}

/// Reads at most `most` pages. Returns the IDs on these pages, and the total.
async fn pages(app: &TestApp, account: &Account, query: &str, most: usize) -> (Vec<String>, u64) {
    let (mut ids, mut cursor) = (Vec::new(), String::new());
    let mut total = None;
    for _ in 0..most {
        let body = page(app, account, &format!("{query}&limit=100{cursor}")).await;
        let items = body["items"].as_array().expect("items");
        ids.extend(
            items
                .iter()
                .map(|it| it["id"].as_str().expect("an ID").to_owned()),
        );
        let found = body["total"].as_u64().expect("a total");
        assert_eq!(*total.get_or_insert(found), found, "{query}");
        match body["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    (ids, total.expect("a page"))
}

fn encoded(search: &str) -> String {
    url::form_urlencoded::byte_serialize(search.as_bytes()).collect()
}

/// Compares searches with the keys that the test has inserted, in three sort orders.
async fn check_searches(app: &TestApp, account: &Account, keys: &[Key], searches: &[String]) {
    for search in searches {
        let expected = |only_active: bool| {
            let found = keys
                .iter()
                .filter(|key| is_found(key, search) && (!only_active || key.is_active));
            found.map(|key| key.id.clone()).collect::<BTreeSet<_>>()
        };
        for (filter, only_active) in [("", false), ("&is_active=true", true)] {
            let expected = expected(only_active);
            for sort in ["-created_at", "name", "-last_used_at"] {
                let query = format!("search={}&sort={sort}{filter}", encoded(search));
                let (ids, total) = pages(app, account, &query, 3).await;
                let unique = ids.iter().cloned().collect::<BTreeSet<_>>();
                assert_eq!(unique.len(), ids.len(), "{query} repeats a key");
                assert_eq!(ids.len(), expected.len().min(300), "{query}");
                assert!(unique.is_subset(&expected), "{query}");
                assert_eq!(total, (expected.len() as u64).min(10_000), "{query}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn searches_of_a_long_list_find_exactly_the_matching_keys() {
    let app = TestApp::setup().without_jobs().start().await;
    let (account, keys) = account_with_keys(&app, 12_000).await;
    // Another tenant has keys with the same names.
    let (other, _) = account_with_keys(&app, 100).await;
    let some = &keys[17];
    let searches = [
        "zebra",
        "PORTAL",
        "l",
        "Élan",
        "100%",
        "h_i",
        "no such key",
        "customer-1199",
        "Customer-1",
        "qk_",
        "QK_",
        &some.prefix,
        &some.name,
        &format!("{}x", some.prefix),
        // This string occurs in names and in prefixes.
        &some.prefix[3..6],
    ]
    .map(str::to_owned);
    check_searches(&app, &account, &keys, &searches).await;

    // The tenant has more keys than the server counts.
    let (ids, total) = pages(&app, &account, "sort=name", 2).await;
    assert_eq!((ids.len(), total), (200, 10_000));
    let (ids, total) = pages(&app, &account, "is_active=false", 20).await;
    assert_eq!((ids.len(), total), (1200, 1200));
    let (ids, total) = pages(&app, &other, "search=zebra", 2).await;
    assert_eq!((ids.len(), total), (1, 1));

    // Without `pg_trgm`, searches are slower but find the same keys.
    let client = app.database.connect().await;
    client
        .batch_execute("DROP EXTENSION pg_trgm CASCADE")
        .await
        .expect("dropped");
    let few = ["zebra", "PORTAL", &some.prefix].map(str::to_owned);
    check_searches(&app, &account, &keys, &few).await;
}

/// Returns PostgreSQL's plan for the query that finds the keys of a search, as the server runs it.
async fn plan(client: &Client, tenant: &str, search: &str) -> String {
    client
        .batch_execute("BEGIN; SET LOCAL ROLE quota_system")
        .await
        .expect("begun");
    let explain = format!(
        "EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, SUMMARY OFF) SELECT id FROM api_keys WHERE tenant_id = '{tenant}' \
         AND (name ILIKE '%{search}%' OR prefix LIKE '{search}%' OR external_id LIKE '{search}%') LIMIT 10001"
    );
    let rows = client.query(&explain, &[]).await.expect("a plan");
    client.batch_execute("ROLLBACK").await.expect("ended");
    let lines = rows.iter().map(|row| row.get::<_, String>(0));
    lines.collect::<Vec<_>>().join("\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn searches_use_the_indexes() {
    let app = TestApp::setup().without_jobs().start().await;
    let (account, _) = account_with_keys(&app, 5000).await;
    let client = app.database.connect().await;
    // Otherwise, PostgreSQL would scan the whole table, because the table is small.
    client
        .batch_execute("SET enable_seqscan = off")
        .await
        .expect("set");
    let found = plan(&client, &account.tenant_id, "zebra").await;
    for index in [
        "api_keys_name_trgm_idx",
        "api_keys_prefix_idx",
        "api_keys_external_id_idx",
    ] {
        assert!(found.contains(index), "{index} is not in\n{found}");
    }
}

/// Covers servers where `pg_trgm` is not installed or not allowed.
#[tokio::test(flavor = "multi_thread")]
async fn migrations_succeed_without_the_extension() {
    let database = TestDatabase::create_empty().await;
    let client = database.connect().await;
    client
        .batch_execute(
            "CREATE FUNCTION forbid() RETURNS event_trigger LANGUAGE plpgsql AS \
                 $$ BEGIN RAISE EXCEPTION 'extensions are not allowed here'; END $$;
             CREATE EVENT TRIGGER forbid_extensions ON ddl_command_start WHEN TAG IN ('CREATE EXTENSION') \
                 EXECUTE FUNCTION forbid()",
        )
        .await
        .expect("forbidden");
    let url = SecretString::from(database.url());
    assert_eq!(db::migrate(&url).await.expect("migrated"), db::versions());
    let has_extension = "SELECT count(*) FROM pg_extension WHERE extname = 'pg_trgm'";
    let row = client.query_one(has_extension, &[]).await.expect("a row");
    assert_eq!(row.get::<_, i64>(0), 0);

    let database = Arc::new(database);
    let app = TestApp::setup().database(database.clone()).start().await;
    let (account, keys) = account_with_keys(&app, 200).await;
    let searches = ["portal", "qk_"].map(str::to_owned);
    check_searches(&app, &account, &keys, &searches).await;
    app.stop().await;
    db::revert_all(&url).await.expect("reverted");
}

/// Measures lists and searches with many keys. `cargo xtask bench keys` runs this measurement, which does not assert
/// times, because they depend on the machine.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement that takes a minute"]
async fn three_hundred_thousand_keys() {
    const ROUNDS: usize = 50;
    #[expect(clippy::disallowed_methods, reason = "tests have no `Config`")]
    let count = std::env::var("QUOTA_KEYS").ok();
    let count = count.map_or(300_000, |it| it.parse().expect("a number of keys"));
    let app = TestApp::setup().without_jobs().start().await;
    let (account, keys) = account_with_keys(&app, count).await;
    let some = &keys[keys.len() / 2];
    println!("{count} keys, {ROUNDS} requests each; milliseconds over HTTP\n");
    println!(
        "{:<44} {:>8} {:>7} {:>7} {:>7}",
        "query", "total", "p50", "p99", "max"
    );
    let name = encoded(&some.name[some.name.len() - 4..]);
    for query in [
        "sort=-created_at".to_owned(),
        "sort=name".into(),
        "sort=-last_used_at".into(),
        "is_active=false".into(),
        "external_id=customer-4242".into(),
        "search=zebra".into(),
        "search=zebra&sort=name".into(),
        "search=portal".into(),
        "search=portal&sort=name".into(),
        "search=portal&sort=-last_used_at".into(),
        format!("search={name}"),
        format!("search={}", some.prefix),
        "search=customer-4242".into(),
        "search=customer".into(),
        "search=no+such+key".into(),
        "search=a".into(),
        "search=zq".into(),
    ] {
        let (mut times, mut total) = (Vec::new(), 0);
        for _ in 0..ROUNDS {
            let began = Instant::now();
            let body = page(&app, &account, &query).await;
            times.push(began.elapsed());
            total = body["total"].as_u64().expect("a total");
        }
        times.sort();
        let ms = |at: usize| times[at.min(ROUNDS - 1)].as_secs_f64() * 1000.0;
        println!(
            "{query:<44} {total:>8} {:>7.1} {:>7.1} {:>7.1}",
            ms(ROUNDS / 2),
            ms(ROUNDS * 99 / 100),
            ms(ROUNDS - 1)
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let client = app.database.connect().await;
    for search in ["zebra", "portal"] {
        println!(
            "\n{search}:\n{}",
            plan(&client, &account.tenant_id, search).await
        );
    }
}
