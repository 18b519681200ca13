use leptos::prelude::*;
use quota_common::{
    Page,
    api_key::{ApiKey, ApiKeyStatus},
    call::KeyFilter,
    page::ApiKeyOrder,
    plan::Plan,
};

use super::{
    bulk_actions::{BulkActions, SelectAll, activate},
    create_api_key::CreateDialog,
    create_button::{CreateButton, can_create},
    key_status::{key_status, time_or},
    plan_list::{PlansError, load_plans, plan_name},
    usage::usage_of_key,
};
use crate::{
    api,
    component::{
        Async, EmptyState, Loader, Menu, MenuItem, PageHeader, Pager, Shape, SortHead, SortSelect,
        Toasts, copy_and_report, filter_bar, fixed_options, input_filter, load_page,
        open_from_query, select_filter,
    },
    reactive::effect,
    route::route,
    session::session,
};

/// Sort orders that only this list has.
const ORDERS: &[(&str, &str)] = &[
    ("-last_used_at", "Recently used"),
    ("last_used_at", "Least recently used"),
];

const STATUSES: [(&str, &str); 4] = [
    ("", "All"),
    ("active", "Active"),
    ("expired", "Expired"),
    ("inactive", "Inactive"),
];

#[component]
pub fn ApiKeys() -> impl IntoView {
    let query = route().query;
    let parameter = move |name: &str| query.with(|query| query.get(name));
    let loader = load_page(move |page| {
        let filter = KeyFilter {
            plan_id: parameter("plan_id").and_then(|id| id.parse().ok()),
            status: parameter("status").and_then(|status| ApiKeyStatus::of(&status)),
            search: parameter("search"),
            sort: parameter("sort").and_then(|sort| ApiKeyOrder::of(&sort)),
        };
        api::list_api_keys(filter, page)
    });
    let plans = load_plans();
    let is_filtered = move || {
        ["plan_id", "status", "search"]
            .iter()
            .any(|name| parameter(name).is_some())
    };
    let creating = RwSignal::new(false);
    open_from_query(creating, can_create());
    let selected = RwSignal::new(Vec::<ApiKey>::new());
    effect(move || {
        query.track();
        selected.set(Vec::new());
    });
    let session = session();
    view! {
        <PageHeader title="API keys" about="Credentials your API clients send in X-API-Key.">
            {move || session.can_manage().then(|| view! { <NewKeyButton plans creating/> })}
        </PageHeader>
        <Filters plans/>
        <Async
            loader
            what="API keys"
            show=move |page| {
                if page.items.is_empty() {
                    return view! { <NoKeys is_filtered=is_filtered() plans creating/> }.into_any();
                }
                let shown = page.items.len();
                let can_manage = session.can_manage();
                view! {
                    <PlansError plans/>
                    {can_manage
                        .then(|| {
                            let on_changed = Callback::new(move |()| loader.reload());
                            view! { <BulkActions shown=page.items.iter().map(|key| key.id).collect() total=page.total selected plans on_changed/> }
                        })}
                    <table class="table">
                        <caption class="visually-hidden">"API keys"</caption>
                        <thead>
                            <tr>
                                {can_manage.then(|| view! { <th scope="col" class="select"><SelectAll keys=page.items.clone() selected/></th> })}
                                <SortHead name="Name" ascending="name" descending="-name" ascending_first=true/>
                                <th scope="col">"Key"</th>
                                <th scope="col">"Plan"</th>
                                <th scope="col">"Status"</th>
                                <SortHead name="Last used" ascending="last_used_at" descending="-last_used_at"/>
                                <th scope="col">"Expires"</th>
                                {can_manage.then(|| view! { <th scope="col"><span class="visually-hidden">"Actions"</span></th> })}
                            </tr>
                        </thead>
                        <tbody>
                            {page
                                .items
                                .into_iter()
                                .map(|key| {
                                    let plan_id = key.plan_id;
                                    view! {
                                        <tr>
                                            {can_manage.then(|| view! { <td class="select"><SelectKey key=key.clone() selected/></td> })}
                                            <th scope="row" dir="auto"><a href=format!("/console/api-keys/{}", key.id)><span class="clamp">{key.name.clone()}</span></a></th>
                                            <td data-label="Key"><code>{key.prefix.clone()}"…"</code></td>
                                            <td data-label="Plan" class="name-cell" dir="auto"><span class="clamp">{move || plan_name(plans, plan_id)}</span></td>
                                            <td data-label="Status">{key_status(&key)}</td>
                                            <td data-label="Last used">{time_or(key.last_used_at, "Never used")}</td>
                                            <td data-label="Expires">{time_or(key.expires_at, "Never")}</td>
                                            {can_manage.then(|| view! { <td class="row-actions"><KeyMenu key loader/></td> })}
                                        </tr>
                                    }
                                })
                                .collect_view()}
                        </tbody>
                    </table>
                    <Pager total=page.total shown next=page.next_cursor/>
                }
                    .into_any()
            }
        />
        <CreateDialog
            open=creating
            plans
            on_changed=Callback::new(move |()| loader.reload_after_requests())
        />
    }
}

/// The button to create a key. It is disabled, with an explanation, until a plan exists.
#[component]
fn NewKeyButton(plans: Loader<Vec<Plan>>, creating: RwSignal<bool>) -> impl IntoView {
    let has_no_plan = move || plans.ready().is_some_and(|plans| plans.is_empty());
    view! {
        <button
            class="button primary"
            aria-disabled=move || has_no_plan().then_some("true")
            aria-describedby="new-key-hint"
            on:click=move |_| creating.set(true)
        >
            "Create key"
        </button>
        <span id="new-key-hint" class="muted small-text">
            {move || has_no_plan().then_some("Create a plan first.")}
        </span>
    }
}

#[component]
fn NoKeys(is_filtered: bool, plans: Loader<Vec<Plan>>, creating: RwSignal<bool>) -> impl IntoView {
    if is_filtered {
        return view! {
            <EmptyState shape=Shape::Search title="No matching keys" about="Try a different search, or clear the filters.">
                <a class="button" href="/console/api-keys">"Clear filters"</a>
            </EmptyState>
        }
        .into_any();
    }
    view! {
        <EmptyState shape=Shape::Key title="No keys yet" about="Create one key per client, so you can limit each client separately, and rotate or deactivate its key without affecting the others.">
            {move || match plans.ready() {
                Some(plans) if plans.is_empty() => {
                    view! { <a class="button primary" href="/console/plans?new=1">"Create a plan first"</a> }.into_any()
                }
                _ => view! { <CreateButton open=creating label="Create your first key"/> }.into_any(),
            }}
        </EmptyState>
    }
    .into_any()
}

#[component]
fn Filters(plans: Loader<Vec<Plan>>) -> impl IntoView {
    let query = route().query;
    let plan_options = Signal::derive(move || {
        let mut options = vec![(String::new(), "All plans".to_owned())];
        if let Some(plans) = plans.ready() {
            options.extend(
                plans
                    .into_iter()
                    .map(|plan| (plan.id.to_string(), plan.name)),
            );
            // Keeps the filter even if its plan was deleted.
            let current = query.with(|query| query.get("plan_id"));
            if let Some(id) = current.filter(|id| !options.iter().any(|(it, _)| it == id)) {
                options.push((id, "Deleted plan".to_owned()));
            }
        }
        options
    });
    let search = input_filter(
        "search",
        "Search",
        "search",
        "Name, key prefix or external ID",
    );
    let others = view! {
        {select_filter("plan_id", "plan_filter", "Plan", plan_options)}
        {select_filter("status", "status_filter", "Status", fixed_options(&STATUSES))}
        <SortSelect more=ORDERS/>
    };
    filter_bar("filters", &["plan_id", "status"], search, others.into_any())
}

/// The menu of a key. The dialogs that the menu opens are on the key's page.
#[component]
fn KeyMenu(key: ApiKey, loader: Loader<Page<ApiKey>>) -> impl IntoView {
    let toasts = expect_context::<Toasts>();
    let id = key.id;
    let open = |name| format!("/console/api-keys/{id}?open={name}");
    let status = if key.is_active {
        MenuItem::open("Deactivate", open("deactivate"))
    } else {
        let on_changed = Callback::new(move |()| loader.reload());
        let name = key.name.clone();
        MenuItem::run("Activate", move || {
            activate(vec![(id, name.clone())], toasts, on_changed);
        })
    };
    let items = vec![
        MenuItem::open("View usage", usage_of_key(id)),
        MenuItem::open("Edit", open("edit")),
        MenuItem::open("Rotate", open("rotate")),
        MenuItem::run("Copy ID", move || {
            copy_and_report(id.to_string(), "Key ID", toasts);
        }),
        status,
        MenuItem {
            danger: true,
            ..MenuItem::open("Delete", open("delete"))
        },
    ];
    view! { <Menu label=format!("More actions for {}", key.name) focus_key=format!("more-{id}") items/> }
}

/// A checkbox that selects a key for bulk actions.
#[component]
fn SelectKey(key: ApiKey, selected: RwSignal<Vec<ApiKey>>) -> impl IntoView {
    let id = key.id;
    let name = key.name.clone();
    view! {
        <input
            type="checkbox"
            aria-label=format!("Select {name}")
            prop:checked=move || selected.with(|selected| selected.iter().any(|it| it.id == id))
            on:change=move |ev| {
                selected.update(|selected| {
                    selected.retain(|it| it.id != id);
                    if event_target_checked(&ev) {
                        selected.push(key.clone());
                    }
                });
            }
        />
    }
}
