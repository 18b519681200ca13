//! A live list of decisions.

use std::time::Duration;

use leptos::{ev::Event, html, prelude::*, task::spawn_local};
use quota_common::{
    ApiKeyId,
    call::{DecisionFilter, PageOf},
    decision::{Decision, DecisionOutcome},
    page::MAX_LIMIT,
};

use crate::{
    api::{self, CallError, CallResult},
    component::{Alert, EmptyState, Modal, Shape, local_time},
    host,
    model::decision::{Live, decision_table},
    reactive::{effect, flag_memo, text_memo},
};

/// How often to load new decisions.
const POLL: Duration = Duration::from_millis(1500);
/// The maximum number of pages to load per update. If there are more pages of new decisions, the list has a gap.
const MAX_PAGES: usize = 5;

#[component]
pub fn LiveTail(
    open: RwSignal<bool>,
    #[prop(into)] key_id: Signal<Option<ApiKeyId>>,
    #[prop(into)] zone: Signal<String>,
) -> impl IntoView {
    view! {
        <Modal open panel=true wide=true title="Live tail">
            <Tail open key_id zone/>
        </Modal>
    }
}

/// Loads decisions, newest first, until a page contains a known decision, `MAX_PAGES` pages have been loaded, or no
/// more pages are left. If no decisions are known, loads one page. Returns the new decisions, and whether any decisions
/// are missing between the new and the known ones.
async fn fetch_new(filter: DecisionFilter, live: &Live) -> CallResult<(Vec<Decision>, bool)> {
    let mut new = Vec::new();
    let mut cursor = None;
    let is_first = live.rows.is_empty() && live.waiting.is_empty();
    for _ in 0..MAX_PAGES {
        let page = PageOf {
            limit: Some(MAX_LIMIT),
            cursor,
        };
        let page = api::list_decisions(filter.clone(), page).await?;
        if let Some(count) = live.count_new(&page.items) {
            new.extend(page.items.into_iter().take(count));
            return Ok((new, false));
        }
        new.extend(page.items);
        cursor = page.next_cursor;
        if is_first || cursor.is_none() {
            return Ok((new, false));
        }
    }
    Ok((new, true))
}

#[component]
fn Tail(
    open: RwSignal<bool>,
    key_id: Signal<Option<ApiKeyId>>,
    zone: Signal<String>,
) -> impl IntoView {
    let outcome = RwSignal::new(String::new());
    let endpoint = RwSignal::new(String::new());
    let request_id = RwSignal::new(String::new());
    let live = RwSignal::new(Live::default());
    let error = RwSignal::new(None::<CallError>);
    let loaded = RwSignal::new(false);
    // The desktop app returns stored decisions while the server is unreachable.
    let offline = RwSignal::new(false);
    let paused = RwSignal::new(false);
    let list = NodeRef::<html::Div>::new();
    let filter = move || {
        let text = |field: RwSignal<String>| {
            Some(field.get().trim().to_owned()).filter(|it| !it.is_empty())
        };
        DecisionFilter {
            key_id: key_id.get(),
            endpoint: text(endpoint),
            outcome: DecisionOutcome::of(&outcome.get()),
            request_id: text(request_id),
        }
    };
    let is_filtered = flag_memo(move || {
        [outcome, endpoint, request_id]
            .iter()
            .any(|field| field.with(|text| !text.trim().is_empty()))
    });
    // Incremented when the filter changes.
    let version = StoredValue::new(0_u32);
    let busy = StoredValue::new(false);
    let poll = move || {
        if document().hidden() || busy.try_get_value() != Some(false) {
            return;
        }
        busy.set_value(true);
        let (asked, asked_version) = (untrack(filter), version.get_value());
        spawn_local(async move {
            let Some(known) = live.try_get_untracked() else {
                return;
            };
            let result = fetch_new(asked, &known).await;
            // The user may have closed the panel or changed the filter.
            if version.try_get_value() != Some(asked_version) {
                return;
            }
            let _ = busy.try_update_value(|busy| *busy = false);
            let _ = loaded.try_set(true);
            let _ = offline.try_set(host::is_offline());
            match result {
                Ok((new, has_gap)) => {
                    let _ = error.try_set(None);
                    let had_gap = live.try_with_untracked(Live::has_gap).unwrap_or_default();
                    if had_gap || !new.is_empty() {
                        let is_paused = paused.try_get_untracked().unwrap_or_default();
                        let _ = live.try_update(|live| live.add(new, has_gap, is_paused));
                    }
                }
                // Don't announce the error again while calls keep failing.
                Err(failure) if error.try_with_untracked(Option::is_none) == Some(true) => {
                    let _ = error.try_set(Some(failure));
                }
                Err(_) => {}
            }
        });
    };
    effect(move || {
        filter();
        version.update_value(|version| *version += 1);
        live.set(Live::default());
        error.set(None);
        loaded.set(false);
        busy.set_value(false);
        poll();
    });
    let timer = set_interval_with_handle(poll, POLL);
    on_cleanup(move || {
        if let Ok(timer) = timer {
            timer.clear();
        }
    });
    let on_scroll = move |_: Event| {
        let top = list.get_untracked().map_or(0, |list| list.scroll_top());
        let is_scrolled = top > 8;
        if paused.get_untracked() != is_scrolled {
            paused.set(is_scrolled);
            if !is_scrolled {
                live.update(Live::resume);
            }
        }
    };
    let resume = move |_| {
        live.update(Live::resume);
        paused.set(false);
        if let Some(list) = list.get_untracked() {
            list.set_scroll_top(0);
        }
    };
    let is_reconnecting = move || error.with(Option::is_some) || offline.get();
    let status = move || {
        if is_reconnecting() {
            "Reconnecting…"
        } else if paused.get() {
            "Paused until you scroll to the top"
        } else {
            "Live"
        }
    };
    let table = text_memo(move || {
        let zone = zone.get();
        let clock = |at: i64| {
            let seconds = at.div_euclid(1000).rem_euclid(60);
            local_time(at, &zone)
                .map_or_else(String::new, |it| format!("{}:{seconds:02}", it.clock()))
        };
        live.with(|live| {
            let rows: Vec<&Decision> = live.rows.iter().collect();
            decision_table(&rows, "Decisions, newest first", true, &clock).to_string()
        })
    });
    let is_empty = flag_memo(move || live.with(|live| live.rows.is_empty()));
    view! {
        <div class="tail-head">
            <div class="field">
                <label for="tail_outcome">"Outcome"</label>
                <select id="tail_outcome" on:change=move |ev| outcome.set(event_target_value(&ev))>
                    <option value="">"All"</option>
                    <option value="allowed">"Allowed"</option>
                    <option value="rejected">"Rejected"</option>
                </select>
            </div>
            <div class="field">
                <label for="tail_endpoint">"Endpoint"</label>
                <input id="tail_endpoint" type="text" dir="auto" maxlength="128" placeholder="GET /orders" on:change=move |ev| endpoint.set(event_target_value(&ev))/>
            </div>
            <div class="field">
                <label for="tail_request">"Request ID"</label>
                <input id="tail_request" type="text" maxlength="128" on:change=move |ev| request_id.set(event_target_value(&ev))/>
            </div>
        </div>
        <p class="tail-status">
            <span class="badge" class:on=move || !is_reconnecting() && !paused.get() class:limited=is_reconnecting role="status">{status}</span>
            <span class="muted small-text">{move || format!("Times in {}", zone.get())}</span>
            {move || {
                let waiting = live.with(|live| live.waiting.len());
                (waiting > 0).then(|| view! { <button type="button" class="button small" on:click=resume>{format!("Show {waiting} new")}</button> })
            }}
            {move || live.with(Live::has_gap).then(|| view! { <span class="muted small-text">"Requests are arriving too fast to show all of them."</span> })}
        </p>
        <Alert error/>
        {move || {
            if is_empty.get() {
                return if error.with(Option::is_some) {
                    ().into_any()
                } else if loaded.get() && is_filtered.get() {
                    view! { <EmptyState shape=Shape::Search title="No matching decisions" about="New decisions that match the filters appear here within seconds."/> }.into_any()
                } else if loaded.get() {
                    view! { <EmptyState shape=Shape::Usage title="No decisions yet" about="New decisions appear here within seconds."/> }.into_any()
                } else {
                    view! { <p class="muted" role="status">"Loading…"</p> }.into_any()
                };
            }
            view! { <div class="tail-list" node_ref=list tabindex="0" role="region" aria-label="Decisions" on:scroll=on_scroll inner_html=move || table.get()></div> }
                .into_any()
        }}
        <div class="actions end">
            <button type="button" class="button" on:click=move |_| open.set(false)>"Close"</button>
        </div>
    }
}
