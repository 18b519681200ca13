//! The audit log.

use leptos::{prelude::*, task::spawn_local};
use quota_common::{
    Page, Timestamp,
    audit::{AuditAction, AuditEvent, AuditTarget},
    call::{AuditFilter, PageOf},
    page::MAX_LIMIT,
    plan::Plan,
};

use super::plan_list::load_plans;
use crate::{
    api,
    component::{
        Async, EmptyState, ExportButton, LoadState, Loader, PageHeader, Pager, RelativeTime, Shape,
        load_page,
    },
    model::{
        address::Query,
        audit::{FieldChange, action_label, field_changes, summary},
        csv::csv,
        text::date_time,
    },
    route::{Route, route},
};

/// How many events an export contains at most.
const MAX_EXPORTED: usize = 10_000;

const fn resource_label(target: AuditTarget) -> &'static str {
    match target {
        AuditTarget::Plan => "Plans",
        AuditTarget::ApiKey => "API keys",
        AuditTarget::ServiceToken => "Service tokens",
        AuditTarget::User => "Accounts",
        AuditTarget::Session => "Sessions",
        AuditTarget::Tenant => "Organization",
    }
}

fn resources(_: &Query) -> Vec<(&'static str, String)> {
    let all = AuditTarget::ALL.iter();
    all.map(|it| (it.as_str(), resource_label(*it).to_owned()))
        .collect()
}

/// The actions on the selected resource.
fn actions(query: &Query) -> Vec<(&'static str, String)> {
    let noun = query.get("target_type").unwrap_or_default();
    AuditAction::ALL
        .iter()
        .map(|it| it.as_str())
        .filter(|it| it.starts_with(&noun))
        .map(|it| (it, action_label(it)))
        .collect()
}

/// The parameters of the address that restrict the list.
const FILTERS: [&str; 7] = [
    "target_type",
    "action",
    "search",
    "actor",
    "from",
    "to",
    "target_id",
];

/// Reads the filter from the address. Its dates are days in UTC, both inclusive.
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

/// Puts a filter into the address.
fn set_filter(route: Route, name: &'static str, value: &str) {
    let mut query = route.query.get_untracked().with("cursor", "");
    if name == "target_type" {
        query = query.with("action", "");
    }
    route.replace(&format!("/console/audit{}", query.with(name, value)));
}

#[component]
fn SelectFilter(
    name: &'static str,
    label: &'static str,
    all: &'static str,
    options: fn(&Query) -> Vec<(&'static str, String)>,
) -> impl IntoView {
    let route = route();
    let query = route.query;
    view! {
        <div class="field">
            <label for=name>{label}</label>
            <select id=name on:change=move |ev| set_filter(route, name, &event_target_value(&ev))>
                {move || {
                    query
                        .with(|query| {
                            let current = query.get(name).unwrap_or_default();
                            let mut all = vec![("", all.to_owned())];
                            all.append(&mut options(query));
                            all.into_iter()
                                .map(|(value, text)| view! { <option value=value selected=value == current>{text}</option> })
                                .collect_view()
                        })
                }}
            </select>
        </div>
    }
}

/// A text or date filter. A text applies once typing pauses.
#[component]
fn InputFilter(
    name: &'static str,
    label: &'static str,
    kind: &'static str,
    #[prop(optional)] placeholder: &'static str,
) -> impl IntoView {
    let route = route();
    let query = route.query;
    let latest = StoredValue::new(0_u32);
    let pause_ms = if kind == "search" { 250 } else { 0 };
    let change = move |ev| {
        let value = event_target_value(&ev);
        latest.update_value(|n| *n = n.wrapping_add(1));
        let own = latest.get_value();
        spawn_local(async move {
            gloo_timers::future::TimeoutFuture::new(pause_ms).await;
            if latest.try_get_value() == Some(own) {
                set_filter(route, name, &value);
            }
        });
    };
    view! {
        <div class="field">
            <label for=name>{label}</label>
            <input
                id=name
                type=kind
                dir=(kind == "search").then_some("auto")
                maxlength=(kind == "search").then_some("200")
                placeholder=placeholder
                prop:value=move || query.with(|query| query.get(name)).unwrap_or_default()
                on:input=change
            />
        </div>
    }
}

#[component]
pub fn AuditLog() -> impl IntoView {
    let route = route();
    let query = route.query;
    let loader = load_page(move |page| api::list_audit(query.with(filter), page));
    let plans = load_plans();
    let export = Callback::new(move |()| {
        let filter = query.with_untracked(filter);
        let names = PlanNames(plans);
        Box::pin(async move { Ok(("audit-log.csv".to_owned(), exported(filter, names).await?)) })
            as api::PendingCall<(String, String)>
    });
    view! {
        <PageHeader title="Audit log" about="Every change: what was changed, by whom, when, and from where.">
            <ExportButton export/>
        </PageHeader>
        <search class="filters audit">
            <InputFilter name="search" label="Resource name" kind="search" placeholder="Name"/>
            <InputFilter name="actor" label="Actor" kind="search" placeholder="Email"/>
            <SelectFilter name="target_type" label="Resource" all="All resources" options=resources/>
            <SelectFilter name="action" label="Action" all="All actions" options=actions/>
            <InputFilter name="from" label="From (UTC)" kind="date"/>
            <InputFilter name="to" label="To (UTC)" kind="date"/>
        </search>
        {move || {
            query
                .with(|query| query.get("target_id"))
                .map(|id| {
                    view! {
                        <p class="filter-note">
                            "Changes to " <code>{id}</code> " only. "
                            <button type="button" class="link" on:click=move |_| set_filter(route, "target_id", "")>"Show all"</button>
                        </p>
                    }
                })
        }}
        <Async
            loader
            show=move |page| {
                if page.items.is_empty() {
                    let is_filtered = query.with(|query| FILTERS.iter().any(|name| query.get(name).is_some()));
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
            <EmptyState shape=Shape::Search title="No matching events" about="Try other filters.">
                <a class="button" href="/console/audit">"Clear filters"</a>
            </EmptyState>
        }
        .into_any()
    } else {
        view! {
            <EmptyState shape=Shape::Audit title="No events yet" about="Changes to plans, keys, tokens and sessions appear here."/>
        }
        .into_any()
    }
}

/// The names of plans, as far as they have been loaded.
#[derive(Clone, Copy)]
struct PlanNames(Loader<Vec<Plan>>);

impl PlanNames {
    fn find(self, id: &str) -> Option<String> {
        self.0.state.with(|state| match state {
            LoadState::Ready(plans) => plans
                .iter()
                .find(|plan| plan.id.to_string() == id)
                .map(|plan| plan.name.clone()),
            // Not known to be deleted.
            _ => Some("…".to_owned()),
        })
    }

    fn summary(self, event: &AuditEvent) -> String {
        summary(event, &|id| self.find(id))
    }
}

/// Fetches all events that match, page by page, as CSV.
async fn exported(filter: AuditFilter, names: PlanNames) -> api::CallResult<String> {
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
    Ok(csv(rows))
}

#[component]
fn Events(page: Page<AuditEvent>, plans: Loader<Vec<Plan>>) -> impl IntoView {
    let shown = page.items.len();
    let deleted = page
        .items
        .iter()
        .filter(|it| it.action.ends_with(".delete"))
        .filter_map(|it| it.target_id.clone())
        .collect::<Vec<_>>();
    let rows = page
        .items
        .into_iter()
        .map(|event| {
            let id = event.target_id.clone().unwrap_or_default();
            let has_page = event.target_type == "api_key" && !deleted.contains(&id);
            // Without a page of its own, the resource leads to its history.
            let href = match &*event.target_type {
                "api_key" if has_page => Some(format!("/console/api-keys/{id}")),
                "api_key" | "plan" | "service_token" => Some(format!(
                    "/console/audit{}",
                    Query::default().with("target_id", &id)
                )),
                _ => None,
            };
            view! { <EventRows event href plans/> }
        })
        .collect_view();
    view! {
        <table class="table events">
            <caption class="visually-hidden">"Events, newest first"</caption>
            <thead>
                <tr>
                    <th scope="col">"Change"</th>
                    <th scope="col">"Resource"</th>
                    <th scope="col">"Actor"</th>
                    <th scope="col">"IP address"</th>
                    <th scope="col">"Time"</th>
                    <th scope="col"><span class="visually-hidden">"Details"</span></th>
                </tr>
            </thead>
            <tbody>{rows}</tbody>
        </table>
        <Pager total=page.total shown next=page.next_cursor/>
    }
}

/// An event in one line, and below it, when asked for, its details in the full width of the table.
#[component]
fn EventRows(event: AuditEvent, href: Option<String>, plans: Loader<Vec<Plan>>) -> impl IntoView {
    let open = RwSignal::new(false);
    let names = PlanNames(plans);
    let id = format!("details-{}", event.id);
    // Accounts and sessions have no name of their own; the actor identifies them.
    let name = event.target_name.clone().unwrap_or_else(|| "–".to_owned());
    let label = action_label(&event.action);
    let button = format!("Details of {label}: {name}");
    let at = event.at;
    let has_details = event.before.is_some() || event.after.is_some();
    let event = StoredValue::new(event);
    let line = move || event.with_value(|event| names.summary(event));
    let changes = move || event.with_value(|event| field_changes(event, &|id| names.find(id)));
    let (actor, ip) = event.with_value(|it| (it.user_email.clone(), it.ip.clone()));
    let controls = id.clone();
    view! {
        <tr>
            <th scope="row">{label} <span class="summary" dir="auto">{line}</span></th>
            <td data-label="Resource" class="name-cell"><a class="clamp" dir="auto" href=href>{name}</a></td>
            <td class="actor" data-label="Actor" dir="auto">{actor.unwrap_or_else(|| "System".to_owned())}</td>
            <td data-label="IP address"><code>{ip.unwrap_or_else(|| "–".to_owned())}</code></td>
            <td data-label="Time"><div><RelativeTime at with_exact=true/></div></td>
            <td class="row-actions">
                {has_details
                    .then(|| {
                        view! {
                            <button
                                type="button"
                                class="button small"
                                aria-label=button
                                aria-expanded=move || open.get().to_string()
                                aria-controls=controls
                                on:click=move |_| open.update(|open| *open = !*open)
                            >
                                "Details"
                            </button>
                        }
                    })}
            </td>
        </tr>
        <tr id=id class="detail-row" hidden=move || !open.get()>
            <td colspan="6">{move || open.get().then(|| view! { <EventDetails at changes=changes()/> })}</td>
        </tr>
    }
}

#[component]
fn EventDetails(at: Timestamp, changes: Vec<FieldChange>) -> impl IntoView {
    let rows = changes
        .into_iter()
        .map(
            |FieldChange {
                 label,
                 before,
                 after,
             }| {
                let value = match (before, after) {
                    (Some(before), Some(after)) => {
                        view! { <del>{before}</del> " → " <ins>{after}</ins> }.into_any()
                    }
                    (before, after) => after.or(before).into_any(),
                };
                view! { <div><dt>{label}</dt><dd dir="auto">{value}</dd></div> }
            },
        )
        .collect_view();
    view! {
        <dl class="details">
            {rows}
            <div><dt>"Time"</dt><dd>{date_time(at.inner().timestamp_millis())}</dd></div>
        </dl>
    }
}
