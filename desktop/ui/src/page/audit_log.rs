use leptos::prelude::*;
use quota_common::{
    Page, Timestamp,
    audit::{AuditAction, AuditEvent, AuditTarget},
    call::{AuditFilter, PageOf},
    page::MAX_LIMIT,
    plan::Plan,
};
use wasm_bindgen::JsCast;
use web_sys::Element;

use super::plan_list::load_plans;
use crate::{
    api,
    clock::now,
    component::{
        Async, EmptyState, ExportButton, Loader, PageHeader, Pager, Shape, Toasts, filter_bar,
        input_filter, load_page, select_filter, set_filter,
    },
    model::{
        address::Query,
        audit::{action_label, event_table, summary},
        csv::csv,
    },
    route::route,
};

const MAX_EXPORTED: usize = 10_000;

const fn resource_label(target: AuditTarget) -> &'static str {
    match target {
        AuditTarget::Plan => "Plans",
        AuditTarget::ApiKey => "API keys",
        AuditTarget::ServiceToken => "Service tokens",
        AuditTarget::User => "Accounts",
        AuditTarget::Session => "Sessions",
        AuditTarget::Tenant => "Organization",
        AuditTarget::Subscription => "Subscription",
        AuditTarget::Webhook => "Webhooks",
    }
}

fn resources() -> Signal<Vec<(String, String)>> {
    Signal::derive(|| {
        let all = AuditTarget::ALL.iter();
        let all = all.map(|it| (it.as_str().to_owned(), resource_label(*it).to_owned()));
        std::iter::once((String::new(), "All resources".to_owned()))
            .chain(all)
            .collect()
    })
}

/// Returns the actions for the selected resource type.
fn actions(query: RwSignal<Query>) -> Signal<Vec<(String, String)>> {
    Signal::derive(move || {
        let noun = query
            .with(|query| query.get("target_type"))
            .unwrap_or_default();
        let all = AuditAction::ALL.iter().map(|it| it.as_str());
        let all = all.filter(|it| it.starts_with(&noun));
        std::iter::once((String::new(), "All actions".to_owned()))
            .chain(all.map(|it| (it.to_owned(), action_label(it))))
            .collect()
    })
}

/// The filters that are behind a button on phones.
const FIELDS: [&str; 5] = ["actor", "target_type", "action", "from", "to"];

/// Reads the filter from the URL query. The first and the last date are UTC days, and both days are included.
fn filter(query: &Query) -> AuditFilter {
    const DAY_MS: f64 = 86_400_000.0;
    let midnight = |name: &str, days_later: f64| -> Option<Timestamp> {
        let date = js_sys::Date::new(&format!("{}T00:00:00Z", query.get(name)?).into());
        let time = date.get_time() + days_later * DAY_MS;
        date.set_time(time);
        (!time.is_nan()).then(|| date.to_iso_string().as_string()?.parse().ok())?
    };
    AuditFilter {
        action: query.get("action").and_then(|it| AuditAction::of(&it)),
        target_type: query.get("target_type").and_then(|it| AuditTarget::of(&it)),
        target_id: query.get("target_id"),
        actor: query.get("actor"),
        search: query.get("search"),
        from: midnight("from", 0.0),
        to: midnight("to", 1.0),
    }
}

#[component]
pub fn AuditLog() -> impl IntoView {
    let route = route();
    let query = route.query;
    let loader = load_page(move |page| api::list_audit(query.with(filter), page));
    let plans = load_plans();
    let toasts = expect_context::<Toasts>();
    let export = Callback::new(move |()| {
        let filter = query.with_untracked(filter);
        let names = PlanNames(plans);
        Box::pin(async move {
            let (file, is_complete) = exported(filter, names).await?;
            if !is_complete {
                toasts.fail_with("Only the newest 10,000 events were exported. To export older ones, filter by date.");
            }
            Ok(("audit-log.csv".to_owned(), file))
        }) as api::PendingCall<(String, String)>
    });
    let others = view! {
        {input_filter("actor", "Actor", "search", "Email")}
        {select_filter("target_type", "target_type", "Resource", resources())}
        {select_filter("action", "action", "Action", actions(query))}
        {input_filter("from", "From (UTC)", "date", "")}
        {input_filter("to", "To (UTC)", "date", "")}
    };
    view! {
        <PageHeader title="Audit log" about="Sign-ins and changes: what happened, who did it, when, and from where.">
            <ExportButton export/>
        </PageHeader>
        {filter_bar("filters audit", &FIELDS, input_filter("search", "Resource name", "search", "Name"), others.into_any())}
        {move || {
            query
                .with(|query| query.get("target_id"))
                .map(|id| {
                    view! {
                        <p class="filter-note">
                            "Events about " <code>{id}</code> " only. "
                            <button type="button" class="link" on:click=move |_| set_filter(route, "target_id", "")>"Show all events"</button>
                        </p>
                    }
                })
        }}
        <Async
            loader
            what="the audit log"
            show=move |page| {
                if page.items.is_empty() {
                    let is_filtered = query.with(|query| FIELDS.iter().chain(&["search", "target_id"]).any(|name| query.get(name).is_some()));
                    return view! { <NoEvents is_filtered/> }.into_any();
                }
                view! { <Events page plans/> }.into_any()
            }
        />
    }
}

#[component]
fn NoEvents(is_filtered: bool) -> impl IntoView {
    if is_filtered {
        view! {
            <EmptyState shape=Shape::Search title="No matching events" about="Try different filters.">
                <a class="button" href="/console/audit">"Clear filters"</a>
            </EmptyState>
        }
        .into_any()
    } else {
        view! {
            <EmptyState shape=Shape::Audit title="No events yet" about="Sign-ins, and changes to your organization and its resources, appear here."/>
        }
        .into_any()
    }
}

#[derive(Clone, Copy)]
struct PlanNames(Loader<Vec<Plan>>);

impl PlanNames {
    fn find(self, id: &str) -> Option<String> {
        let found = self.0.with(|plans| {
            let plan = plans.iter().find(|plan| plan.id.to_string() == id);
            plan.map(|plan| plan.name.clone())
        });
        // Until the plans are loaded, it is not known whether a plan was deleted.
        found.unwrap_or_else(|| Some("…".to_owned()))
    }

    fn summary(self, event: &AuditEvent) -> String {
        summary(event, &|id| self.find(id))
    }
}

/// Loads the newest matching events page by page and returns them as CSV. Also returns whether the CSV contains all
/// matching events.
async fn exported(filter: AuditFilter, names: PlanNames) -> api::CallResult<(String, bool)> {
    let header = [
        "time",
        "action",
        "summary",
        "resource_type",
        "resource_name",
        "resource_id",
        "actor",
        "ip",
    ];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    let mut cursor = None;
    while rows.len() <= MAX_EXPORTED {
        let page = PageOf {
            limit: Some(MAX_LIMIT),
            cursor,
        };
        let page = api::list_audit(filter.clone(), page).await?;
        rows.extend(page.items.into_iter().map(|event| {
            let summary = untrack(|| names.summary(&event));
            vec![
                event.at.to_string(),
                event.action,
                summary,
                event.target_type,
                event.target_name.unwrap_or_default(),
                event.target_id.unwrap_or_default(),
                event.user_email.unwrap_or_default(),
                event.ip.unwrap_or_default(),
            ]
        }));
        cursor = page.next_cursor;
        if cursor.is_none() {
            break;
        }
    }
    Ok((csv(rows), cursor.is_none()))
}

#[component]
fn Events(page: Page<AuditEvent>, plans: Loader<Vec<Plan>>) -> impl IntoView {
    let shown = page.items.len();
    let (total, next) = (page.total, page.next_cursor);
    let events = page.items;
    let names = PlanNames(plans);
    let table = move || event_table(&events, &|id| names.find(id), now()).to_string();
    // Each button shows or hides the row below its own row.
    let on_click = move |ev: web_sys::MouseEvent| {
        let target = ev.target().and_then(|it| it.dyn_into::<Element>().ok());
        let button = target.and_then(|it| it.closest("button[aria-controls]").ok()?);
        let Some(button) = button else { return };
        let row = button
            .get_attribute("aria-controls")
            .and_then(|id| document().get_element_by_id(&id));
        if let Some(row) = row {
            let is_hidden = row.has_attribute("hidden");
            let _ = row.toggle_attribute("hidden");
            let _ = button.set_attribute("aria-expanded", if is_hidden { "true" } else { "false" });
        }
    };
    view! {
        <div inner_html=table on:click=on_click></div>
        <Pager total shown next/>
    }
}
