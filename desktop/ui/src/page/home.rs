//! Home: current activity, keys that need attention, and the first steps for new users.

use std::fmt::Write as _;

use leptos::prelude::*;
use quota_common::{
    ApiKeyId, Page,
    api_key::ApiKey,
    call::{KeyFilter, PageOf, UsageFilter},
    page::{ApiKeyOrder, MAX_LIMIT},
    service_token::ServiceToken,
    usage::{Attention, AttentionKind, Stats, Usage, UsageGroupBy},
};

use super::{
    create_button::can_create,
    usage_data::{bars, load_day},
};
use crate::{
    api::{self, CallResult, PendingCall},
    clock::now,
    component::{Async, Chart, ChartState, PageHeader, StaleNote, load, refresh_regularly},
    model::{
        attention::{all_clear, is_rejection_rate_high, rejection_rate, used_percent},
        burn_down,
        chart::{percent, sparkline},
        markup::{Markup, element, with_text},
        text::{count, number, relative},
        usage::{Pair, group_name, pair, stat, today},
    },
    reactive::text_memo,
    session::session,
};

#[derive(Clone)]
struct Overview {
    stats: Stats,
    /// Usage in the last 24 hours.
    day: Usage,
    /// Usage in the last 24 hours, grouped by key.
    keys: Usage,
    /// `None` if the user's role cannot view keys and tokens.
    setup: Option<Setup>,
}

/// The data that determines which of the first steps are done.
#[derive(Clone)]
struct Setup {
    /// The most recently used key or, if no key has been used, the newest key.
    key: Option<ApiKey>,
    tokens: Page<ServiceToken>,
}

impl Overview {
    /// Returns whether any request has been made in the last day, or at any time with a key that still exists. Also
    /// returns `true` if the user's role cannot view keys.
    fn has_requests(&self) -> bool {
        let Some(setup) = &self.setup else {
            return true;
        };
        let was_used = |key: &ApiKey| key.last_used_at.is_some();
        pair(&self.day.total, false).total() > 0 || setup.key.as_ref().is_some_and(was_used)
    }
}

async fn load_overview(zone: String, can_read: bool) -> CallResult<Overview> {
    let filter = KeyFilter {
        sort: Some(ApiKeyOrder::LastUsed),
        ..KeyFilter::default()
    };
    let page = |limit| PageOf {
        limit: Some(limit),
        cursor: None,
    };
    let stats = api::stats().await?;
    let day = load_day(None, zone.clone()).await?;
    let keys = api::usage(UsageFilter {
        from: Some(day.from),
        to: Some(day.to),
        bucket: Some(day.bucket),
        tz: Some(zone),
        group_by: Some(UsageGroupBy::Key),
        ..UsageFilter::default()
    });
    let keys = keys.await?;
    let setup = if can_read {
        let newest = api::list_api_keys(filter, page(1)).await?;
        Some(Setup {
            key: newest.items.into_iter().next(),
            tokens: api::list_service_tokens(page(MAX_LIMIT)).await?,
        })
    } else {
        None
    };
    Ok(Overview {
        stats,
        day,
        keys,
        setup,
    })
}

#[component]
pub fn Home() -> impl IntoView {
    let session = session();
    let zone = text_memo(move || session.time_zone());
    let can_read = untrack(move || session.can_read());
    let loader = load(move || Box::pin(load_overview(zone.get(), can_read)) as PendingCall<_>);
    refresh_regularly(loader);
    // The chart's state is outside the loaded data, so that reloading the data does not reset the chart.
    let state = ChartState::new();
    let is_open = RwSignal::new(None::<bool>);
    view! {
        <PageHeader title="Home"/>
        <StaleNote loader/>
        <Async loader what="activity" show=move |it| view! { <Dashboard it state is_open/> }/>
    }
}

#[component]
fn Dashboard(it: Overview, state: ChartState, is_open: RwSignal<Option<bool>>) -> impl IntoView {
    let has_requests = it.has_requests();
    let steps = can_create().then(|| first_steps(&it)).flatten();
    let steps = steps.map(|steps| view! { <GetStarted steps is_open/> });
    let (steps_above, steps_below) = if has_requests {
        (None, steps)
    } else {
        (steps, None)
    };
    let chart = bars(&it.day, false);
    let title = format!("Requests per hour, {}", it.day.time_zone);
    let hours: Vec<u64> = chart.iter().map(|bar| bar.allowed + bar.rejected).collect();
    let today = today(&it.stats, &it.day);
    let cards = cards(&it, today, &hours).to_string();
    let lists = lists(&it).to_string();
    view! {
        {steps_above}
        <div inner_html=cards></div>
        {has_requests
            .then(|| {
                view! {
                    <section class="card" aria-labelledby="last-day">
                        <div class="card-head">
                            <h2 id="last-day">"Last 24 hours"</h2>
                            <a href="/console/usage">"View usage"</a>
                        </div>
                        <Chart bars=chart title state/>
                    </section>
                    <div class="columns" inner_html=lists></div>
                    {steps_below}
                }
            })}
    }
}

/// Compares the number of requests since midnight with yesterday's number up to the same time of day.
fn since_yesterday(now: u64, before: u64) -> String {
    if now == before && now > 0 {
        return "Same as this time yesterday".to_owned();
    }
    let sign = if now > before { '+' } else { '−' };
    match percent(now.abs_diff(before), before) {
        Some(text) => format!("{sign}{text} vs. this time yesterday"),
        None => "None by this time yesterday".to_owned(),
    }
}

/// Returns the address of a key's page, or an empty string if the user's role cannot view keys.
fn key_address(it: &Overview, id: ApiKeyId) -> String {
    if it.setup.is_some() {
        format!("/console/api-keys/{id}")
    } else {
        String::new()
    }
}

fn cards(it: &Overview, today: Pair, hours: &[u64]) -> Markup {
    let stats = &it.stats;
    let rejected = percent(today.rejected, today.total()).map_or_else(
        || "No requests today".to_owned(),
        |rate| format!("{rate} of requests"),
    );
    let idle = match stats.unused_keys {
        0 => String::new(),
        n => format!(", {} never used", number(n)),
    };
    let closest = match &stats.closest_to_limit {
        Some(quota) => {
            let share = used_percent(quota.used, quota.limit);
            let reset = relative(quota.reset_at.inner().timestamp_millis(), now());
            let note = format!(
                "{}, {} of {} used {}, resets {reset}",
                quota.key_name,
                number(quota.used),
                number(quota.limit),
                if matches!(quota.policy, quota_common::limit::PolicyName::Daily) {
                    "today"
                } else {
                    "this month"
                },
            );
            let href = key_address(it, quota.key_id);
            stat("Closest to limit", &format!("{share}%"), &note, &href)
        }
        None => stat("Closest to limit", "–", "No quotas in use", ""),
    };
    let spark = if hours.iter().any(|requests| *requests > 0) {
        element("span", &[("class", "spark")], &[sparkline(hours)])
    } else {
        Markup::default()
    };
    let requests = element(
        "a",
        &[("class", "stat card"), ("href", "/console/usage")],
        &[
            with_text("span", &[("class", "muted")], "Requests today"),
            with_text("strong", &[], &number(today.total())),
            with_text(
                "span",
                &[("class", "muted small-text")],
                &since_yesterday(today.total(), stats.requests_yesterday),
            ),
            spark,
        ],
    );
    let all = [
        requests,
        stat(
            "Rejected today",
            &number(today.rejected),
            &rejected,
            "/console/usage?group=policy&hide=allowed",
        ),
        stat(
            "Active keys",
            &number(stats.active_keys),
            &format!("of {}{idle}", number(stats.total_keys)),
            it.setup.as_ref().map_or("", |_| "/console/api-keys"),
        ),
        closest,
    ];
    element("div", &[("class", "stats")], &all)
}

fn attention_text(it: &Attention) -> String {
    let at = relative(it.at.inner().timestamp_millis(), now());
    match it.kind {
        AttentionKind::Quota => {
            let share = used_percent(it.used.unwrap_or_default(), it.limit.unwrap_or_default());
            let policy = it
                .policy
                .map_or("quota", burn_down::name)
                .to_ascii_lowercase();
            format!("{share}% of the {policy} used, resets {at}")
        }
        AttentionKind::Expiring => format!("Expires {at}"),
        AttentionKind::GraceEnding => format!("Previous secret stops working {at}"),
        // Does not show `at`, because it is the time of the key's creation if the key was never used.
        AttentionKind::Idle => "No requests in the last 30 days".to_owned(),
    }
}

/// Returns the *Needs attention* and *Top keys* lists.
fn lists(it: &Overview) -> Markup {
    let (stats, requests) = (&it.stats, pair(&it.day.total, false));
    let row = |href: &str, name: &str, note: &str, class: &str| {
        let name = with_text("span", &[("class", "clamp"), ("dir", "auto")], name);
        let name = if href.is_empty() {
            name
        } else {
            element("a", &[("href", href)], &[name])
        };
        let note = with_text("span", &[("class", class)], note);
        element("li", &[], &[name, note])
    };
    let rejections = is_rejection_rate_high(requests).then(|| {
        let href = "/console/usage?group=policy&hide=allowed";
        let note = rejection_rate(requests);
        row(href, "Rejected requests", &note, "note near")
    });
    let attention = stats.attention.iter();
    let attention = attention.map(|about| {
        let class = match about.kind {
            AttentionKind::Quota if about.used >= about.limit => "note full",
            AttentionKind::Quota | AttentionKind::Expiring | AttentionKind::GraceEnding => {
                "note near"
            }
            AttentionKind::Idle => "note",
        };
        let href = key_address(it, about.key_id);
        row(&href, &about.key_name, &attention_text(about), class)
    });
    let attention: Vec<Markup> = rejections.into_iter().chain(attention).collect();
    let top: Vec<Markup> = it
        .keys
        .groups
        .iter()
        .filter(|group| !group.other)
        .take(5)
        .map(|group| {
            let requests = group.allowed + group.rejected;
            let mut note = count(requests, "request", "requests");
            if group.rejected > 0 {
                let _ = write!(note, ", {} rejected", number(group.rejected));
            }
            let href = match group.key_id {
                Some(id) if group.name.is_some() => {
                    format!("/console/usage?key_id={id}&group=endpoint")
                }
                _ => String::new(),
            };
            row(&href, &group_name(group), &note, "note")
        })
        .collect();
    let card = |title: &str, rows: Vec<Markup>, none: &str| {
        let list = if rows.is_empty() {
            with_text("p", &[("class", "muted")], none)
        } else {
            element("ul", &[("class", "rows")], &rows)
        };
        element(
            "section",
            &[("class", "card")],
            &[with_text("h2", &[], title), list],
        )
    };
    [
        card("Needs attention", attention, &all_clear(requests)),
        card(
            "Top keys, last 24 hours",
            top,
            "No requests in the last 24 hours.",
        ),
    ]
    .into_iter()
    .collect()
}

/// Returns one of the first steps. The step has a link if `is_available` is true and the step is not done.
fn step(
    done: bool,
    is_available: bool,
    title: &str,
    about: &str,
    href: &str,
    action: &str,
) -> Markup {
    let check = element("path", &[("d", "M5 12.5l4.5 4.5L19 7.5")], &[]);
    let check = element(
        "svg",
        &[
            ("class", "icon"),
            ("viewBox", "0 0 24 24"),
            ("aria-hidden", "true"),
        ],
        &[check],
    );
    let none = Markup::default;
    let title = [
        Markup::text(title),
        if done {
            with_text("span", &[("class", "visually-hidden")], " (done)")
        } else {
            none()
        },
    ];
    let parts = [
        element(
            "span",
            &[("class", "tick")],
            &[if done { check } else { none() }],
        ),
        element(
            "div",
            &[],
            &[
                element("h3", &[], &title),
                with_text("p", &[("class", "muted")], about),
            ],
        ),
        if is_available && !done {
            with_text("a", &[("class", "button small"), ("href", href)], action)
        } else {
            none()
        },
    ];
    element(
        "li",
        &[("class", if done { "step done" } else { "step" })],
        &parts,
    )
}

/// The first steps, and how many of them are done.
struct Steps {
    list: Markup,
    done: usize,
    has_request: bool,
}

fn first_steps(it: &Overview) -> Option<Steps> {
    let setup = it.setup.as_ref()?;
    let key_page = setup.key.as_ref().map_or_else(
        || "/console/api-keys".to_owned(),
        |key| format!("/console/api-keys/{}", key.id),
    );
    let has_plan = it.stats.total_plans > 0;
    let has_key = it.stats.total_keys > 0;
    let has_request = it.has_requests();
    let has_gateway = setup
        .tokens
        .items
        .iter()
        .any(|token| token.last_used_at.is_some());
    let done = [has_plan, has_key, has_request, has_gateway]
        .iter()
        .filter(|it| **it)
        .count();
    let steps = [
        step(
            has_plan,
            true,
            "Create a plan",
            "Set a rate limit and, optionally, daily and monthly quotas.",
            "/console/plans?new=1",
            "Create plan",
        ),
        step(
            has_key,
            has_plan,
            "Create an API key",
            "The key is shown once. Clients send it in X-API-Key.",
            "/console/api-keys?new=1",
            "Create key",
        ),
        step(
            has_request,
            has_key,
            "Send a request",
            "Try the key here or with curl. We'll detect your first request.",
            &key_page,
            "Try it",
        ),
        step(
            has_gateway,
            has_key,
            "Put Quota in front of your API",
            "Create a service token and let your gateway or middleware check each request.",
            "/console/service-tokens?new=1",
            "Create token",
        ),
    ];
    Some(Steps {
        list: steps.into_iter().collect(),
        done,
        has_request,
    })
}

/// The first steps. By default, they are expanded until a request has been sent, and collapsed after that.
#[component]
fn GetStarted(steps: Steps, is_open: RwSignal<Option<bool>>) -> impl IntoView {
    let Steps {
        list,
        done,
        has_request,
    } = steps;
    let open = move || is_open.get().unwrap_or(!has_request);
    view! {
        <section class="card get-started" aria-labelledby="get-started">
            <div class="card-head">
                <h2 id="get-started">"Get started"</h2>
                <button
                    type="button"
                    class="button small"
                    data-focus-key="get-started"
                    aria-expanded=move || open().to_string()
                    on:click=move |_| is_open.set(Some(!untrack(open)))
                >
                    {format!("{done} of 4 done")}
                </button>
            </div>
            <ol class="steps" hidden=move || !open() inner_html=list.to_string()></ol>
        </section>
    }
}
