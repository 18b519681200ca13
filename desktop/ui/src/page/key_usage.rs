//! A key's usage: the state of its limits, its requests in the last day, and its latest decisions.

use leptos::prelude::*;
use quota_common::{
    ApiKeyId,
    call::{DecisionFilter, PageOf},
    decision::{Decision, DecisionPage},
    limit::{LimitState, PolicyName},
    usage::{KeyLimits, Usage},
};

use super::{
    live_tail::LiveTail,
    usage::usage_of_key,
    usage_data::{bars, load_day},
};
use crate::{
    api::{self, PendingCall},
    clock::now,
    component::{Async, Chart, ChartState, Loader, StaleNote, load, local_time, refresh_regularly},
    model::{
        burn_down::name,
        decision::decision_table,
        markup::Markup,
        meter::Meter,
        text::{number, relative},
    },
    reactive::text_memo,
    session::session,
};

/// The number of decisions that the page shows.
const DECISIONS: u32 = 10;

/// The usage section of a key's page.
#[derive(Clone, Copy)]
pub struct KeyUsage {
    pub limits: Loader<KeyLimits>,
    day: Loader<Usage>,
    decisions: Loader<DecisionPage>,
}

impl KeyUsage {
    pub fn load(id: ApiKeyId) -> Self {
        let session = session();
        let zone = text_memo(move || session.time_zone());
        let usage = Self {
            limits: load(move || api::key_limits(id)),
            day: load(move || Box::pin(load_day(Some(id), zone.get())) as PendingCall<_>),
            decisions: load(move || {
                let filter = DecisionFilter {
                    key_id: Some(id),
                    ..DecisionFilter::default()
                };
                let page = PageOf {
                    limit: Some(DECISIONS),
                    cursor: None,
                };
                api::list_decisions(filter, page)
            }),
        };
        refresh_regularly(usage.limits);
        refresh_regularly(usage.day);
        refresh_regularly(usage.decisions);
        usage
    }

    /// Reloads until the requests that were just sent are counted.
    pub fn reload_after_requests(self) {
        self.limits.reload_after_requests();
        self.day.reload_after_requests();
        self.decisions.reload_after_requests();
    }
}

/// A bar for each limit of the key.
#[component]
pub fn LimitMeters(limits: Loader<KeyLimits>) -> impl IntoView {
    let show = move |it: KeyLimits| {
        let meters: Markup = it.limits.iter().map(meter).collect();
        view! { <div class="meters wide" inner_html=meters.to_string()></div> }
    };
    view! { <Async loader=limits show/> }
}

fn meter(limit: &LimitState) -> Markup {
    let used = limit.limit.saturating_sub(limit.remaining);
    let text = format!(
        "{} of {} left",
        number(limit.remaining),
        number(limit.limit)
    );
    let reset = relative(limit.reset_at.inner().timestamp_millis(), now());
    let is_rate = limit.policy == PolicyName::Rpm;
    let note = match used {
        0 => "None used".to_owned(),
        _ if is_rate => format!("Full again {reset}"),
        _ => format!("Resets {reset}"),
    };
    let meter = Meter {
        label: if is_rate { "Burst" } else { name(limit.policy) },
        used,
        limit: limit.limit,
        text: &text,
        note: &note,
        denied: false,
    };
    meter.markup()
}

#[component]
pub fn KeyActivity(id: ApiKeyId, usage: KeyUsage) -> impl IntoView {
    let session = session();
    let zone = text_memo(move || session.time_zone());
    let state = ChartState::new();
    let live = RwSignal::new(false);
    let chart = move |day: Usage| {
        let title = format!("Requests per hour, {}", day.time_zone);
        view! { <Chart bars=bars(&day, false) title state/> }
    };
    let decisions = move |page: DecisionPage| {
        if page.items.is_empty() {
            return view! { <p class="muted">"No requests yet."</p> }.into_any();
        }
        let zone = zone.get();
        let clock = |at: i64| local_time(at, &zone).map_or_else(String::new, |it| it.in_full());
        let rows: Vec<&Decision> = page.items.iter().collect();
        let table = decision_table(&rows, "Latest decisions, newest first", false, &clock);
        view! { <div inner_html=table.to_string()></div> }.into_any()
    };
    view! {
        <section class="card" aria-labelledby="key-day">
            <div class="card-head">
                <h2 id="key-day">"Last 24 hours"</h2>
                <a href=usage_of_key(id)>"Open usage"</a>
            </div>
            <StaleNote loader=usage.day/>
            <Async loader=usage.day show=chart/>
        </section>
        <section class="card" aria-labelledby="key-decisions">
            <div class="card-head">
                <h2 id="key-decisions">"Latest decisions"</h2>
                <button type="button" class="button small" on:click=move |_| live.set(true)>"Live tail"</button>
            </div>
            <Async loader=usage.decisions show=decisions/>
        </section>
        <LiveTail open=live key_id=Signal::derive(move || Some(id)) zone/>
    }
}
