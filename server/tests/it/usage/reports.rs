//! Tests of `/admin/usage`, `/admin/stats`, the current limits of a key, and the `quota usage` commands for operators.

use chrono::{DateTime, TimeDelta, Utc};
use quota_server::repo::usage_batch::UsageRecord;
use quota_testkit::redis::RedisServer;
use serde_json::{Value, json};
use uuid::Uuid;

use super::{append, now, record, rejected};
use crate::support::app::{Account, Answer, Key, TestApp};

struct World {
    app: TestApp,
    account: Account,
    plan: String,
    key: Key,
}

async fn world(plan: Value) -> World {
    let app = TestApp::setup().without_jobs().start().await;
    let account = app.register().await;
    let plan = app.plan(&account, plan).await;
    let key = app.key(&account, &plan).await;
    World {
        app,
        account,
        plan,
        key,
    }
}

impl World {
    async fn get(&self, path: &str) -> Answer {
        self.app.act(&self.account, "GET", path, Value::Null).await
    }

    async fn csv(&self, path: &str) -> Answer {
        let call = self.app.get(path).bearer(&self.account.access_token);
        call.header("Accept", "text/csv").send().await
    }

    fn record(&self, at: DateTime<Utc>) -> UsageRecord {
        record(&self.account, &self.key.id, &self.plan, at)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_ranges_are_422_and_name_the_field() {
    let it = world(json!({})).await;
    for (query, field) in [
        ("from=2026-01-02T00:00:00Z&to=2026-01-01T00:00:00Z", "from"),
        ("from=yesterday", "from"),
        ("to=9", "to"),
        (
            "from=2026-01-01T00:00:00Z&to=2026-03-01T00:00:00Z&bucket=hour",
            "to",
        ),
        (
            "from=2020-01-01T00:00:00Z&to=2026-03-01T00:00:00Z&bucket=day",
            "to",
        ),
        ("from=1970-01-01T00:00:00Z&to=9999-12-31T00:00:00Z", "to"),
        ("bucket=week", "bucket"),
        ("tz=Europe/Atlantis", "tz"),
        ("tz=%00", "tz"),
        ("tz=+02:00", "tz"),
        ("key_id=7", "key_id"),
        ("plan_id=7", "plan_id"),
        ("group_by=color", "group_by"),
        ("endpoint=%01", "endpoint"),
        ("endpoint=%00", "endpoint"),
    ] {
        let answer = it.get(&format!("/admin/usage?{query}")).await;
        assert_eq!(answer.status, 422, "{query}: {}", answer.text);
        assert_eq!(
            answer.body["errors"][0]["field"], field,
            "{query}: {}",
            answer.text
        );
    }
    let long = "x".repeat(129);
    let answer = it.get(&format!("/admin/usage?endpoint={long}")).await;
    assert_eq!(answer.body["errors"][0]["field"], "endpoint");
    let answer = it.get("/admin/usage?bucket=week").await;
    assert_eq!(
        answer.body["errors"][0]["message"],
        "must be one of hour, day"
    );
    assert_eq!(it.get("/admin/usage").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn defaults_are_the_last_24_hours_in_the_tenants_zone() {
    let it = world(json!({})).await;
    let zone = json!({"time_zone": "Asia/Kolkata"});
    assert_eq!(
        it.app
            .act(&it.account, "PATCH", "/auth/me", zone)
            .await
            .status,
        200
    );
    append(&it.app, &[it.record(now() - TimeDelta::hours(1))]).await;
    let usage = it.get("/admin/usage").await.body;
    assert_eq!(
        (&usage["bucket"], &usage["time_zone"]),
        (&json!("hour"), &json!("Asia/Kolkata"))
    );
    assert_eq!(
        (&usage["group_by"], &usage["groups"]),
        (&Value::Null, &json!([]))
    );
    let buckets = usage["buckets"].as_array().expect("buckets");
    assert!((24..=26).contains(&buckets.len()), "{}", buckets.len());
    // India's time is 5.5 hours ahead of UTC. All buckets except the first start at a full hour in India.
    for it in &buckets[1..] {
        assert!(
            it["start"]
                .as_str()
                .expect("a time")
                .ends_with(":30:00.000Z"),
            "{it}"
        );
    }
    assert_eq!(usage["total"]["allowed"], 1);
    let weeks = "/admin/usage?from=2026-10-01T00:00:00Z&to=2026-10-20T00:00:00Z";
    assert_eq!(it.get(weeks).await.body["bucket"], "day");
}

#[tokio::test(flavor = "multi_thread")]
async fn csv_runs_no_formula() {
    let it = world(json!({})).await;
    let endpoints = [
        "=cmd|' /C calc'!A0",
        "+1+1",
        "-1",
        "@SUM(A1:A9)",
        "GET /a,b",
        "say \"hi\"",
        "GET /orders",
        "＝1+1",
    ];
    let now = now() - TimeDelta::hours(1);
    let records = endpoints.map(|endpoint| UsageRecord {
        endpoint: endpoint.into(),
        ..it.record(now)
    });
    append(&it.app, &records).await;
    let answer = it
        .csv("/admin/usage?group_by=endpoint&bucket=day&tz=UTC")
        .await;
    assert_eq!(answer.status, 200);
    assert_eq!(
        answer.header("content-type"),
        Some("text/csv; charset=utf-8")
    );
    assert_eq!(
        answer.header("content-disposition"),
        Some("attachment; filename=\"usage.csv\"")
    );
    let mut reader = csv::Reader::from_reader(answer.text.as_bytes());
    let header = reader.headers().expect("a header").clone();
    let column = |name: &str| header.iter().position(|it| it == name).expect("a column");
    let (endpoint, allowed) = (column("endpoint"), column("allowed"));
    let rows = reader
        .records()
        .collect::<Result<Vec<_>, _>>()
        .expect("valid CSV");
    let mut seen = rows
        .iter()
        .map(|row| row[endpoint].to_owned())
        .collect::<Vec<_>>();
    seen.sort();
    let mut expected = vec![
        "'=cmd|' /C calc'!A0",
        "'+1+1",
        "'-1",
        "'@SUM(A1:A9)",
        "GET /a,b",
        "say \"hi\"",
        "GET /orders",
        "'＝1+1",
    ];
    expected.sort_unstable();
    assert_eq!(seen, expected);
    assert!(rows.iter().all(|row| &row[allowed] == "1"));

    // Tenants choose the names of keys, so a name can be a spreadsheet formula.
    let patch = json!({"name": "=1+1"});
    let path = format!("/admin/api-keys/{}", it.key.id);
    assert_eq!(
        it.app.act(&it.account, "PATCH", &path, patch).await.status,
        200
    );
    let answer = it.csv("/admin/usage?group_by=key&bucket=day").await;
    assert!(answer.text.contains(",'=1+1,"), "{}", answer.text);

    for (accept, content_type) in [
        ("application/json, text/csv", "application/json"),
        ("text/csv;q=0.5, application/json;q=0.9", "application/json"),
        (
            "application/json;q=0.5, text/csv",
            "text/csv; charset=utf-8",
        ),
    ] {
        let get = it.app.get("/admin/usage").bearer(&it.account.access_token);
        let answer = get.header("Accept", accept).send().await;
        assert_eq!(
            answer.header("content-type"),
            Some(content_type),
            "{accept}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_tenants_usage_is_empty_for_every_query() {
    let it = world(json!({})).await;
    append(&it.app, &[it.record(now() - TimeDelta::hours(1))]).await;
    let other = it.app.register().await;
    let never = Uuid::now_v7().to_string();
    for (name, id) in [("key_id", &it.key.id), ("plan_id", &it.plan)] {
        for group in ["", "&group_by=key", "&group_by=plan", "&group_by=endpoint"] {
            let get = async |account: &Account, id: &str| {
                let path = format!(
                    "/admin/usage?{name}={id}{group}&from=2026-01-01T00:00:00Z&to=2027-01-01T00:00:00Z&bucket=day"
                );
                let mut body = it.app.act(account, "GET", &path, Value::Null).await.body;
                body["complete_until"] = Value::Null;
                body
            };
            let theirs = get(&other, id).await;
            assert_eq!(theirs["total"]["allowed"], 0);
            assert_eq!(theirs, get(&other, &never).await);
            assert_eq!(get(&it.account, id).await["total"]["allowed"], 1);
        }
    }
    for path in ["limits", "burn-down"] {
        let path = format!("/admin/api-keys/{}/{path}", it.key.id);
        assert_eq!(
            it.app.act(&other, "GET", &path, Value::Null).await.status,
            404
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stats_count_today_and_compare_with_yesterday() {
    let it = world(json!({"daily_quota": 100})).await;
    it.app.key(&it.account, &it.plan).await;
    let now = now();
    let midnight = now
        .date_naive()
        .and_hms_opt(0, 0, 0)
        .expect("midnight")
        .and_utc();
    let yesterday = midnight - TimeDelta::days(1);
    let mut records = vec![
        it.record(midnight),
        it.record(now),
        rejected(it.record(midnight), "rpm"),
    ];
    // Yesterday's requests: at the start of the day, and one second before midnight, a time of day that has not been
    // reached today.
    records.extend((0..5).map(|_| it.record(yesterday)));
    records.push(rejected(it.record(yesterday), "rpm"));
    records.extend((0..50).map(|_| it.record(midnight - TimeDelta::seconds(1))));
    append(&it.app, &records).await;
    let stats = it.get("/admin/stats").await.body;
    assert_eq!(
        (
            &stats["total_keys"],
            &stats["active_keys"],
            &stats["unused_keys"]
        ),
        (&json!(2), &json!(2), &json!(1))
    );
    assert_eq!(stats["total_plans"], 1);
    assert_eq!(
        (&stats["requests_today"], &stats["rejected_today"]),
        (&json!(3), &json!(1))
    );
    let minutes = (now - midnight).num_minutes();
    if (15..23 * 60 + 40).contains(&minutes) {
        assert_eq!(
            (&stats["requests_yesterday"], &stats["rejected_yesterday"]),
            (&json!(6), &json!(1))
        );
    }
    assert_eq!(stats["time_zone"], "UTC");
    assert_eq!(
        stats["today"]
            .as_str()
            .expect("a time")
            .parse::<DateTime<Utc>>()
            .expect("a time"),
        midnight
    );
    assert_eq!(stats["closest_to_limit"], Value::Null);
}

#[tokio::test(flavor = "multi_thread")]
async fn stats_show_what_needs_attention() {
    let it = world(json!({"daily_quota": 100, "default_rpm": 6000})).await;
    let client = it.app.database.connect().await;
    let mut keys = Vec::new();
    for _ in 0..3 {
        keys.push(it.app.key(&it.account, &it.plan).await.id);
    }
    for sql in [
        format!(
            "UPDATE api_keys SET expires_at = now() + interval '3 days' WHERE id = '{}'",
            keys[0]
        ),
        format!(
            "UPDATE api_keys SET previous_key_hash = sha256('x'), previous_expires_at = now() + interval '1 hour' \
            WHERE id = '{}'",
            keys[1]
        ),
        format!(
            "UPDATE api_keys SET last_used_at = now() - interval '31 days' WHERE id = '{}'",
            keys[2]
        ),
    ] {
        client.batch_execute(&sql).await.expect("an update");
    }
    for _ in 0..85 {
        assert_eq!(it.app.echo(&it.key.text).await.status, 200);
    }
    it.app.ship_usage().await;
    let stats = it.get("/admin/stats").await.body;
    let kinds = stats["attention"].as_array().expect("a list").iter();
    let kinds = kinds.map(|it| {
        (
            it["kind"].as_str().expect("a kind"),
            it["key_id"].as_str().expect("an ID"),
        )
    });
    let expected = [
        ("quota", it.key.id.as_str()),
        ("expiring", &keys[0]),
        ("grace_ending", &keys[1]),
        ("idle", &keys[2]),
    ];
    assert_eq!(kinds.collect::<Vec<_>>(), expected);
    let closest = &stats["closest_to_limit"];
    assert_eq!(
        (&closest["key_id"], &closest["limit"]),
        (&json!(it.key.id), &json!(100))
    );
    assert_eq!(closest["used"], 85);

    // Expired keys need no attention, and their quotas can no longer be used.
    let expire = "UPDATE api_keys SET expires_at = now() - interval '1 hour'";
    client.batch_execute(expire).await.expect("an update");
    let stats = it.get("/admin/stats").await.body;
    assert_eq!(stats["closest_to_limit"], Value::Null);
    assert_eq!(stats["attention"], json!([]));
}

/// Replicas hold tokens for later requests. These tokens have not been used yet.
#[tokio::test(flavor = "multi_thread")]
async fn stats_do_not_count_tokens_that_replicas_hold() {
    let it = world(json!({"daily_quota": 10, "monthly_quota": 100_000, "default_rpm": 6000})).await;
    for _ in 0..9 {
        assert_eq!(it.app.echo(&it.key.text).await.status, 200);
    }
    let client = it.app.database.connect().await;
    let taken = "SELECT sum(used)::bigint FROM quota_usage";
    let taken = client.query_one(taken, &[]).await.expect("a sum");
    assert!(taken.get::<_, i64>(0) > 18, "the replica holds tokens");
    it.app.ship_usage().await;
    let stats = it.get("/admin/stats").await.body;
    let closest = &stats["closest_to_limit"];
    assert_eq!(
        (&closest["policy"], &closest["used"], &closest["limit"]),
        (&json!("daily"), &json!(9), &json!(10))
    );
    let attention = stats["attention"].as_array().expect("a list");
    let used: Vec<_> = attention.iter().map(|it| &it["used"]).collect();
    assert_eq!(used, [&json!(9)]);
}

/// A replica holds the last token of each small quota, so the ledger counts these quotas as used up.
#[tokio::test(flavor = "multi_thread")]
async fn stats_find_the_quota_closest_to_its_limit_among_many_small_ones() {
    let it = world(json!({"daily_quota": 1000, "default_rpm": 60_000_000})).await;
    let small = json!({"daily_quota": 4, "default_rpm": 6000});
    let small = it.app.plan(&it.account, small).await;
    let token = it.app.service_token(&it.account).await;
    let spend = async |key: &str, cost: u64| {
        let check = json!({"key": key, "cost": cost});
        let answer = it.app.post("/v1/check", check).bearer(&token).send().await;
        assert_eq!(answer.body["allowed"], true, "{}", answer.text);
    };
    for _ in 0..20 {
        let key = it.app.key(&it.account, &small).await.text;
        for _ in 0..3 {
            spend(&key, 1).await;
        }
    }
    spend(&it.key.text, 850).await;
    let client = it.app.database.connect().await;
    let full = "SELECT count(*) FROM quota_usage WHERE used = 4";
    let full: i64 = client.query_one(full, &[]).await.expect("a count").get(0);
    assert_eq!(full, 20);
    it.app.ship_usage().await;
    let stats = it.get("/admin/stats").await.body;
    assert_eq!(stats["closest_to_limit"]["used"], 850);
    let attention = stats["attention"].as_array().expect("a list");
    let used: Vec<_> = attention.iter().map(|it| &it["used"]).collect();
    assert_eq!(used, [&json!(850)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_show_the_state_of_a_key_and_consume_nothing() {
    let it =
        world(json!({"daily_quota": 50, "monthly_quota": 500, "default_rpm": 60, "burst": 10}))
            .await;
    let path = format!("/admin/api-keys/{}/limits", it.key.id);
    let states = async || {
        let body = it.get(&path).await.body;
        assert_eq!((&body["rpm"], &body["burst"]), (&json!(60), &json!(10)));
        let limits = body["limits"].as_array().expect("limits").clone();
        limits
            .iter()
            .map(|it| {
                (
                    it["policy"].as_str().expect("a name").to_owned(),
                    it["remaining"].as_u64().expect("a number"),
                )
            })
            .collect::<Vec<_>>()
    };
    let of = |policy: &str, remaining: u64| (policy.to_owned(), remaining);
    assert_eq!(
        states().await,
        [of("rpm", 10), of("daily", 50), of("monthly", 500)]
    );
    for _ in 0..4 {
        assert_eq!(it.app.echo(&it.key.text).await.status, 200);
    }
    for _ in 0..20 {
        let now = states().await;
        assert!(now[0].1 >= 6, "{now:?}");
        assert_eq!(now[1..], [of("daily", 46), of("monthly", 496)]);
    }
    // The response to a request also contains the limits.
    let answer = it.app.echo(&it.key.text).await;
    assert!(
        answer.header("ratelimit").expect("a field").contains("r="),
        "{:?}",
        answer.headers
    );
    assert_eq!(states().await[1], of("daily", 45));

    // The records of other replicas count, too.
    let records = (0..30).map(|_| it.record(now())).collect::<Vec<_>>();
    append(&it.app, &records).await;
    append(&it.app, &[rejected(it.record(now()), "rpm")]).await;
    assert_eq!(states().await[1..], [of("daily", 20), of("monthly", 470)]);
    let never = format!("/admin/api-keys/{}/limits", Uuid::now_v7());
    assert_eq!(it.get(&never).await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_burn_down_shows_the_remaining_quota_and_the_projection() {
    let it = world(json!({"monthly_quota": 10_000})).await;
    let path = format!("/admin/api-keys/{}/burn-down", it.key.id);
    let daily = it.get(&format!("{path}?policy=daily")).await;
    assert_eq!(
        (daily.status, &daily.body["errors"][0]["field"]),
        (422, &json!("policy"))
    );
    let unknown = it.get(&format!("{path}?policy=weekly")).await;
    assert_eq!(
        unknown.body["errors"][0]["message"],
        "must be one of daily, monthly"
    );

    let now = now();
    let empty = it.get(&path).await.body;
    assert_eq!(
        (&empty["used"], &empty["remaining"], &empty["used_up_at"]),
        (&json!(0), &json!(10_000), &Value::Null)
    );
    assert_eq!(
        (&empty["projected_remaining"], &empty["policy"]),
        (&json!(10_000), &json!("monthly"))
    );
    let start: DateTime<Utc> = empty["starts_at"]
        .as_str()
        .expect("a time")
        .parse()
        .expect("a time");
    let end: DateTime<Utc> = empty["resets_at"]
        .as_str()
        .expect("a time")
        .parse()
        .expect("a time");
    assert!(start <= now && now < end && (28..=31).contains(&(end - start).num_days()));

    // Add an allowed request with a cost of 2 every 15 minutes since the start of the month. Denied requests, and those
    // of the previous month, do not count.
    let mut records = Vec::new();
    let mut at = start;
    while at < now {
        records.push(UsageRecord {
            cost: 2,
            ..it.record(at)
        });
        records.push(rejected(it.record(at), "rpm"));
        at += TimeDelta::minutes(15);
    }
    let spent = u64::try_from(records.len()).expect("a count");
    records.push(UsageRecord {
        cost: 500,
        ..it.record(start - TimeDelta::seconds(1))
    });
    append(&it.app, &records).await;
    let body = it.get(&path).await.body;
    assert_eq!(
        (&body["used"], &body["remaining"]),
        (&json!(spent), &json!(10_000 - spent))
    );
    let points = body["points"].as_array().expect("points");
    assert!(points.len() <= 194, "{}", points.len());
    assert_eq!(
        (&points[0]["remaining"], &points[0]["ideal_remaining"]),
        (&json!(10_000), &json!(10_000))
    );
    let last = points.last().expect("a point");
    assert_eq!(last["remaining"], 10_000 - spent);
    // Compare each point with the records up to its time.
    for point in points {
        let at: DateTime<Utc> = point["at"]
            .as_str()
            .expect("a time")
            .parse()
            .expect("a time");
        let before = records
            .iter()
            .filter(|it| !it.was_rejected && start <= it.at && it.at < at);
        let used: i64 = before.map(|it| it.cost).sum();
        assert_eq!(
            point["remaining"].as_i64().expect("a number"),
            10_000 - used,
            "{point}"
        );
    }
    if now - start > TimeDelta::days(1) {
        let pace = body["pace_per_hour"].as_f64().expect("a number");
        assert!((7.0..9.0).contains(&pace), "8 an hour: {pace}");
        assert_eq!(
            body["used_up_at"],
            Value::Null,
            "8 an hour are at most 5,952 a month"
        );
    }
    // Use up the quota.
    append(
        &it.app,
        &[UsageRecord {
            cost: 20_000,
            ..it.record(now)
        }],
    )
    .await;
    let body = it.get(&path).await.body;
    assert_eq!(
        (&body["remaining"], &body["projected_remaining"]),
        (&json!(0), &json!(0))
    );
    assert!(body["used_up_at"].is_string(), "{body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_says_until_when_it_is_complete() {
    let it = world(json!({})).await;
    let until = async || {
        let body = it.get("/admin/usage").await.body;
        body["complete_until"]
            .as_str()
            .expect("a time")
            .parse::<DateTime<Utc>>()
            .expect("a time")
    };
    assert!((now() - until().await).abs() < TimeDelta::seconds(30));
    let client = it.app.database.connect().await;
    client
        .batch_execute(
            "INSERT INTO usage_shippers VALUES \
             (gen_random_uuid(), 'a', now(), 0, 0, NULL), \
             (gen_random_uuid(), 'b', now(), 70, 7000, now() - interval '2 hours'), \
             (gen_random_uuid(), 'c', now() - interval '1 hour', 0, 0, NULL)",
        )
        .await
        .expect("reports");
    let pending = now() - TimeDelta::hours(2);
    assert!((pending - until().await).abs() < TimeDelta::seconds(30));
    client
        .batch_execute("DELETE FROM usage_shippers WHERE host = 'b'")
        .await
        .expect("a report goes");
    let silent = now() - TimeDelta::hours(1);
    assert!((silent - until().await).abs() < TimeDelta::seconds(30));
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_show_what_another_replica_took_of_the_rate() {
    let redis = RedisServer::start().await;
    let flag = format!("--redis-url={}", redis.url());
    // The long timeout allows for a busy machine.
    let replica = || {
        TestApp::setup()
            .flag(flag.clone())
            .flag("--redis-timeout=5s")
    };
    let one = replica().start().await;
    let two = replica().database(one.database.clone()).start().await;
    let account = one.register().await;
    let plan = one
        .plan(&account, json!({"default_rpm": 1, "burst": 20}))
        .await;
    let key = one.key(&account, &plan).await;
    let remaining = async |app: &TestApp| {
        let path = format!("/admin/api-keys/{}/limits", key.id);
        let body = app.act(&account, "GET", &path, Value::Null).await.body;
        body["limits"][0]["remaining"].as_u64().expect("a number")
    };
    assert_eq!((remaining(&one).await, remaining(&two).await), (20, 20));
    for _ in 0..8 {
        assert_eq!(one.echo(&key.text).await.status, 200);
    }
    for _ in 0..5 {
        for app in [&one, &two] {
            // A replica may hold a tenth of the burst for later.
            let left = remaining(app).await;
            assert!((10..=12).contains(&left), "{left}");
        }
    }
    // Reading the limits has taken no tokens.
    let mut admitted = 0;
    while two.echo(&key.text).await.status == 200 {
        admitted += 1;
        assert!(admitted <= 13, "more than the burst was admitted");
    }
    assert!(admitted >= 10, "{admitted}");
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_see_the_largest_tenants_and_what_is_not_shipped() {
    let it = world(json!({})).await;
    let now = now();
    let mut records = (0..7).map(|_| it.record(now)).collect::<Vec<_>>();
    records.extend((0..2).map(|_| rejected(it.record(now), "rpm")));
    append(&it.app, &records).await;
    let client = it.app.database.connect().await;
    client
        .batch_execute(
            "INSERT INTO usage_shippers VALUES \
             (gen_random_uuid(), 'replica-1', now(), 0, 0, NULL), \
             (gen_random_uuid(), 'replica-2', now() - interval '5 minutes', 70, 7000, now() - interval '6 minutes')",
        )
        .await
        .expect("reports");
    let report = |arguments: &[&str]| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_quota"))
            .arg("usage")
            .args(arguments)
            .env_clear()
            .env("DATABASE_URL", it.app.database.url())
            .output()
            .expect("the binary runs");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).expect("text")
    };
    let text = report(&[]);
    assert!(
        text.contains("Not shipped yet: 70 records, 7000 bytes."),
        "{text}"
    );
    let line = |part: &str| {
        text.lines()
            .find(|line| line.contains(part))
            .unwrap_or_else(|| panic!("no {part} in {text}"))
    };
    assert!(
        line("replica-2").ends_with("(silent)") && !line("replica-1").contains("silent"),
        "{text}"
    );
    let words = |line: &str| {
        line.split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let of_tenant = words(line(&it.account.tenant_id));
    assert_eq!(of_tenant[of_tenant.len() - 3..], ["7", "2", "7"], "{text}");
    let of_key = words(line(&it.key.id));
    assert_eq!(of_key[of_key.len() - 3..], ["7", "2", "7"], "{text}");
    assert!(!text.contains(&it.key.text), "the report contains a secret");
    assert!(report(&["--hours=1", "--top=1"]).contains("in the last 1 hour\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_can_stop_waiting_for_usage_on_a_lost_disk() {
    let it = world(json!({})).await;
    let client = it.app.database.connect().await;
    let (running, lost) = (
        "00000000-0000-0000-0000-00000000000a",
        "00000000-0000-0000-0000-00000000000b",
    );
    client
        .batch_execute(&format!(
            "INSERT INTO usage_shippers VALUES \
             ('{running}', 'replica-1', now(), 0, 0, NULL), \
             ('{lost}', 'replica-2', now() - interval '5 minutes', 70, 7000, now() - interval '6 minutes')"
        ))
        .await
        .expect("reports");
    let forget = |id: &str| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_quota"))
            .args(["usage", "forget", id])
            .env_clear()
            .env("DATABASE_URL", it.app.database.url())
            .output()
            .expect("the binary runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (
            output.status.success(),
            text(&output.stdout),
            text(&output.stderr),
        )
    };
    let hosts = async || {
        let query = "SELECT host FROM usage_shippers WHERE host LIKE 'replica-%' ORDER BY host";
        let rows = client.query(query, &[]).await.expect("reports");
        rows.iter()
            .map(|row| row.get::<_, String>(0))
            .collect::<Vec<_>>()
    };
    let (is_done, _, error) = forget(running);
    assert!(!is_done && error.contains("replica-1"), "{error}");
    let (is_done, _, error) = forget("00000000-0000-0000-0000-00000000000c");
    assert!(!is_done && error.contains("no report"), "{error}");
    assert_eq!(hosts().await, ["replica-1", "replica-2"]);

    let (is_done, shown, error) = forget(lost);
    assert!(is_done, "{error}");
    assert!(
        [lost, "replica-2", "70", "7000"]
            .iter()
            .all(|it| shown.contains(it)),
        "{shown}"
    );
    assert_eq!(hosts().await, ["replica-1"]);
    let (is_done, _, error) = forget(lost);
    assert!(!is_done && error.contains("no report"), "{error}");
    let until = it.get("/admin/usage").await.body["complete_until"].clone();
    let until = until.as_str().expect("a time").parse::<DateTime<Utc>>();
    let lag = now() - until.expect("a time");
    assert!(lag < TimeDelta::minutes(5), "{lag}");
}
