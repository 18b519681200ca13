//! Tests of `/admin/decisions`, the log as a list and as a stream.

use std::time::{Duration, Instant};

use chrono::{DateTime, DurationRound as _, TimeDelta, Utc};
use quota_server::repo::usage_batch::UsageRecord;
use reqwest::Response;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use uuid::Uuid;

use super::{append, now, record, rejected};
use crate::support::{
    app::{Account, PASSWORD, TestApp},
    http2,
};

const KEY: &str = "00000000-0000-7000-8000-00000000000a";
const OTHER_KEY: &str = "00000000-0000-7000-8000-00000000000c";
const PLAN: &str = "00000000-0000-7000-8000-00000000000b";

async fn list(app: &TestApp, account: &Account, query: &str) -> Value {
    let path = format!("/admin/decisions?{query}");
    let answer = app.act(account, "GET", &path, Value::Null).await;
    assert_eq!(answer.status, 200, "{query}: {}", answer.text);
    answer.body
}

fn request_ids(page: &Value) -> Vec<String> {
    let items = page["items"].as_array().expect("items").iter();
    items
        .map(|it| it["request_id"].as_str().expect("an ID").to_owned())
        .collect()
}

/// Returns requests that are one second apart. The ID of request `n` is `r{n}`. Request 0 was sent an hour ago.
fn requests(account: &Account, numbers: std::ops::Range<i64>) -> Vec<UsageRecord> {
    let start = now() - TimeDelta::hours(1);
    numbers
        .map(|n| {
            let key = if n % 2 == 0 { KEY } else { OTHER_KEY };
            let it = record(account, key, PLAN, start + TimeDelta::seconds(n));
            let it = UsageRecord {
                request_id: format!("r{n}"),
                endpoint: format!("GET /{}", n % 3),
                ..it
            };
            if n % 10 == 9 {
                rejected(it, "daily")
            } else {
                it
            }
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn decisions_are_listed_newest_first_page_by_page() {
    let app = TestApp::setup().without_jobs().start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({})).await;
    let key = app.key(&account, &plan).await;
    append(&app, &requests(&account, 0..60)).await;
    append(&app, &[record(&account, &key.id, &plan, now())]).await;
    let first = list(&app, &account, "limit=1").await;
    let item = &first["items"][0];
    assert_eq!(
        (&item["key_name"], &item["outcome"]),
        (&json!("Key"), &json!("allowed"))
    );
    assert_eq!(
        (&item["policy"], &item["retry_after"]),
        (&Value::Null, &Value::Null)
    );
    assert_eq!(first["total"], 61);

    for (filter, wanted) in [
        ("", Box::new(|_: i64| true) as Box<dyn Fn(i64) -> bool>),
        (&format!("&key_id={KEY}"), Box::new(|n| n % 2 == 0)),
        ("&outcome=rejected", Box::new(|n| n % 10 == 9)),
        ("&outcome=allowed", Box::new(|n| n % 10 != 9)),
        ("&endpoint=GET%20/2", Box::new(|n| n % 3 == 2)),
        (
            &format!("&key_id={OTHER_KEY}&outcome=rejected&endpoint=GET%20/0"),
            Box::new(|n| n % 10 == 9 && n % 3 == 0),
        ),
        ("&request_id=r17", Box::new(|n| n == 17)),
        ("&request_id=r17&outcome=rejected", Box::new(|_| false)),
        ("&endpoint=GET%20/never", Box::new(|_| false)),
    ] {
        let mut found = Vec::new();
        let mut cursor = String::new();
        loop {
            let page = list(&app, &account, &format!("limit=7{filter}{cursor}")).await;
            let expected = (0..60).filter(|n| wanted(*n)).count()
                + usize::from(filter.is_empty() || filter == "&outcome=allowed");
            assert_eq!(page["total"], expected, "{filter}");
            found.extend(request_ids(&page));
            match page["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => break,
            }
        }
        found.retain(|it| it.starts_with('r'));
        let expected = (0..60)
            .rev()
            .filter(|n| wanted(*n))
            .map(|n| format!("r{n}"));
        assert_eq!(found, expected.collect::<Vec<_>>(), "{filter}");
    }
    let denied = list(&app, &account, "request_id=r59").await;
    let item = &denied["items"][0];
    assert_eq!(
        (&item["outcome"], &item["policy"], &item["retry_after"]),
        (&json!("rejected"), &json!("daily"), &json!(7))
    );
    assert_eq!(item["key_name"], Value::Null, "the key does not exist");

    // Another tenant sees none of these decisions, whatever the filter.
    let other = app.register().await;
    for query in [
        "",
        "request_id=r17",
        &format!("key_id={KEY}"),
        "endpoint=GET%20/2",
    ] {
        let page = list(&app, &other, query).await;
        assert_eq!(
            (&page["items"], &page["total"]),
            (&json!([]), &json!(0)),
            "{query}"
        );
    }
    for (query, field) in [
        ("outcome=maybe", "outcome"),
        ("key_id=7", "key_id"),
        ("limit=101", "limit"),
        ("request_id=%00", "request_id"),
    ] {
        let answer = app
            .act(
                &account,
                "GET",
                &format!("/admin/decisions?{query}"),
                Value::Null,
            )
            .await;
        assert_eq!(
            (answer.status, &answer.body["errors"][0]["field"]),
            (422, &json!(field)),
            "{query}"
        );
    }
    let answer = app
        .act(&account, "GET", "/admin/decisions?cursor=xyz", Value::Null)
        .await;
    assert_eq!(answer.status, 400);
}

/// Reads events as they arrive.
struct Events {
    response: Response,
    text: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Event {
    name: String,
    id: Option<String>,
    data: Value,
}

impl Events {
    async fn open(app: &TestApp, token: &str, query: &str, last: Option<&str>) -> Self {
        let mut call = app
            .http
            .get(app.url(&format!("/admin/decisions/stream?{query}")))
            .bearer_auth(token);
        if let Some(last) = last {
            call = call.header("Last-Event-ID", last);
        }
        let response = call.send().await.expect("a response");
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        assert_eq!(response.headers()["cache-control"], "no-store");
        let mut events = Self {
            response,
            text: String::new(),
        };
        // Read what the server sends when the stream opens.
        while !events.text.contains("\n\n") {
            events.more().await.expect("a greeting");
        }
        events.text.clear();
        events
    }

    async fn more(&mut self) -> Option<()> {
        let chunk = tokio::time::timeout(Duration::from_secs(20), self.response.chunk());
        let chunk = chunk
            .await
            .expect("data within 20 s")
            .expect("the stream continues")?;
        self.text
            .push_str(std::str::from_utf8(&chunk).expect("text"));
        Some(())
    }

    /// Returns the next event, or `None` at the end of the stream.
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some((event, rest)) = self.text.split_once("\n\n") {
                let field = |name: &str| {
                    event.lines().find_map(|line| {
                        line.strip_prefix(name)?
                            .strip_prefix(": ")
                            .map(str::to_owned)
                    })
                };
                let event = field("event").map(|name| Event {
                    name,
                    id: field("id"),
                    data: serde_json::from_str(&field("data").expect("data")).expect("JSON"),
                });
                let rest = rest.to_owned();
                self.text = rest;
                if let Some(event) = event {
                    return Some(event);
                }
                continue;
            }
            self.more().await?;
        }
    }

    /// Returns the request IDs of the next `count` decisions, and the ID of the last event.
    async fn decisions(&mut self, count: usize) -> (Vec<String>, String) {
        let (mut ids, mut last) = (Vec::new(), String::new());
        while ids.len() < count {
            let event = self.next().await.expect("an event");
            assert_eq!(event.name, "decision", "{event:?}");
            ids.push(event.data["request_id"].as_str().expect("an ID").to_owned());
            last = event.id.expect("an event has an ID");
        }
        (ids, last)
    }
}

fn names(numbers: std::ops::Range<i64>) -> Vec<String> {
    numbers.map(|n| format!("r{n}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_shows_what_any_replica_ships_and_resumes_on_another() {
    let one = TestApp::setup().without_jobs().start().await;
    let two = TestApp::setup()
        .without_jobs()
        .database(one.database.clone())
        .start()
        .await;
    let account = one.register().await;
    let other = one.register().await;
    append(&one, &requests(&account, 0..5)).await;
    let mut events = Events::open(&one, &account.access_token, "", None).await;
    // The stream contains only new decisions, and only those of its own tenant.
    let began = Instant::now();
    append(&two, &requests(&other, 900..905)).await;
    append(&two, &requests(&account, 5..8)).await;
    let (ids, last) = events.decisions(3).await;
    assert_eq!(ids, names(5..8));
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "{:?}",
        began.elapsed()
    );
    drop(events);

    append(&one, &requests(&account, 8..12)).await;
    let mut resumed = Events::open(&two, &account.access_token, "", Some(&last)).await;
    assert_eq!(resumed.decisions(4).await.0, names(8..12));
    append(&one, &requests(&account, 12..14)).await;
    assert_eq!(resumed.decisions(2).await.0, names(12..14));

    // A stream that continues from a list misses nothing and repeats nothing.
    let page = list(&two, &account, "limit=1").await;
    assert_eq!(request_ids(&page), ["r13"]);
    append(&one, &requests(&account, 14..16)).await;
    let from = page["last_event_id"].as_str().expect("an ID");
    let query = format!("last_event_id={from}");
    let mut following = Events::open(&one, &account.access_token, &query, None).await;
    assert_eq!(following.decisions(2).await.0, names(14..16));

    // Filters apply to a stream as well.
    let query = format!("{query}&outcome=rejected&key_id={OTHER_KEY}");
    let mut filtered = Events::open(&one, &account.access_token, &query, None).await;
    append(&one, &requests(&account, 16..30)).await;
    assert_eq!(filtered.decisions(2).await.0, ["r19", "r29"]);

    // A position in one tenant's log gives no access to another tenant's log.
    let mut foreign = Events::open(&one, &other.access_token, "", Some(&last)).await;
    append(&one, &requests(&other, 905..906)).await;
    let mut seen = Vec::new();
    while seen.last().map(String::as_str) != Some("r905") {
        seen.extend(foreign.decisions(1).await.0);
    }
    assert!(seen.iter().all(|it| it.starts_with("r90")), "{seen:?}");

    let call = one
        .http
        .get(one.url("/admin/decisions/stream"))
        .bearer_auth(&account.access_token);
    let answer = call
        .header("Last-Event-ID", "nonsense")
        .send()
        .await
        .expect("a response");
    assert_eq!(answer.status(), 422);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_behind_says_how_much_it_skipped() {
    let app = TestApp::setup().without_jobs().start().await;
    let account = app.register().await;
    append(&app, &requests(&account, 0..1)).await;
    let from = list(&app, &account, "").await["last_event_id"]
        .as_str()
        .expect("an ID")
        .to_owned();
    append(&app, &requests(&account, 1..1300)).await;
    let mut events = Events::open(&app, &account.access_token, "", Some(&from)).await;
    let dropped = events.next().await.expect("an event");
    assert_eq!(dropped.name, "dropped");
    let count = dropped.data["count"].as_i64().expect("a number");
    assert_eq!(count, 799);
    let rest = usize::try_from(1299 - count).expect("a count");
    let (ids, _) = events.decisions(rest).await;
    assert_eq!(ids, names(1300 - 500..1300));
    // After the skipped decisions, the stream continues without a gap.
    append(&app, &requests(&account, 1300..1302)).await;
    assert_eq!(events.decisions(2).await.0, names(1300..1302));
    let metric = app.metric("quota_decisions_not_streamed_total").await;
    assert!((metric - 799.0).abs() < 0.5, "{metric}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_with_its_session_and_with_its_server() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let login = json!({"email": account.email, "password": PASSWORD});
    let second = app
        .post("/auth/login", login)
        .send()
        .await
        .text("access_token");
    let mut ended = Events::open(&app, &second, "", None).await;
    let mut stays = Events::open(&app, &account.access_token, "", None).await;
    let me = app.get("/auth/me").bearer(&second).send().await;
    let path = format!("/auth/sessions/{}", me.text("session_id"));
    let answer = app.act(&account, "DELETE", &path, Value::Null).await;
    assert_eq!(answer.status, 204);
    let end = ended.next().await.expect("an event");
    assert_eq!(
        (end.name.as_str(), &end.data),
        ("end", &json!({"reason": "session_ended"}))
    );
    assert_eq!(ended.next().await, None);
    append(&app, &requests(&account, 0..2)).await;
    assert_eq!(stays.decisions(2).await.0, names(0..2));

    let stopping = tokio::spawn(app.stop());
    let end = stays.next().await.expect("an event");
    assert_eq!(end.data, json!({"reason": "server_stopping"}));
    assert_eq!(stays.next().await, None);
    stopping.await.expect("the server stops");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quiet_stream_stays_open_beyond_every_deadline_of_a_connection() {
    let app = TestApp::setup()
        .without_jobs()
        .flag("--request-timeout=1s")
        .flag("--idle-timeout=1s")
        .flag("--write-timeout=2s")
        .flag("--header-timeout=1s")
        .start()
        .await;
    let account = app.register().await;
    let mut events = Events::open(&app, &account.access_token, "", None).await;
    // Test HTTP/2 as well, because it has separate deadlines.
    let client = reqwest::Client::builder()
        .http2_prior_knowledge()
        .build()
        .expect("a client");
    let call = client
        .get(app.url("/admin/decisions/stream"))
        .bearer_auth(&account.access_token);
    let response = call.send().await.expect("a response");
    let mut multiplexed = Events {
        response,
        text: String::new(),
    };
    tokio::time::sleep(Duration::from_secs(5)).await;
    append(&app, &requests(&account, 0..2)).await;
    assert_eq!(events.decisions(2).await.0, names(0..2));
    assert_eq!(multiplexed.decisions(2).await.0, names(0..2));
}

/// The client occasionally reads a byte. No deadline can distinguish this client from one on a slow network.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_read_byte_by_byte_ends_with_its_session() {
    let app = TestApp::setup()
        .without_jobs()
        .flag("--write-timeout=1s")
        .start()
        .await;
    let account = app.register().await;
    let login = json!({"email": account.email, "password": PASSWORD});
    let second = app.post("/auth/login", login).send().await;
    let token = second.text("access_token");
    let mut head = http2::head("GET", "/admin/decisions/stream");
    head.extend(http2::field("authorization", &format!("Bearer {token}")));
    let request = http2::frame(http2::HEADERS, http2::END_HEADERS | 1, 1, &head);
    let stream = TcpStream::connect(app.addr)
        .await
        .expect("the server listens");
    let (mut reader, mut writer) = stream.into_split();
    let hello = [http2::hello(64), request].concat();
    writer.write_all(&hello).await.expect("the server reads");
    let dripping = tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let more = http2::frame(8, 0, 1, &1_u32.to_be_bytes());
            if writer.write_all(&more).await.is_err() {
                return;
            }
        }
    });
    let mut sent = Vec::new();
    while !String::from_utf8_lossy(&sent).contains("connected") {
        assert_ne!(
            reader
                .read_buf(&mut sent)
                .await
                .expect("the stream is open"),
            0
        );
    }
    append(&app, &requests(&account, 0..100)).await;
    let open = async {
        loop {
            assert_ne!(
                reader
                    .read_buf(&mut sent)
                    .await
                    .expect("the stream is open"),
                0
            );
        }
    };
    let open = tokio::time::timeout(Duration::from_secs(4), open).await;
    assert!(open.is_err(), "the stream ended during the session");
    assert!(String::from_utf8_lossy(&sent).contains("event: decision"));

    let me = app.get("/auth/me").bearer(&token).send().await;
    let path = format!("/auth/sessions/{}", me.text("session_id"));
    assert_eq!(
        app.act(&account, "DELETE", &path, Value::Null).await.status,
        204
    );
    let rest = reader.read_to_end(&mut sent);
    let ended = tokio::time::timeout(Duration::from_secs(10), rest).await;
    assert!(ended.is_ok(), "the stream is still open");
    dripping.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn number_of_streams_of_a_tenant_is_limited() {
    let app = TestApp::setup().without_jobs().start().await;
    let account = app.register().await;
    let mut open = Vec::new();
    for _ in 0..20 {
        open.push(Events::open(&app, &account.access_token, "", None).await);
    }
    let path = "/admin/decisions/stream";
    let refused = app.act(&account, "GET", path, Value::Null).await;
    assert_eq!(
        (refused.status, refused.header("retry-after")),
        (429, Some("10"))
    );
    let other = app.register().await;
    assert_eq!(app.act(&other, "GET", path, Value::Null).await.status, 200);
    drop(open);
    for attempt in 0.. {
        if app.act(&account, "GET", path, Value::Null).await.status == 200 {
            break;
        }
        assert!(attempt < 100, "closed streams still count");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_search_for_rare_matches_is_bounded_and_can_be_continued() {
    let app = TestApp::setup().without_jobs().start().await;
    let account = app.register().await;
    let start = now() - TimeDelta::hours(1);
    let many = (0..60_000).map(|n| {
        let it = record(&account, KEY, PLAN, start + TimeDelta::milliseconds(n));
        let it = UsageRecord {
            request_id: format!("r{n}"),
            event_id: Uuid::from_u128(n.unsigned_abs().into()),
            ..it
        };
        if n == 3 { rejected(it, "rpm") } else { it }
    });
    for batch in many.collect::<Vec<_>>().chunks(20_000) {
        append(&app, batch).await;
    }
    let first = list(&app, &account, "outcome=rejected").await;
    assert_eq!((&first["items"], &first["total"]), (&json!([]), &json!(1)));
    let cursor = first["next_cursor"].as_str().expect("there is more");
    let second = list(&app, &account, &format!("outcome=rejected&cursor={cursor}")).await;
    assert_eq!(request_ids(&second), ["r3"]);
    assert_eq!(second["next_cursor"], Value::Null);
}

/// A request ID that contains this time.
fn request_id_at(time: DateTime<Utc>, random: u8) -> String {
    let millis = u64::try_from(time.timestamp_millis()).expect("after 1970");
    let random = [random; 10];
    uuid::Builder::from_unix_timestamp_millis(millis, &random)
        .into_uuid()
        .to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_found_by_an_id_that_contains_a_time() {
    let app = TestApp::setup().without_jobs().start().await;
    let account = app.register().await;
    let stranger = app.register().await;
    let time = (now() - TimeDelta::hours(1)).duration_trunc(TimeDelta::seconds(1));
    let time = time.expect("a time");
    let of = |account: &Account, key: &str, at: DateTime<Utc>, id: &str| UsageRecord {
        request_id: id.into(),
        ..record(account, key, PLAN, at)
    };
    let own = request_id_at(time, 1);
    let early = request_id_at(time - TimeDelta::seconds(1), 2);
    let late = request_id_at(time + TimeDelta::seconds(1), 3);
    let stale = request_id_at(time - TimeDelta::milliseconds(1001), 4);
    let of_another_version = "019ab4e1-7c00-4000-8000-000000000001";
    let records = [
        of(&account, KEY, time, &own),
        of(&account, KEY, time, &early),
        of(&account, KEY, time, &late),
        of(&account, KEY, time, &stale),
        of(&account, KEY, time, of_another_version),
        of(&account, KEY, time, &own.to_uppercase()),
        of(&stranger, KEY, time, &own),
        // The client sent the same ID again.
        rejected(
            of(&account, KEY, time + TimeDelta::seconds(10), &own),
            "rpm",
        ),
        of(&account, OTHER_KEY, time - TimeDelta::days(3), &own),
        of(
            &account,
            OTHER_KEY,
            time + TimeDelta::milliseconds(20),
            &own,
        ),
    ];
    append(&app, &records).await;
    let client = app.database.connect().await;
    let with_time = "SELECT count(*) FROM usage_log WHERE request_id_has_time";
    let with_time = client.query_one(with_time, &[]).await.expect("a count");
    assert_eq!(with_time.get::<_, i64>(0), 6);
    // Rows of previous versions do not say that their request IDs contain a time.
    for change in ["", "UPDATE usage_log SET request_id_has_time = false"] {
        client.batch_execute(change).await.expect("a change");
        for (query, wanted) in [
            (format!("request_id={own}"), 4),
            (format!("request_id={own}&limit=1"), 4),
            (format!("request_id={own}&key_id={OTHER_KEY}"), 2),
            (format!("request_id={own}&outcome=rejected"), 1),
            (
                format!("request_id={own}&outcome=rejected&key_id={OTHER_KEY}"),
                0,
            ),
            (format!("request_id={own}&endpoint=GET%20/none"), 0),
            (format!("request_id={}", own.to_uppercase()), 1),
            (format!("request_id={early}"), 1),
            (format!("request_id={late}"), 1),
            (format!("request_id={stale}"), 1),
            (format!("request_id={of_another_version}"), 1),
            (format!("request_id={}", request_id_at(time, 9)), 0),
        ] {
            let (mut found, mut cursor) = (Vec::new(), String::new());
            loop {
                let page = list(&app, &account, &format!("{query}{cursor}")).await;
                assert_eq!(page["total"], json!(wanted), "{query} {change}");
                found.extend(page["items"].as_array().expect("items").clone());
                match page["next_cursor"].as_str() {
                    Some(next) => cursor = format!("&cursor={next}"),
                    None => break,
                }
            }
            assert_eq!(found.len(), wanted, "{query} {change}");
            let times = found.iter().map(|it| it["at"].as_str().expect("a time"));
            assert!(times.rev().is_sorted(), "{query} {change}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_search_for_an_id_with_a_time_uses_the_index_on_times() {
    let app = TestApp::setup().without_jobs().start().await;
    let account = app.register().await;
    let start = now() - TimeDelta::hours(1);
    let records = (0..20_000)
        .map(|n| {
            let at = start + TimeDelta::milliseconds(n * 20);
            UsageRecord {
                request_id: request_id_at(at, 1),
                ..record(&account, KEY, PLAN, at)
            }
        })
        .collect::<Vec<_>>();
    append(&app, &records).await;
    let client = app.database.connect().await;
    let vacuum = client.batch_execute("VACUUM (ANALYZE) usage_log").await;
    vacuum.expect("a vacuum");
    let id = &records[7_000].request_id;
    let found = list(&app, &account, &format!("request_id={id}")).await;
    assert_eq!(request_ids(&found), [id.as_str()]);
    let scans = "SELECT coalesce(sum(idx_scan), 0)::bigint FROM pg_stat_user_indexes s \
        JOIN pg_class c ON c.oid = s.indexrelid JOIN pg_am a ON a.oid = c.relam \
        WHERE s.relname LIKE 'usage_log%' AND a.amname = 'brin'";
    // PostgreSQL updates its statistics late.
    for attempt in 0.. {
        let count = client.query_one(scans, &[]).await.expect("a count");
        if count.get::<_, i64>(0) > 0 {
            break;
        }
        assert!(attempt < 100, "the index was not used");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_id_that_very_many_requests_share_is_not_counted() {
    let app = TestApp::setup().without_jobs().start().await;
    let account = app.register().await;
    let start = now() - TimeDelta::hours(1);
    let shared = |id: &str, numbers: std::ops::Range<i64>| {
        let records = numbers.map(|n| UsageRecord {
            request_id: id.into(),
            event_id: Uuid::from_u128(n.unsigned_abs().into()),
            ..record(&account, KEY, PLAN, start + TimeDelta::milliseconds(n))
        });
        records.collect::<Vec<_>>()
    };
    append(&app, &shared("few", 0..30)).await;
    let few = list(&app, &account, "request_id=few").await;
    assert_eq!(few["total"], json!(30));
    // The second ID contains a time, but not that of the requests.
    for id in ["many", "017f22e2-79b0-7cc3-98c4-dc0c0c07398f"] {
        let mut many = shared(id, 100..25_100);
        let oldest = many.remove(0);
        many.push(rejected(oldest, "rpm"));
        append(&app, &many).await;
        append(&app, &shared(id, 25_100..50_200)).await;
        let many = list(&app, &account, &format!("request_id={id}&limit=100")).await;
        assert_eq!(many["total"], Value::Null);
        assert_eq!(request_ids(&many), vec![id; 100]);
        assert!(many["next_cursor"].is_string());
        let query = format!("request_id={id}&outcome=rejected");
        let first = list(&app, &account, &query).await;
        assert_eq!(
            (&first["items"], &first["total"]),
            (&json!([]), &Value::Null)
        );
        let cursor = first["next_cursor"].as_str().expect("there is more");
        let second = list(&app, &account, &format!("{query}&cursor={cursor}")).await;
        assert_eq!(request_ids(&second), [id]);
        assert_eq!(second["next_cursor"], Value::Null);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn caddy_does_not_buffer_a_stream() {
    let app = TestApp::setup().without_jobs().start().await;
    let account = app.register().await;
    let dir = tempfile::tempdir().expect("a directory");
    let port = quota_testkit::redis::free_port();
    let file = dir.path().join("Caddyfile");
    let site = format!(
        "{{\n\tadmin off\n\tauto_https off\n}}\nhttp://127.0.0.1:{port} {{\n\tencode gzip\n\thandle_path /api/* {{\n\t\t\
         reverse_proxy {}\n\t}}\n}}\n",
        app.addr
    );
    std::fs::write(&file, site).expect("the file is written");
    let mut caddy = std::process::Command::new("caddy");
    caddy
        .args(["run", "--adapter", "caddyfile", "--config"])
        .arg(&file)
        .env("HOME", dir.path())
        .env("XDG_DATA_HOME", dir.path())
        .env("XDG_CONFIG_HOME", dir.path());
    let _caddy = quota_testkit::Process::start(&caddy, &dir.path().join("output"))
        .expect("the program is installed");
    let url = format!("http://127.0.0.1:{port}/api/admin/decisions/stream");
    let mut response = None;
    for _ in 0..300 {
        let call = app
            .http
            .get(&url)
            .bearer_auth(&account.access_token)
            .header("Accept-Encoding", "gzip, identity");
        if let Ok(answer) = call.send().await {
            response = Some(answer);
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let response = response.expect("Caddy listens");
    assert_eq!(response.status(), 200);
    let mut events = Events {
        response,
        text: String::new(),
    };
    while !events.text.contains("connected") {
        events
            .more()
            .await
            .expect("the greeting arrives immediately");
    }
    for n in 0..3 {
        append(&app, &requests(&account, n..n + 1)).await;
        assert_eq!(events.decisions(1).await.0, names(n..n + 1));
    }
}
