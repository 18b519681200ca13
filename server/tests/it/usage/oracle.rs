//! Compares the usage that the API returns with a recount of the raw records. The recount groups records by local date
//! and hour, instead of by the start of their bucket.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use chrono::{DateTime, TimeDelta, Utc};
use jiff::{Timestamp, tz::TimeZone};
use quota_server::repo::usage_batch::UsageRecord;
use serde_json::{Value, json};
use uuid::Uuid;

use super::{append, record, rejected};
use crate::support::app::{Account, TestApp};

/// The numbers of allowed and denied requests, and their total costs.
type Counts = [u64; 4];

const FIELDS: [&str; 4] = ["allowed", "rejected", "allowed_cost", "rejected_cost"];

fn counts(value: &Value) -> Counts {
    FIELDS.map(|field| {
        value[field]
            .as_u64()
            .unwrap_or_else(|| panic!("no {field} in {value}"))
    })
}

fn add(to: &mut Counts, record: &UsageRecord) {
    let cost = u64::try_from(record.cost).expect("a cost");
    let first = usize::from(record.was_rejected);
    to[first] += 1;
    to[first + 2] += cost;
}

/// Returns a label for a bucket: the local time, truncated to the hour or day. The label of an hour includes the offset
/// from UTC, which differs if the hour occurs twice.
fn label(zone: &TimeZone, at: DateTime<Utc>, bucket: &str) -> String {
    let at = Timestamp::from_microsecond(at.timestamp_micros()).expect("a time");
    let (local, offset) = (zone.to_datetime(at), zone.to_offset(at));
    match bucket {
        "hour" => format!("{} {:02} {offset}", local.date(), local.hour()),
        _ => local.date().to_string(),
    }
}

/// A linear congruential generator (Knuth, MMIX), which is good enough for this test.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

struct World {
    app: TestApp,
    account: Account,
    records: Vec<UsageRecord>,
}

/// Creates records of 30 keys on 3 plans, with 40 endpoints, on the given days.
async fn world(days: &[&str]) -> World {
    let app = TestApp::setup().without_jobs().start().await;
    let account = app.register().await;
    let ids = |n: u128, first: u128| {
        (0..n)
            .map(|i| Uuid::from_u128(first + i).to_string())
            .collect::<Vec<_>>()
    };
    let (keys, plans) = (ids(30, 0x1000), ids(3, 0x2000));
    let mut dice = Dice(42);
    let mut records = Vec::new();
    for day in days {
        let day: DateTime<Utc> = format!("{day}T00:00:00Z").parse().expect("a day");
        for _ in 0..600 {
            // Multiplying two random numbers makes the first keys and endpoints far more frequent.
            let mut square =
                |n: u64| usize::try_from(dice.below(n) * dice.below(n) / n).expect("small");
            let (key, endpoint) = (square(30), square(40));
            let at = day
                + TimeDelta::milliseconds(i64::try_from(dice.below(86_400_000)).expect("a time"));
            let mut it = record(&account, &keys[key], &plans[key % 3], at);
            it.endpoint = match endpoint {
                0 => String::new(),
                n => format!("GET /v{n}"),
            };
            it.cost = i64::try_from(1 + dice.below(5)).expect("a cost");
            it.event_id =
                Uuid::from_u128(u128::from(dice.below(u64::MAX)) << 64 | records.len() as u128);
            records.push(match dice.below(10) {
                0 => rejected(it, "rpm"),
                1 => rejected(it, "daily"),
                2 => UsageRecord {
                    policy: None,
                    ..rejected(it, "rpm")
                },
                _ => it,
            });
        }
    }
    // Append the records in batches that span several days, as happens when records arrive late.
    let mut shuffled = records.clone();
    shuffled.sort_by_key(|it| it.event_id);
    for batch in shuffled.chunks(700) {
        append(&app, batch).await;
    }
    World {
        app,
        account,
        records,
    }
}

/// Returns the group to which a record belongs. An allowed request belongs to no policy.
fn group(record: &UsageRecord, by: &str) -> Option<String> {
    match by {
        "key" => Some(record.key_id.to_string()),
        "plan" => Some(record.plan_id.to_string()),
        "endpoint" => Some(record.endpoint.clone()),
        _ => record
            .was_rejected
            .then(|| record.policy.unwrap_or("reduced_capacity").to_owned()),
    }
}

/// Returns the group that an entry of a response is about, or `None` for `other`.
fn group_of(value: &Value, by: &str) -> Option<String> {
    let field = match by {
        "key" => "key_id",
        "plan" => "plan_id",
        other => other,
    };
    let fields = ["key_id", "plan_id", "endpoint", "policy"];
    for other in fields.iter().filter(|it| **it != field) {
        assert_eq!(value[*other], Value::Null, "{value}");
    }
    let group = value[field].as_str().map(str::to_owned);
    assert_eq!(value["other"], json!(group.is_none()), "{value}");
    group
}

impl World {
    async fn get(&self, query: &str) -> Value {
        let path = format!("/admin/usage?{query}");
        let answer = self.app.act(&self.account, "GET", &path, Value::Null).await;
        assert_eq!(answer.status, 200, "{query}: {}", answer.text);
        answer.body
    }

    /// Compares every bucket of a response with a recount of the `wanted` records.
    async fn check(
        &self,
        zone: &str,
        (from, to): (&str, &str),
        bucket: &str,
        filter: &str,
        wanted: impl Fn(&UsageRecord) -> bool,
    ) {
        let query = format!("from={from}&to={to}&bucket={bucket}&tz={zone}{filter}");
        let usage = self.get(&query).await;
        let tz = TimeZone::get(zone).expect("a zone");
        let time = |text: &Value| {
            text.as_str()
                .expect("a time")
                .parse::<DateTime<Utc>>()
                .expect("a time")
        };
        let (from, to) = (time(&usage["from"]), time(&usage["to"]));
        let counted = |it: &&UsageRecord| wanted(it) && from <= it.at && it.at < to;
        let mut expected: BTreeMap<String, Counts> = BTreeMap::new();
        let mut total = Counts::default();
        for it in self.records.iter().filter(counted) {
            add(expected.entry(label(&tz, it.at, bucket)).or_default(), it);
            add(&mut total, it);
        }
        assert!(total[0] > 20, "{query}: the oracle has too few records");
        let mut seen = BTreeSet::new();
        let mut last = None;
        for it in usage["buckets"].as_array().expect("buckets") {
            let start = time(&it["start"]);
            assert!(last < Some(start), "{query}: {it} is out of order");
            last = Some(start);
            let label = label(&tz, start, bucket);
            let expected = expected.remove(&label).unwrap_or_default();
            assert_eq!(counts(it), expected, "{query}: {label} {it}");
            assert_eq!(it["key_id"], Value::Null);
            assert!(seen.insert(label.clone()), "{query}: {label} occurs twice");
        }
        assert!(expected.is_empty(), "{query}: no bucket for {expected:?}");
        assert_eq!(counts(&usage["total"]), total, "{query}");
        // Every bucket in the range is present, including those without requests.
        let mut at = from;
        while at < to {
            assert!(
                seen.remove(&label(&tz, at, bucket)) || seen_before(&tz, at, bucket),
                "{query}: no bucket at {at}"
            );
            at += TimeDelta::minutes(15);
        }
        assert!(
            seen.is_empty(),
            "{query}: buckets outside the range: {seen:?}"
        );
    }

    /// Compares the groups of a response, and the buckets of each group.
    async fn check_groups(&self, by: &str, filter: &str, wanted: impl Fn(&UsageRecord) -> bool) {
        let query = format!(
            "from=2026-03-27T10:30:00Z&to=2026-03-31T05:00:00Z&bucket=day&tz=Europe/Berlin&group_by={by}{filter}"
        );
        let usage = self.get(&query).await;
        let tz = TimeZone::get("Europe/Berlin").expect("a zone");
        let range = |it: &&UsageRecord| {
            let at = it.at.to_rfc3339();
            wanted(it)
                && at.as_str() >= "2026-03-27T10:30:00"
                && at.as_str() < "2026-03-31T05:00:00"
        };
        let mut expected: HashMap<String, (Counts, DateTime<Utc>)> = HashMap::new();
        let mut by_day: HashMap<(Option<String>, String), Counts> = HashMap::new();
        for it in self.records.iter().filter(range) {
            let Some(group) = group(it, by) else { continue };
            let entry = expected
                .entry(group.clone())
                .or_insert((Counts::default(), it.at));
            add(&mut entry.0, it);
            entry.1 = entry.1.max(it.at);
            add(
                by_day
                    .entry((Some(group), label(&tz, it.at, "day")))
                    .or_default(),
                it,
            );
        }
        let groups = usage["groups"].as_array().expect("groups");
        assert!(
            expected.len() >= 2 || !filter.is_empty(),
            "{query}: {expected:?}"
        );
        let listed = groups
            .iter()
            .filter_map(|it| group_of(it, by))
            .collect::<Vec<_>>();
        assert_eq!(listed.len(), expected.len().min(20), "{query}: {groups:?}");
        let size = |counts: &Counts| counts[0] + counts[1];
        let mut smallest = u64::MAX;
        for it in groups.iter().filter(|it| it["other"] == false) {
            let group = group_of(it, by).expect("a group");
            let (expected, last) = expected
                .remove(&group)
                .unwrap_or_else(|| panic!("{query}: {it}"));
            assert_eq!(counts(it), expected, "{query}: {it}");
            assert!(size(&expected) <= smallest, "{query}: {it} is out of order");
            smallest = size(&expected);
            if let Some(seen) = it["last_seen_at"].as_str() {
                let seen: DateTime<Utc> = seen.parse().expect("a time");
                assert_eq!(
                    seen.timestamp_millis(),
                    last.timestamp_millis(),
                    "{query}: {it}"
                );
            }
        }
        let mut rest = Counts::default();
        for (counts, _) in expected.values() {
            assert!(
                size(counts) <= smallest,
                "{query}: a larger group is not listed"
            );
            rest.iter_mut().zip(counts).for_each(|(sum, n)| *sum += n);
        }
        let other = groups.iter().find(|it| it["other"] == true);
        assert_eq!(other.map(counts).unwrap_or_default(), rest, "{query}");

        // Combine the groups that the response does not list separately.
        let mut merged: HashMap<(Option<String>, String), Counts> = HashMap::new();
        for ((group, day), counts) in by_day {
            let group = group.filter(|it| listed.contains(it));
            let sum = merged.entry((group, day)).or_default();
            sum.iter_mut().zip(counts).for_each(|(sum, n)| *sum += n);
        }
        for it in usage["buckets"].as_array().expect("buckets") {
            let start: DateTime<Utc> = it["start"]
                .as_str()
                .expect("a time")
                .parse()
                .expect("a time");
            let place = (group_of(it, by), label(&tz, start, "day"));
            assert_eq!(
                Some(counts(it)),
                merged.remove(&place),
                "{query}: {place:?}"
            );
        }
        assert!(merged.is_empty(), "{query}: no bucket for {merged:?}");
    }
}

/// Returns whether the quarter hour at `at` has the same label as the quarter hour before it.
fn seen_before(zone: &TimeZone, at: DateTime<Utc>, bucket: &str) -> bool {
    label(zone, at, bucket) == label(zone, at - TimeDelta::minutes(15), bucket)
}

const DAYS: [&str; 8] = [
    "2026-03-27",
    "2026-03-28",
    "2026-03-29",
    "2026-03-30",
    "2026-04-04",
    "2026-04-05",
    "2026-10-24",
    "2026-10-25",
];

#[tokio::test(flavor = "multi_thread")]
async fn every_hour_and_day_equals_a_recount_in_every_zone() {
    let world = world(&DAYS).await;
    // Clocks change by an hour in Berlin and New York, and by half an hour on Lord Howe Island. The offsets of some
    // zones include half or quarter hours.
    let ranges = [
        ("2026-03-27T10:00:00Z", "2026-03-31T00:00:00Z"),
        ("2026-03-28T23:07:11Z", "2026-03-29T22:07:11Z"),
        ("2026-04-04T00:00:00Z", "2026-04-06T00:00:00Z"),
        ("2026-10-24T00:00:00Z", "2026-10-26T00:00:00Z"),
    ];
    for zone in [
        "UTC",
        "Europe/Berlin",
        "America/New_York",
        "Asia/Kolkata",
        "Asia/Kathmandu",
        "Australia/Lord_Howe",
        "America/St_Johns",
        "Pacific/Chatham",
        "Pacific/Kiritimati",
    ] {
        for range in ranges {
            for bucket in ["hour", "day"] {
                world.check(zone, range, bucket, "", |_| true).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_filter_and_group_equals_a_recount() {
    let world = world(&DAYS[..4]).await;
    let it = &world.records[0];
    let (key, plan) = (it.key_id, it.plan_id);
    let busiest = "GET /v1";
    let range = ("2026-03-27T10:00:00Z", "2026-03-31T00:00:00Z");
    let by_key = format!("&key_id={key}");
    let by_plan = format!("&plan_id={plan}");
    let by_endpoint = "&endpoint=GET%20/v1".to_owned();
    let is_key = |it: &UsageRecord| it.key_id == key;
    let is_plan = |it: &UsageRecord| it.plan_id == plan;
    let is_endpoint = |it: &UsageRecord| it.endpoint == busiest;
    for bucket in ["hour", "day"] {
        world
            .check("Asia/Kolkata", range, bucket, &by_key, is_key)
            .await;
        world
            .check("Asia/Kolkata", range, bucket, &by_plan, is_plan)
            .await;
        world
            .check("Asia/Kolkata", range, bucket, &by_endpoint, is_endpoint)
            .await;
        world
            .check("Asia/Kolkata", range, bucket, "&endpoint=", |it| {
                it.endpoint.is_empty()
            })
            .await;
        let both = format!("{by_plan}{by_endpoint}");
        world
            .check("Asia/Kolkata", range, bucket, &both, |it| {
                is_plan(it) && is_endpoint(it)
            })
            .await;
    }
    for by in ["key", "endpoint", "policy", "plan"] {
        world.check_groups(by, "", |_| true).await;
        world.check_groups(by, &by_key, is_key).await;
        world.check_groups(by, &by_plan, is_plan).await;
        world.check_groups(by, &by_endpoint, is_endpoint).await;
        world
            .check_groups(by, &format!("{by_key}{by_endpoint}"), |it| {
                is_key(it) && is_endpoint(it)
            })
            .await;
        world
            .check_groups(by, &format!("{by_plan}{by_endpoint}"), |it| {
                is_plan(it) && is_endpoint(it)
            })
            .await;
    }
}
