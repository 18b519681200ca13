use serde_json::json;

use super::*;

fn group(name: &str, allowed: u64, rejected: u64, other: bool) -> serde_json::Value {
    json!({
        "key_id": if other { None } else { Some(format!("019ab4e1-7c00-7000-8000-0000000000{:02x}", allowed % 256)) },
        "endpoint": null, "policy": null, "plan_id": null, "name": if other { None } else { Some(name) }, "other": other,
        "allowed": allowed, "rejected": rejected, "allowed_cost": allowed * 2, "rejected_cost": rejected * 2,
        "last_seen_at": if other { None } else { Some("2026-11-26T04:00:00.000Z") },
    })
}

fn usage(groups: &[serde_json::Value]) -> Usage {
    serde_json::from_value(json!({
        "from": "2026-11-25T05:00:00.000Z", "to": "2026-11-26T05:00:00.000Z", "bucket": "hour", "time_zone": "UTC",
        "group_by": "key", "complete_until": "2026-11-26T04:30:00.000Z",
        "total": {"allowed": 5, "rejected": 1, "allowed_cost": 5, "rejected_cost": 1},
        "buckets": [{
            "start": "2026-11-25T05:00:00.000Z", "key_id": null, "endpoint": null, "policy": null, "plan_id": null,
            "other": false, "allowed": 5, "rejected": 1, "allowed_cost": 7, "rejected_cost": 2,
        }],
        "groups": groups,
    }))
    .expect("usage")
}

#[test]
fn address_says_what_to_load() {
    let query = Query::read(
        "?range=custom&from=2026-11-01&to=2026-11-03&bucket=day&tz=utc&group=policy&endpoint=GET+/a",
    );
    let request = UsageRequest::read(&query);
    assert_eq!(
        (request.range, request.zone),
        (Range::Custom, ZoneChoice::Utc)
    );
    assert_eq!(request.dates, ("2026-11-01".into(), "2026-11-03".into()));
    assert_eq!(
        (request.bucket, request.group_by),
        (Some(UsageBucketSize::Day), UsageGroupBy::Policy)
    );
    assert_eq!(request.endpoint.as_deref(), Some("GET /a"));
    let parameters =
        UsageRequest::parameters(&query.clone().with("sort", "-rate").with("view", "table"));
    assert_eq!(UsageRequest::read(&Query::read(&parameters)), request);
    assert!(!parameters.contains("sort") && !parameters.contains("view"));
    let none = UsageRequest::read(&Query::read("?range=x&key_id=y&tz=z&bucket=year"));
    assert_eq!(none, UsageRequest::read(&Query::default()));
}

#[test]
fn change_is_relative_to_the_period_before() {
    assert_eq!(change(9, 8), "+12.5% vs. previous period");
    assert_eq!(change(4, 8), "−50.0% vs. previous period");
    assert_eq!(change(3, 3), "Same as the previous period");
    assert_eq!(change(3, 0), "None in the previous period");
}

#[test]
fn today_is_never_less_than_the_chart_shows() {
    let stats = |requests: u64, rejected: u64, today: &str| -> Stats {
        serde_json::from_value(json!({
            "total_keys": 1, "active_keys": 1, "unused_keys": 0, "total_plans": 1, "requests_today": requests,
            "rejected_today": rejected, "requests_yesterday": 0, "rejected_yesterday": 0, "today": today,
            "time_zone": "UTC", "complete_until": today, "closest_to_limit": null, "attention": [],
        }))
        .expect("statistics")
    };
    // 5 requests are allowed and 1 is rejected at 05:00 on November 25.
    let day = usage(&[]);
    let of = |stats: &Stats| {
        let pair = today(stats, &day);
        (pair.allowed, pair.rejected)
    };
    assert_eq!(of(&stats(2, 0, "2026-11-25T00:00:00Z")), (5, 1));
    assert_eq!(of(&stats(9, 2, "2026-11-25T00:00:00Z")), (7, 2));
    assert_eq!(of(&stats(2, 0, "2026-11-26T00:00:00Z")), (2, 0));
}

#[test]
fn strip_says_if_there_is_nothing_to_compare_with() {
    let text = |before: Pair| {
        let now = Pair {
            allowed: 9,
            rejected: 1,
        };
        strip(now, before, None, "Busiest hour").to_string()
    };
    let compared = text(Pair {
        allowed: 3,
        rejected: 1,
    });
    assert!(
        compared.contains(">10.0%<") && compared.contains(">25.0% in the previous period<"),
        "{compared}"
    );
    let first = text(Pair {
        allowed: 0,
        rejected: 0,
    });
    assert!(
        first.contains(">No requests in the previous period<"),
        "{first}"
    );
}

#[test]
fn rows_are_sorted_with_other_last() {
    let all = usage(&[
        group("A", 1, 9, false),
        group("B", 20, 0, false),
        group("", 500, 500, true),
    ]);
    let order = |sort: &str| {
        let query = Query::default().with("sort", sort);
        let table = group_table(&all, &query, false, 1_795_667_400_000).to_string();
        ["A", "B", "Other"].map(|name| table.find(&format!("clamp\">{name}<")).expect("a row"))
    };
    let [a, b, other] = order("");
    assert!(b < a && a < other);
    let [a, b, other] = order("-rejected");
    assert!(a < b && b < other);
    let [a, b, other] = order("allowed");
    assert!(a < b && b < other);
    let [a, b, other] = order("rate");
    assert!(b < a && a < other);
}

#[test]
fn rows_filter_the_page_and_keep_the_range() {
    let query = Query::read("?range=7d&sort=-rate");
    let table = group_table(
        &usage(&[group("<b>A</b>", 1, 9, false)]),
        &query,
        false,
        1_795_667_400_000,
    )
    .to_string();
    assert!(table.contains("href=\"/console/usage?range=7d&amp;key_id=019ab4e1-7c00-7000-8000-000000000001&amp;group=endpoint\""), "{table}");
    assert!(
        table.contains("&lt;b&gt;A&lt;/b&gt;") && !table.contains("<b>"),
        "{table}"
    );
    assert!(
        table.contains(">90.0%<") && table.contains(">30 minutes ago<"),
        "{table}"
    );
    assert!(table.contains("aria-sort=\"descending\""));
}

#[test]
fn cost_takes_the_place_of_requests() {
    let table = group_table(
        &usage(&[group("A", 10, 3, false)]),
        &Query::default(),
        true,
        0,
    )
    .to_string();
    assert!(table.contains(">20<") && table.contains(">6<"), "{table}");
}

#[test]
fn export_has_a_row_for_each_bucket() {
    let file = usage_csv(&usage(&[]));
    assert_eq!(
        file,
        "start,allowed,rejected,allowed_cost,rejected_cost\r\n2026-11-25T05:00:00.000Z,5,1,7,2\r\n"
    );
}
