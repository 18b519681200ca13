//! A key's usage: its limits, the requests of the last day, and the latest decisions.

use std::time::Duration;

use leptos::prelude::*;
use quota_common::{
    ApiKeyId,
    api_key::ApiKey,
    call::{DecisionFilter, PageOf},
    decision::{Decision, DecisionPage},
    usage::{KeyLimits, Usage},
};

use super::{
    live_tail::LiveTail,
    usage::usage_of_key,
    usage_data::{bars, load_day},
};
use crate::{
    api::{self, CallResult, PendingCall},
    clock::now,
    component::{Async, Chart, ChartState, Loader, StaleNote, load, local_time, refresh_regularly},
    model::{
        decision::{decision_table, no_decisions},
        limits::limit_meters,
    },
    reactive::text_memo,
    session::session,
};

const DECISIONS: u32 = 10;
/// How often to update the meters as the burst refills.
const SECOND: Duration = Duration::from_secs(1);

/// The limits, and the time when they were loaded, in milliseconds since the Unix epoch.
pub type LoadedLimits = (KeyLimits, i64);

/// The requests of the last day and the latest decisions. They are loaded together, so that the chart and the list
/// match.
#[derive(Clone)]
pub struct Activity {
    /// Usage in the last 24 hours.
    day: Usage,
    decisions: DecisionPage,
}

#[derive(Clone, Copy)]
pub struct KeyUsage {
    pub limits: Loader<LoadedLimits>,
    activity: Loader<Activity>,
}

async fn load_activity(id: ApiKeyId, zone: String) -> CallResult<Activity> {
    let filter = DecisionFilter {
        key_id: Some(id),
        ..DecisionFilter::default()
    };
    let page = PageOf {
        limit: Some(DECISIONS),
        cursor: None,
    };
    Ok(Activity {
        day: load_day(Some(id), zone).await?,
        decisions: api::list_decisions(filter, page).await?,
    })
}

impl KeyUsage {
    pub fn load(id: ApiKeyId) -> Self {
        let session = session();
        let zone = text_memo(move || session.time_zone());
        let limits = move || async move { Ok((api::key_limits(id).await?, now())) };
        let usage = Self {
            limits: load(move || Box::pin(limits()) as PendingCall<_>),
            activity: load(move || Box::pin(load_activity(id, zone.get())) as PendingCall<_>),
        };
        refresh_regularly(usage.limits);
        refresh_regularly(usage.activity);
        usage
    }

    pub fn retry(self) {
        self.limits.retry();
        self.activity.retry();
    }

    /// Reloads a few times, because the server can take a few seconds to record the requests that have just been sent.
    pub fn reload_after_requests(self) {
        // The limits usually reflect the requests immediately.
        self.limits.refresh();
        self.limits.reload_after_requests();
        self.activity.reload_after_requests();
    }
}

/// Shows a meter for each limit of the key.
#[component]
pub fn LimitMeters(limits: Loader<LoadedLimits>) -> impl IntoView {
    let clock = RwSignal::new(now());
    let timer = set_interval_with_handle(move || clock.set(now()), SECOND);
    on_cleanup(move || {
        if let Ok(timer) = timer {
            timer.clear();
        }
    });
    let show = move |(it, loaded_at): LoadedLimits| {
        let meters =
            text_memo(move || limit_meters(&it, loaded_at, clock.get().max(loaded_at)).to_string());
        view! { <div class="meters wide" inner_html=move || meters.get()></div> }
    };
    view! { <Async loader=limits what="limits" inside=true show/> }
}

#[component]
pub fn KeyActivity(key: Loader<ApiKey>, id: ApiKeyId, usage: KeyUsage) -> impl IntoView {
    let session = session();
    let zone = text_memo(move || session.time_zone());
    let state = ChartState::new();
    let live = RwSignal::new(false);
    let show = move |it: Activity| {
        let title = format!("Requests per hour, {}", it.day.time_zone);
        let chart = view! { <Chart bars=bars(&it.day, false) title state/> };
        let requests = it.day.total.allowed + it.day.total.rejected;
        let decisions = if it.decisions.items.is_empty() {
            let text = move || {
                let was_used = key.with(|key| key.last_used_at.is_some());
                no_decisions(requests, was_used == Some(true))
            };
            view! { <p class="muted">{text}</p> }.into_any()
        } else {
            let zone = zone.get();
            let clock = |at: i64| {
                let seconds = at.div_euclid(1000).rem_euclid(60);
                local_time(at, &zone).map_or_else(String::new, |it| it.to_the_second(seconds))
            };
            let rows: Vec<&Decision> = it.decisions.items.iter().collect();
            let table = decision_table(&rows, "Latest decisions, newest first", false, &clock);
            view! { <div inner_html=table.to_string()></div> }.into_any()
        };
        view! {
            <section class="card" aria-labelledby="key-day">
                <div class="card-head">
                    <h2 id="key-day">"Last 24 hours"</h2>
                    <a href=usage_of_key(id)>"View usage"</a>
                </div>
                {chart}
            </section>
            <section class="card" aria-labelledby="key-decisions">
                <div class="card-head">
                    <h2 id="key-decisions">"Latest decisions"</h2>
                    <button type="button" class="button small" data-focus-key="live-tail" on:click=move |_| live.set(true)>"Open live tail"</button>
                </div>
                {decisions}
            </section>
        }
    };
    view! {
        <StaleNote loader=usage.activity/>
        <Async loader=usage.activity what="requests" show/>
        <LiveTail open=live key_id=Signal::derive(move || Some(id)) zone/>
    }
}
