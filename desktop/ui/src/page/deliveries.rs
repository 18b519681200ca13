//! The delivery log of a webhook.

use std::time::Duration;

use leptos::{prelude::*, task::spawn_local};
use quota_common::{
    Page, WebhookDeliveryId, WebhookId,
    webhook::{WebhookDelivery, WebhookDeliveryStatus},
};
use wasm_bindgen::JsCast;
use web_sys::Element;

use crate::{
    api::{self, CallError},
    clock::{now, track_ticks},
    component::{
        Alert, Async, CodeBlock, CopyButton, EmptyState, Loader, Modal, Pager, Shape, StaleNote,
        Toasts, busy_attr, fixed_options, focus_soon, load_page, refresh_regularly, select_filter,
        set_filter,
    },
    model::{
        payload::pretty,
        webhook::{delivery_details, delivery_table, event_label, find, is_changing},
    },
    reactive::{effect, text_memo},
    route::route,
    session::session,
};

const STATUSES: [(&str, &str); 4] = [
    ("", "All"),
    ("pending", "Pending"),
    ("delivered", "Delivered"),
    ("failed", "Failed"),
];

/// How often to reload while an attempt is in progress or imminent.
const POLL: Duration = Duration::from_secs(3);

pub type Log = Loader<Page<WebhookDelivery>>;

/// Loads the page of deliveries that the URL query selects, and keeps it up to date.
pub fn load_log(id: WebhookId) -> Log {
    let query = route().query;
    let log = load_page(move |page| {
        let status = query.with(|query| query.get("status"));
        api::list_deliveries(
            id,
            status.and_then(|it| WebhookDeliveryStatus::of(&it)),
            page,
        )
    });
    refresh_regularly(log);
    let poll = move || {
        let is_changing = untrack(move || log.with(|page| is_changing(&page.items, now())));
        if is_changing == Some(true) && !document().hidden() {
            log.refresh();
        }
    };
    if let Ok(timer) = set_interval_with_handle(poll, POLL) {
        on_cleanup(move || timer.clear());
    }
    log
}

#[component]
pub fn Deliveries(log: Log) -> impl IntoView {
    let route = route();
    let opened = RwSignal::new(None::<WebhookDelivery>);
    let open = RwSignal::new(false);
    let on_click = move |ev: web_sys::MouseEvent| {
        let target = ev.target().and_then(|it| it.dyn_into::<Element>().ok());
        let button = target.and_then(|it| it.closest("[data-delivery]").ok()?);
        let id = button.and_then(|it| it.get_attribute("data-delivery")?.parse().ok());
        if let Some(it) = id.and_then(|id| in_log(log, id)) {
            opened.set(Some(it));
            open.set(true);
        }
    };
    // Restores focus after the panel closes. The row may have been rendered again in the meantime, so the browser
    // cannot do this.
    Effect::new(move |was_open: Option<bool>| {
        let is_open = open.get();
        if was_open == Some(true)
            && !is_open
            && let Some(it) = opened.get_untracked()
        {
            focus_soon(format!("[data-focus-key=\"delivery-{}\"]", it.id));
        }
        is_open
    });
    let show = move |page: Page<WebhookDelivery>| {
        if page.items.is_empty() {
            let is_filtered = route.query.with(|query| query.get("status").is_some());
            return view! { <NoDeliveries is_filtered/> }.into_any();
        }
        let shown = page.items.len();
        let table = delivery_table(&page.items, now()).to_string();
        view! {
            <div inner_html=table on:click=on_click></div>
            <Pager total=page.total shown next=page.next_cursor/>
        }
        .into_any()
    };
    view! {
        <section aria-labelledby="deliveries">
            <div class="list-head">
                <h2 id="deliveries">"Deliveries"</h2>
                <div class="filters narrow">{select_filter("status", "status", "Status", fixed_options(&STATUSES))}</div>
            </div>
            <StaleNote loader=log/>
            <Async loader=log what="deliveries" inside=true show/>
        </section>
        <Modal open panel=true title=Signal::derive(move || opened.with(|it| it.as_ref().map(|it| event_label(&it.event_type).to_owned()).unwrap_or_default()))>
            {untrack(move || opened.get()).map(|delivery| view! { <DeliveryDetails delivery log open/> })}
        </Modal>
    }
}

fn in_log(log: Log, id: WebhookDeliveryId) -> Option<WebhookDelivery> {
    log.with(|page| find(&page.items, id).cloned()).flatten()
}

#[component]
fn NoDeliveries(is_filtered: bool) -> impl IntoView {
    let route = route();
    if is_filtered {
        view! {
            <EmptyState shape=Shape::Search title="No matching deliveries" about="Deliveries are kept for 30 days.">
                <button type="button" class="button" on:click=move |_| set_filter(route, "status", "")>"Show all deliveries"</button>
            </EmptyState>
        }
        .into_any()
    } else {
        view! { <EmptyState shape=Shape::Webhook title="No deliveries yet" about="Events sent to this webhook appear here for 30 days. To try the webhook, send a test event."/> }
        .into_any()
    }
}

/// A delivery and its payload. Updated whenever the log is loaded again.
#[component]
fn DeliveryDetails(delivery: WebhookDelivery, log: Log, open: RwSignal<bool>) -> impl IntoView {
    let toasts = expect_context::<Toasts>();
    let can_manage = session().can_manage();
    let (id, event_id) = (delivery.id, delivery.event_id.clone());
    let payload = pretty(&delivery.payload);
    let latest = RwSignal::new(delivery);
    effect(move || {
        if let Some(it) = in_log(log, id) {
            latest.set(it);
        }
    });
    let details = text_memo(move || {
        track_ticks();
        latest.with(|it| delivery_details(it, now()).to_string())
    });
    let busy = RwSignal::new(false);
    let failure = RwSignal::new(None::<CallError>);
    let redeliver = move |_| {
        busy.set(true);
        failure.set(None);
        spawn_local(async move {
            match api::redeliver(id).await {
                Ok(it) => {
                    let _ = latest.try_set(it);
                    toasts.succeed("Redelivery started");
                    log.reload_after_requests();
                }
                Err(error) => {
                    let _ = failure.try_set(Some(error));
                }
            }
            let _ = busy.try_set(false);
        });
    };
    view! {
        <div inner_html=move || details.get()></div>
        <p class="key-id">
            <span class="muted small-text">"Event ID"</span>
            <code>{event_id.clone()}</code>
            <CopyButton text=Signal::stored(event_id) what="event ID"/>
        </p>
        <h3>"Payload"</h3>
        <CodeBlock text=Signal::stored(payload) what="payload"/>
        <Alert error=failure/>
        <div class="actions end">
            <button type="button" class="button" on:click=move |_| open.set(false)>"Close"</button>
            {can_manage
                .then(|| view! { <button type="button" class="button primary" aria-disabled=busy_attr(busy) data-busy=busy_attr(busy) on:click=redeliver>"Redeliver"</button> })}
        </div>
    }
}
