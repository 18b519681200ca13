//! The usage page: requests over time, by key, endpoint, and policy. The URL contains all of the user's choices.

use leptos::prelude::*;
use quota_common::{
    ApiKeyId,
    api_key::ApiKey,
    call::{KeyFilter, PageOf},
    page::{ApiKeyOrder, MAX_LIMIT},
    usage::UsageBucketSize,
};

use super::{
    burn_down::BurnDowns,
    live_tail::LiveTail,
    usage_data::{UsageData, bars, load_usage, peak},
};
use crate::{
    api::{self, PendingCall},
    clock::now,
    component::{
        Async, Chart, ChartState, CodeBlock, EmptyState, ExportButton, PageHeader, Shape,
        StaleNote, browser_time_zone, fixed_options, input_filter, load, local_time,
        refresh_regularly, select_filter, set_filter,
    },
    model::{
        address::Query,
        text::curl,
        usage::{Range, UsageRequest, ZoneChoice, group_table, pair, strip, usage_csv},
    },
    reactive::{flag_memo, text_memo},
    route::{Route, route},
    session::session,
};

const TABS: [(&str, &str); 3] = [
    ("", "By key"),
    ("endpoint", "By endpoint"),
    ("policy", "By policy"),
];
const BUCKETS: [(&str, &str); 3] = [("", "Automatic"), ("hour", "Hours"), ("day", "Days")];
const UNITS: [(&str, &str); 2] = [("", "Requests"), ("cost", "Cost")];

fn zone_name(choice: ZoneChoice, organization: &str) -> String {
    match choice {
        ZoneChoice::Organization => organization.to_owned(),
        ZoneChoice::Utc => "UTC".to_owned(),
        ZoneChoice::Browser => browser_time_zone(),
    }
}

#[component]
pub fn UsagePage() -> impl IntoView {
    let route = route();
    let query = route.query;
    let session = session();
    // Data is loaded only when one of these parameters changes. The parameters are stored as a string, because each
    // memo type adds to the download size.
    let requested = text_memo(move || query.with(UsageRequest::parameters));
    let request = move || UsageRequest::read(&Query::read(&requested.get()));
    let zone = text_memo(move || zone_name(request().zone, &session.time_zone()));
    let loader = load(move || Box::pin(load_usage(request(), zone.get())) as PendingCall<_>);
    refresh_regularly(loader);
    let is_loaded = flag_memo(move || loader.with(|_| ()).is_some());
    let has_data = flag_memo(move || loader.with(Option::is_some) == Some(true));
    let keys = load(|| {
        let filter = KeyFilter {
            sort: Some(ApiKeyOrder::LastUsed),
            ..KeyFilter::default()
        };
        let page = PageOf {
            limit: Some(MAX_LIMIT),
            cursor: None,
        };
        api::list_api_keys(filter, page)
    });
    // Keys are sorted by last use. Until the keys are loaded, it is not known whether any key was used.
    let was_used = Signal::derive(move || {
        keys.with(|page| {
            page.items
                .first()
                .is_some_and(|key| key.last_used_at.is_some())
        })
        .unwrap_or(true)
    });
    let keys = Signal::derive(move || keys.ready().map(|page| page.items).unwrap_or_default());
    let live = RwSignal::new(query.with_untracked(|query| query.get("live")).is_some());
    let export = Callback::new(move |()| {
        let data = untrack(move || loader.ready()).flatten();
        Box::pin(async move {
            let data: UsageData = data.ok_or(api::CallError::Unreadable)?;
            let date =
                |at: quota_common::Timestamp| at.to_string().chars().take(10).collect::<String>();
            let (from, to) = (date(data.usage.from), date(data.usage.to));
            Ok((format!("usage-{from}-{to}.csv"), usage_csv(&data.usage)))
        }) as PendingCall<(String, String)>
    });
    view! {
        <PageHeader title="Usage" about="Allowed requests, and requests rejected by rate limits and quotas, over time.">
            <button type="button" class="button" on:click=move |_| live.set(true)>"Open live tail"</button>
            <ExportButton export disabled=Signal::derive(move || !has_data.get())/>
        </PageHeader>
        <Toolbar keys zone/>
        <StaleNote loader/>
        <Async
            loader
            what="usage"
            show=move |data| match data {
                None => view! {
                    <EmptyState shape=Shape::Search title="Choose a first and last day" about="The last day can't be before the first day. Both days are included."/>
                }
                    .into_any(),
                Some(data) => view! { <Report data was_used/> }.into_any(),
            }
        />
        // If usage cannot be loaded, showing one error is enough.
        {move || {
            let id = request().key_id.filter(|_| is_loaded.get());
            id.map(|id| view! { <BurnDowns id zone/> })
        }}
        <LiveTail open=live key_id=Signal::derive(move || request().key_id) zone/>
    }
}

#[component]
fn Toolbar(keys: Signal<Vec<ApiKey>>, zone: Memo<String>) -> impl IntoView {
    let route = route();
    let query = route.query;
    let get = move |name: &str| query.with(|query| query.get(name)).unwrap_or_default();
    let session = session();
    let key_options = Signal::derive(move || {
        let mut options = vec![(String::new(), "All keys".to_owned())];
        options.extend(
            keys.get()
                .into_iter()
                .map(|key| (key.id.to_string(), key.name)),
        );
        // The selected key may be missing from the list, for example because it was deleted. It then gets its own
        // option.
        let current = get("key_id");
        if !options.iter().any(|(id, _)| *id == current) {
            options.push((current, "Other key".to_owned()));
        }
        options
    });
    let zone_options = Signal::derive(move || {
        [
            ("", format!("{} (organization)", session.time_zone())),
            ("utc", "UTC".to_owned()),
            ("browser", format!("{} (browser)", browser_time_zone())),
        ]
        .map(|(value, text)| (value.to_owned(), text))
        .to_vec()
    });
    let is_custom = flag_memo(move || query.with(UsageRequest::read).range == Range::Custom);
    let set_range = move |value: &str| {
        let mut query = query.get_untracked().with("range", value);
        if value == "custom" {
            // Selects today until the user chooses other days.
            let today = local_time(now(), &zone.get_untracked()).map(|it| it.iso_date());
            let today = today.unwrap_or_default();
            for name in ["from", "to"] {
                if query.get(name).is_none() {
                    query = query.with(name, &today);
                }
            }
        } else {
            query = query.with("from", "").with("to", "");
        }
        route.replace(&format!("/console/usage{query}"));
    };
    view! {
        <search class="filters usage">
            <div class="field">
                <label for="range">"Range"</label>
                <select id="range" on:change=move |ev| set_range(&event_target_value(&ev))>
                    {move || {
                        let current = get("range");
                        Range::ALL
                            .map(|(value, text)| view! { <option value=value prop:selected=value == current>{text}</option> })
                            .into_iter()
                            .collect_view()
                    }}
                </select>
            </div>
            {move || {
                is_custom
                    .get()
                    .then(|| {
                        [
                            input_filter("from", "First day", "date", ""),
                            input_filter("to", "Last day", "date", ""),
                        ]
                            .into_iter()
                            .collect_view()
                    })
            }}
            {select_filter("bucket", "bucket", "Interval", fixed_options(&BUCKETS))}
            {select_filter("count", "count", "Measure", fixed_options(&UNITS))}
            {select_filter("key_id", "key_id", "Key", key_options)}
            {select_filter("tz", "tz", "Time zone", zone_options)}
        </search>
        {move || {
            let endpoint = get("endpoint");
            (!endpoint.is_empty())
                .then(|| {
                    view! {
                        <p class="filter-note">
                            "Endpoint " <code dir="auto">{endpoint}</code> " only. "
                            <button type="button" class="link" on:click=move |_| set_filter(route, "endpoint", "")>"Show all endpoints"</button>
                        </p>
                    }
                })
        }}
    }
}

/// Creates the state of the chart from the URL, and updates the URL when the state changes.
fn chart_state(route: Route) -> ChartState {
    let state = ChartState::new();
    let query = route.query.get_untracked();
    let has = |name: &str, value: &str| query.get(name).as_deref() == Some(value);
    state.table.set(has("view", "table"));
    state.allowed.set(!has("hide", "allowed"));
    state.rejected.set(!has("hide", "rejected"));
    Effect::new(move |previous: Option<()>| {
        let hide = match (state.allowed.get(), state.rejected.get()) {
            (false, true) => "allowed",
            (true, false) => "rejected",
            _ => "",
        };
        let view = if state.table.get() { "table" } else { "" };
        if previous.is_some() {
            let query = route
                .query
                .get_untracked()
                .with("view", view)
                .with("hide", hide);
            route.replace(&format!("/console/usage{query}"));
        }
    });
    state
}

#[component]
fn Report(data: UsageData, was_used: Signal<bool>) -> impl IntoView {
    let route = route();
    let query = route.query;
    let state = chart_state(route);
    let by_cost =
        flag_memo(move || query.with(|query| query.get("count")).as_deref() == Some("cost"));
    if data.usage.total.allowed + data.usage.total.rejected == 0 {
        return view! { <NoRequests was_used/> }.into_any();
    }
    let is_daily = data.usage.bucket == UsageBucketSize::Day;
    let starts: Vec<i64> = data
        .usage
        .buckets
        .iter()
        .map(|it| it.start.inner().timestamp_millis())
        .collect();
    let zone = data.usage.time_zone.clone();
    let zoom = Callback::new(move |at: usize| {
        let day = starts.get(at).and_then(|start| local_time(*start, &zone));
        if let Some(day) = day.map(|day| day.iso_date()) {
            let query = query
                .get_untracked()
                .with("range", "custom")
                .with("from", &day)
                .with("to", &day)
                .with("bucket", "");
            route.go(&format!("/console/usage{query}"));
        }
    });
    let partial = partial_note(&data);
    let UsageData {
        usage,
        before,
        groups,
    } = data;
    let total = usage.total;
    // This is a closure, because it runs again when the user switches between requests and cost.
    let chart = move || {
        let by_cost = by_cost.get();
        let bars = bars(&usage, by_cost);
        let (name, unit) = if is_daily {
            ("Busiest day", "day")
        } else {
            ("Busiest hour", "hour")
        };
        let stats = strip(
            pair(&total, by_cost),
            pair(&before, by_cost),
            peak(&bars),
            name,
        )
        .to_string();
        let what = if by_cost { "Cost" } else { "Requests" };
        let title = format!("{what} per {unit}, {}", usage.time_zone);
        let chart = if is_daily {
            view! { <Chart bars title state on_zoom=zoom/> }.into_any()
        } else {
            view! { <Chart bars title state/> }.into_any()
        };
        view! {
            <div inner_html=stats></div>
            <section class="card">
                {partial.clone().map(|text| view! { <p class="muted small-text partial">{text}</p> })}
                {chart}
            </section>
        }
        .into_any()
    };
    let table = text_memo(move || {
        query.with(|query| group_table(&groups, query, by_cost.get(), now()).to_string())
    });
    view! {
        {chart}
        <Tabs/>
        <div inner_html=move || table.get()></div>
    }
    .into_any()
}

/// If recent data is missing, returns a note that says up to which time the data is complete.
fn partial_note(data: &UsageData) -> Option<String> {
    const LATE_MS: i64 = 60_000;
    let complete = data.usage.complete_until.inner().timestamp_millis();
    let end = data.usage.to.inner().timestamp_millis().min(now());
    let at = local_time(complete, &data.usage.time_zone)?;
    (end - complete > LATE_MS).then(|| {
        format!(
            "Data is complete up to {}. Later requests may be missing.",
            at.in_full()
        )
    })
}

#[component]
fn Tabs() -> impl IntoView {
    let query = route().query;
    view! {
        <nav class="tabs" aria-label="Group by">
            {TABS
                .map(|(value, label)| {
                    let href = move || format!("/console/usage{}", query.get().with("group", value).with("sort", ""));
                    let is_current = move || query.with(|query| query.get("group")).unwrap_or_default() == value;
                    view! { <a href=href data-focus-key=format!("tab-{value}") aria-current=move || is_current().then_some("true")>{label}</a> }
                })
                .into_iter()
                .collect_view()}
        </nav>
    }
}

/// The placeholder if there are no requests, or no requests that match the filters.
#[component]
fn NoRequests(was_used: Signal<bool>) -> impl IntoView {
    let query = route().query;
    let is_filtered = query.with_untracked(|query| {
        ["key_id", "endpoint", "range", "from"]
            .iter()
            .any(|name| query.get(name).is_some())
    });
    let command = Signal::derive(|| curl(&api::origin(), "qk_…"));
    move || {
        if is_filtered {
            view! {
                <EmptyState shape=Shape::Search title="No matching requests" about="No requests in this range match the filters.">
                    <a class="button" href="/console/usage">"Clear filters"</a>
                </EmptyState>
            }
            .into_any()
        } else if was_used.get() {
            view! {
                <EmptyState shape=Shape::Usage title="No requests in the last 24 hours" about="Choose a longer range to see earlier requests.">
                    <a class="button" href="/console/usage?range=30d">"Show the last 30 days"</a>
                </EmptyState>
            }
            .into_any()
        } else {
            view! {
                <EmptyState shape=Shape::Usage title="No requests yet" about="Send a request with an API key. Requests appear here within seconds.">
                    <CodeBlock text=command what="curl command"/>
                </EmptyState>
            }
            .into_any()
        }
    }
}

/// Returns the path and query of the usage page for a key.
pub fn usage_of_key(id: ApiKeyId) -> String {
    let query = Query::default()
        .with("key_id", &id.to_string())
        .with("group", "endpoint");
    format!("/console/usage{query}")
}
