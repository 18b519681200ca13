//! The query parameters of the usage page, and usage as text and tables.

use std::cmp::Reverse;

use quota_common::{
    ApiKeyId,
    usage::{Stats, Usage, UsageBucketSize, UsageCounts, UsageGroup, UsageGroupBy},
};

use super::{
    address::Query,
    chart::percent,
    csv::csv,
    markup::{Markup, element, with_text},
    policy::policy_label,
    text::{number, relative},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Range {
    Day,
    Week,
    Month,
    /// The days between two given dates, inclusive.
    Custom,
}

impl Range {
    pub const ALL: [(&'static str, &'static str); 4] = [
        ("", "Last 24 hours"),
        ("7d", "Last 7 days"),
        ("30d", "Last 30 days"),
        ("custom", "Custom"),
    ];

    fn of(text: Option<&str>) -> Self {
        match text {
            Some("7d") => Self::Week,
            Some("30d") => Self::Month,
            Some("custom") => Self::Custom,
            _ => Self::Day,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZoneChoice {
    Organization,
    Utc,
    Browser,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsageRequest {
    pub range: Range,
    /// The first and the last day. Used with [`Range::Custom`].
    pub dates: (String, String),
    /// `None` selects hours for ranges of up to three days, and days for longer ranges.
    pub bucket: Option<UsageBucketSize>,
    pub key_id: Option<ApiKeyId>,
    pub endpoint: Option<String>,
    pub zone: ZoneChoice,
    pub group_by: UsageGroupBy,
}

impl UsageRequest {
    /// Returns only the parameters that determine which data to load.
    pub fn parameters(query: &Query) -> String {
        let names = [
            "range", "from", "to", "bucket", "key_id", "endpoint", "tz", "group",
        ];
        let all = names.iter().fold(Query::default(), |all, name| {
            all.with(name, &query.get(name).unwrap_or_default())
        });
        all.to_string()
    }

    pub fn read(query: &Query) -> Self {
        let get = |name: &str| query.get(name);
        Self {
            range: Range::of(get("range").as_deref()),
            dates: (
                get("from").unwrap_or_default(),
                get("to").unwrap_or_default(),
            ),
            bucket: get("bucket").and_then(|it| UsageBucketSize::of(&it)),
            key_id: get("key_id").and_then(|it| it.parse().ok()),
            endpoint: get("endpoint"),
            zone: match get("tz").as_deref() {
                Some("utc") => ZoneChoice::Utc,
                Some("browser") => ZoneChoice::Browser,
                _ => ZoneChoice::Organization,
            },
            group_by: match get("group").as_deref() {
                Some("endpoint") => UsageGroupBy::Endpoint,
                Some("policy") => UsageGroupBy::Policy,
                _ => UsageGroupBy::Key,
            },
        }
    }
}

/// The allowed and rejected amounts, in requests or cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pair {
    pub allowed: u64,
    pub rejected: u64,
}

impl Pair {
    pub const fn total(self) -> u64 {
        self.allowed.saturating_add(self.rejected)
    }
}

pub const fn pair(counts: &UsageCounts, by_cost: bool) -> Pair {
    if by_cost {
        Pair {
            allowed: counts.allowed_cost,
            rejected: counts.rejected_cost,
        }
    } else {
        Pair {
            allowed: counts.allowed,
            rejected: counts.rejected,
        }
    }
}

const fn group_pair(group: &UsageGroup, by_cost: bool) -> Pair {
    let counts = UsageCounts {
        allowed: group.allowed,
        rejected: group.rejected,
        allowed_cost: group.allowed_cost,
        rejected_cost: group.rejected_cost,
    };
    pair(&counts, by_cost)
}

/// Returns the requests since midnight. Uses the larger of two counts. The count in `day` may be newer than the count
/// in `stats`. However, `day` contains only the last 24 hours, which start after midnight if the clocks were set back
/// today.
pub fn today(stats: &Stats, day: &Usage) -> Pair {
    let buckets = day.buckets.iter().filter(|it| it.start >= stats.today);
    let (allowed, rejected) = buckets.fold((0, 0), |(allowed, rejected), it| {
        (allowed + it.allowed, rejected + it.rejected)
    });
    let counted = Pair { allowed, rejected };
    let stated = Pair {
        allowed: stats.requests_today.saturating_sub(stats.rejected_today),
        rejected: stats.rejected_today,
    };
    if counted.total() > stated.total() {
        counted
    } else {
        stated
    }
}

/// Returns the change since the previous period, such as `+12.5% vs. previous period`.
pub fn change(now: u64, before: u64) -> String {
    if now == before {
        return "Same as the previous period".to_owned();
    }
    let sign = if now > before { '+' } else { '−' };
    match percent(now.abs_diff(before), before) {
        Some(text) => format!("{sign}{text} vs. previous period"),
        None => "None in the previous period".to_owned(),
    }
}

/// Returns a number with a label above it and a note below it.
pub fn stat(label: &str, value: &str, note: &str, href: &str) -> Markup {
    let tag = if href.is_empty() { "div" } else { "a" };
    let parts = [
        with_text("span", &[("class", "muted")], label),
        with_text("strong", &[], value),
        with_text("span", &[("class", "muted small-text")], note),
    ];
    element(tag, &[("class", "stat card"), ("href", href)], &parts)
}

/// Returns the numbers above the chart: allowed requests, rejected requests, rejection rate, and the busiest hour or
/// day.
pub fn strip(now: Pair, before: Pair, peak: Option<(String, u64)>, peak_name: &str) -> Markup {
    let rate = |pair: Pair| percent(pair.rejected, pair.total());
    let rate_before = rate(before).map_or_else(
        || "No requests in the previous period".to_owned(),
        |rate| format!("{rate} in the previous period"),
    );
    let (peak_time, peak_count) = match peak {
        Some((time, count)) => (time, number(count)),
        None => ("No requests".to_owned(), "–".to_owned()),
    };
    let stats = [
        stat(
            "Allowed",
            &number(now.allowed),
            &change(now.allowed, before.allowed),
            "",
        ),
        stat(
            "Rejected",
            &number(now.rejected),
            &change(now.rejected, before.rejected),
            "",
        ),
        stat(
            "Rejection rate",
            &rate(now).unwrap_or_else(|| "–".to_owned()),
            &rate_before,
            "",
        ),
        stat(peak_name, &peak_count, &peak_time, ""),
    ];
    element("div", &[("class", "stats")], &stats)
}

pub fn group_name(group: &UsageGroup) -> String {
    if group.other {
        return "Other".to_owned();
    }
    match (&group.name, &group.endpoint, &group.policy) {
        (Some(name), ..) => name.clone(),
        (None, Some(endpoint), _) if endpoint.is_empty() => "(no endpoint)".to_owned(),
        (None, Some(endpoint), _) => endpoint.clone(),
        (None, None, Some(policy)) => policy_label(policy).to_owned(),
        (None, None, None) => "(deleted)".to_owned(),
    }
}

/// The sortable columns of a table of groups.
const COLUMNS: [(&str, &str); 4] = [
    ("allowed", "Allowed"),
    ("rejected", "Rejected"),
    ("rate", "Rejection rate"),
    ("last", "Last seen"),
];

/// Sorts groups by a column, or by their totals if `sort` is empty. `Other` always comes last.
fn sort_groups(groups: &mut [UsageGroup], sort: &str, by_cost: bool) {
    let (column, ascending) = match sort.strip_prefix('-') {
        Some(column) => (column, false),
        None => (sort, !sort.is_empty()),
    };
    let key = |group: &UsageGroup| {
        let pair = group_pair(group, by_cost);
        match column {
            "allowed" => pair.allowed,
            "rejected" => pair.rejected,
            "rate" => u64::try_from(
                u128::from(pair.rejected) * 1_000_000 / u128::from(pair.total().max(1)),
            )
            .unwrap_or(u64::MAX),
            "last" => group
                .last_seen_at
                .map_or(0, |at| at.inner().timestamp_millis().unsigned_abs()),
            _ => pair.total(),
        }
    };
    if ascending {
        groups.sort_by_key(|group| (group.other, key(group)));
    } else {
        groups.sort_by_key(|group| (group.other, Reverse(key(group))));
    }
}

/// Returns the groups as a table. A group's name is a link if the page can be filtered by the group.
pub fn group_table(usage: &Usage, query: &Query, by_cost: bool, now: i64) -> Markup {
    let group_by = usage.group_by.unwrap_or(UsageGroupBy::Key);
    let sort = query.get("sort").unwrap_or_default();
    let mut groups = usage.groups.clone();
    sort_groups(&mut groups, &sort, by_cost);
    let is_policy = group_by == UsageGroupBy::Policy;
    let name = match group_by {
        UsageGroupBy::Key => "Key",
        UsageGroupBy::Endpoint => "Endpoint",
        UsageGroupBy::Policy => "Denied by",
        UsageGroupBy::Plan => "Plan",
    };
    // Policy groups contain only rejected requests.
    let columns = COLUMNS
        .into_iter()
        .filter(|(id, _)| !is_policy || matches!(*id, "rejected" | "last"));
    let mut head = vec![
        with_text("th", &[("scope", "col")], name),
        with_text("th", &[("scope", "col"), ("class", "share")], "Share"),
    ];
    head.extend(columns.map(|(id, label)| sort_head(id, label, &sort, query)));
    let highest = groups
        .iter()
        .map(|it| group_pair(it, by_cost).total())
        .max();
    let rows: Markup = groups
        .iter()
        .map(|group| {
            let pair = group_pair(group, by_cost);
            let mut cells = vec![
                element(
                    "th",
                    &[("scope", "row"), ("dir", "auto")],
                    &[group_link(group, query)],
                ),
                element(
                    "td",
                    &[("class", "share"), ("data-label", "Share")],
                    &[share_bar(pair, highest.unwrap_or(0))],
                ),
            ];
            let mut cell = |label: &str, text: &str| {
                cells.push(with_text(
                    "td",
                    &[("class", "num"), ("data-label", label)],
                    text,
                ));
            };
            if !is_policy {
                cell("Allowed", &number(pair.allowed));
            }
            cell("Rejected", &number(pair.rejected));
            if !is_policy {
                cell(
                    "Rejection rate",
                    &percent(pair.rejected, pair.total()).unwrap_or_else(|| "–".to_owned()),
                );
            }
            let last = group
                .last_seen_at
                .map(|at| relative(at.inner().timestamp_millis(), now));
            cell("Last seen", &last.unwrap_or_else(|| "–".to_owned()));
            element("tr", &[], &cells)
        })
        .collect();
    let caption = format!("Usage by {}", name.to_ascii_lowercase());
    let parts = [
        with_text("caption", &[("class", "visually-hidden")], &caption),
        element("thead", &[], &[element("tr", &[], &head)]),
        element("tbody", &[], &[rows]),
    ];
    element("table", &[("class", "table data groups")], &parts)
}

fn sort_head(id: &str, label: &str, sort: &str, query: &Query) -> Markup {
    let descending = format!("-{id}");
    let (direction, next, arrow) = match sort {
        it if it == id => ("ascending", descending.as_str(), "↑"),
        it if it == descending => ("descending", id, "↓"),
        _ => ("", descending.as_str(), "↕"),
    };
    let href = format!("/console/usage{}", query.clone().with("sort", next));
    let key = format!("sort-{id}");
    let arrow = with_text(
        "span",
        &[("class", "arrow"), ("aria-hidden", "true")],
        arrow,
    );
    let link = element(
        "a",
        &[("class", "sort"), ("data-focus-key", &key), ("href", &href)],
        &[Markup::text(label), arrow],
    );
    element(
        "th",
        &[("scope", "col"), ("class", "num"), ("aria-sort", direction)],
        &[link],
    )
}

/// Returns the name of a group, as a link if the page can be filtered by the group.
fn group_link(group: &UsageGroup, query: &Query) -> Markup {
    let name = group_name(group);
    let filter = match (group.key_id, &group.endpoint) {
        _ if group.other => None,
        (Some(id), _) => Some(("key_id", id.to_string(), "endpoint")),
        (None, Some(endpoint)) if !endpoint.is_empty() => Some(("endpoint", endpoint.clone(), "")),
        _ => None,
    };
    let text = with_text("span", &[("class", "clamp")], &name);
    match filter {
        Some((parameter, value, next_group)) => {
            let mut query = query.clone().with(parameter, &value).with("sort", "");
            if !next_group.is_empty() {
                // Switch to a grouping that makes sense for a single key.
                query = query.with("group", next_group);
            }
            let key = format!("group-{value}");
            let href = format!("/console/usage{query}");
            element("a", &[("href", &href), ("data-focus-key", &key)], &[text])
        }
        None => text,
    }
}

fn share_bar(pair: Pair, highest: u64) -> Markup {
    let width = |n: u64| {
        let thousandths = u128::from(n) * 100_000 / u128::from(highest.max(1));
        format!("{}.{:03}%", thousandths / 1000, thousandths % 1000)
    };
    let (allowed, rejected) = (width(pair.allowed), width(pair.rejected));
    let bars = [
        element(
            "rect",
            &[("class", "allowed"), ("width", &allowed), ("height", "8")],
            &[],
        ),
        element(
            "rect",
            &[
                ("class", "rejected-solid"),
                ("x", &allowed),
                ("width", &rejected),
                ("height", "8"),
            ],
            &[],
        ),
    ];
    element(
        "svg",
        &[("width", "100%"), ("height", "8"), ("aria-hidden", "true")],
        &bars,
    )
}

pub fn usage_csv(usage: &Usage) -> String {
    let header = [
        "start",
        "allowed",
        "rejected",
        "allowed_cost",
        "rejected_cost",
    ];
    let rows = usage.buckets.iter().map(|it| {
        let counts = [it.allowed, it.rejected, it.allowed_cost, it.rejected_cost];
        std::iter::once(it.start.to_string())
            .chain(counts.iter().map(u64::to_string))
            .collect()
    });
    csv(std::iter::once(header.map(str::to_owned).to_vec()).chain(rows))
}

#[cfg(test)]
mod tests;
