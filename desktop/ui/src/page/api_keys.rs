//! API keys: finding one, and what is done to many at once.

use leptos::{prelude::*, task::spawn_local};
use quota_common::{
    PlanId,
    api_key::ApiKey,
    call::{KeyFilter, PageOf},
    page::{ApiKeyOrder, MAX_LIMIT, PlanOrder},
    plan::Plan,
};

use super::{
    bulk::{Bulk, ChooseAll},
    new_api_key::CreateDialog,
};
use crate::{
    api,
    app::session,
    component::{
        Empty, Head, Load, Loader, Pager, Shape, Shown, SortHead, SortSelect, When, load,
        load_page, now, open_when_asked,
    },
    route::route,
};

/// In which orders keys are shown; the first is the server's own.
const ORDERS: &[(&str, &str)] = &[
    ("", "Newest first"),
    ("created_at", "Oldest first"),
    ("name", "Name"),
    ("-name", "Name, Z to A"),
    ("-last_used_at", "Last used first"),
    ("last_used_at", "Unused first"),
];

/// All plans, however many pages they are.
pub fn load_plans() -> Loader<Vec<Plan>> {
    load(|| async {
        let mut plans = Vec::new();
        let mut cursor = None;
        loop {
            let page = PageOf {
                limit: Some(MAX_LIMIT),
                cursor,
            };
            let page = api::list_plans(Some(PlanOrder::Name), page).await?;
            plans.extend(page.items);
            cursor = page.next_cursor;
            if cursor.is_none() {
                return Ok(plans);
            }
        }
    })
}

/// The name of a plan, as far as it is loaded.
pub fn plan_name(plans: Loader<Vec<Plan>>, id: PlanId) -> String {
    plans.state.with(|state| match state {
        Load::Ready(plans) => plans
            .iter()
            .find(|plan| plan.id == id)
            .map_or_else(|| "…".to_owned(), |plan| plan.name.clone()),
        _ => "…".to_owned(),
    })
}

/// Says that the plans were not loaded, whose names are missing then.
#[component]
pub fn NoPlans(plans: Loader<Vec<Plan>>) -> impl IntoView {
    move || match plans.state.get() {
        Load::Failed(failure) => Some(view! {
            <div class="alert" role="alert">
                <p>"The plans could not be loaded. " {failure.text()}</p>
                <button class="button small" on:click=move |_| plans.reload()>"Load the plans again"</button>
            </div>
        }),
        _ => None,
    }
}

/// Whether a key opens something, and why not.
#[component]
#[expect(
    clippy::needless_pass_by_value,
    reason = "components own what they are given"
)]
pub fn State(key: ApiKey) -> impl IntoView {
    let expired = key
        .expires_at
        .is_some_and(|at| at.inner().timestamp_millis() <= now());
    match (key.is_active, expired) {
        (false, _) => view! { <span class="badge">"inactive"</span> },
        (true, true) => view! { <span class="badge off">"expired"</span> },
        (true, false) => view! { <span class="badge on">"active"</span> },
    }
}

#[component]
pub fn ApiKeys() -> impl IntoView {
    let route = route();
    let query = route.query;
    let part = move |name: &str| query.with(|query| query.get(name));
    let loader = load_page(move |page| {
        let filter = KeyFilter {
            plan_id: part("plan_id").and_then(|id| id.parse().ok()),
            is_active: part("is_active").and_then(|it| it.parse().ok()),
            is_expired: part("is_expired").and_then(|it| it.parse().ok()),
            search: part("search"),
            sort: part("sort").and_then(|sort| ApiKeyOrder::of(&sort)),
        };
        api::list_api_keys(filter, page)
    });
    let plans = load_plans();
    let is_filtered = move || {
        ["plan_id", "is_active", "search"]
            .iter()
            .any(|name| part(name).is_some())
    };
    let creating = RwSignal::new(false);
    open_when_asked(creating);
    // Whatever is shown next, it is not what was chosen.
    let chosen = RwSignal::new(Vec::<ApiKey>::new());
    Effect::new(move |_| {
        query.track();
        chosen.set(Vec::new());
    });
    let may = move || {
        session()
            .me
            .get()
            .is_some_and(|me| me.tenant.role.may_manage())
    };

    // A filter is part of the address, so that it can be kept and sent around.
    let set = move |name: &'static str, value: String| {
        let query = query.get_untracked().with("cursor", "");
        route.replace(&format!("/console/api-keys{}", query.with(name, &value)));
    };
    let typed = StoredValue::new(0_u32);
    let search = move |value: String| {
        typed.update_value(|n| *n = n.wrapping_add(1));
        let own = typed.get_value();
        spawn_local(async move {
            gloo_timers::future::TimeoutFuture::new(250).await;
            if typed.try_get_value() == Some(own) {
                set("search", value);
            }
        });
    };
    view! {
        <Head title="API keys" about="What your consumers send as X-API-Key.">
            {move || may().then(|| view! { <button class="button first" on:click=move |_| creating.set(true)>"New key"</button> })}
        </Head>
        <search class="filters">
            <div class="field">
                <label for="search">"Search"</label>
                <input
                    id="search"
                    type="search"
                    dir="auto"
                    placeholder="Name or first characters"
                    maxlength="200"
                    prop:value=move || part("search").unwrap_or_default()
                    on:input=move |ev| search(event_target_value(&ev))
                />
            </div>
            <div class="field">
                <label for="plan_filter">"Plan"</label>
                <select id="plan_filter" on:change=move |ev| set("plan_id", event_target_value(&ev))>
                    <option value="" prop:selected=move || part("plan_id").is_none()>"All plans"</option>
                    {move || {
                        plans
                            .ready()
                            .map(|plans| {
                                let mut plans: Vec<_> = plans.into_iter().map(|plan| (plan.id.to_string(), plan.name)).collect();
                                // It is in force all the same.
                                if let Some(gone) = part("plan_id").filter(|id| !plans.iter().any(|(it, _)| it == id)) {
                                    plans.push((gone, "A plan that is gone".to_owned()));
                                }
                                plans
                                    .into_iter()
                                    .map(|(id, name)| {
                                        let same = id.clone();
                                        view! { <option value=id prop:selected=move || part("plan_id").as_ref() == Some(&same)>{name}</option> }
                                    })
                                    .collect_view()
                            })
                    }}
                </select>
            </div>
            <div class="field">
                <label for="state_filter">"State"</label>
                <select id="state_filter" on:change=move |ev| set("is_active", event_target_value(&ev))>
                    <option value="" prop:selected=move || part("is_active").is_none()>"Any"</option>
                    <option value="true" prop:selected=move || part("is_active").as_deref() == Some("true")>"Active"</option>
                    <option value="false" prop:selected=move || part("is_active").as_deref() == Some("false")>"Inactive"</option>
                </select>
            </div>
            <SortSelect options=ORDERS/>
        </search>
        <Shown
            loader
            show=move |page| {
                if page.items.is_empty() {
                    return if is_filtered() {
                        view! {
                            <Empty shape=Shape::Search title="No key is like that" about="Search for something else, or show all.">
                                <a class="button" href="/console/api-keys">"Show all keys"</a>
                            </Empty>
                        }
                            .into_any()
                    } else {
                        view! {
                            <Empty shape=Shape::Key title="No keys yet" about="Make one for each consumer, so that each can be limited, rotated and switched off alone.">
                                <button class="button first" on:click=move |_| creating.set(true)>"Make the first key"</button>
                            </Empty>
                        }
                            .into_any()
                    };
                }
                let shown = page.items.len();
                let may = may();
                view! {
                    <NoPlans plans/>
                    {may
                        .then(|| {
                            let changed = Callback::new(move |()| loader.reload());
                            view! { <Bulk shown=page.items.iter().map(|key| key.id).collect() total=page.total chosen changed/> }
                        })}
                    <table class="table">
                        <caption class="unseen">"API keys"</caption>
                        <thead>
                            <tr>
                                {may.then(|| view! { <th scope="col" class="choose"><ChooseAll keys=page.items.clone() chosen/></th> })}
                                <SortHead name="Name" up="name" down="-name" up_first=true/>
                                <th scope="col">"Key"</th>
                                <th scope="col">"Plan"</th>
                                <th scope="col">"State"</th>
                                <SortHead name="Last used" up="last_used_at" down="-last_used_at"/>
                                <th scope="col">"Expires"</th>
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
                                            {may.then(|| view! { <td class="choose"><Choose key=key.clone() chosen/></td> })}
                                            <th scope="row" dir="auto"><a href=format!("/console/api-keys/{}", key.id)><span class="clamp">{key.name.clone()}</span></a></th>
                                            <td data-label="Key"><code>{key.prefix.clone()}"…"</code></td>
                                            <td data-label="Plan" class="of" dir="auto"><span class="clamp">{move || plan_name(plans, plan_id)}</span></td>
                                            <td data-label="State"><State key=key.clone()/></td>
                                            <td data-label="Last used">
                                                {match key.last_used_at {
                                                    Some(at) => view! { <When at/> }.into_any(),
                                                    None => view! { <span class="quiet">"unused"</span> }.into_any(),
                                                }}
                                            </td>
                                            <td data-label="Expires">
                                                {match key.expires_at {
                                                    Some(at) => view! { <When at/> }.into_any(),
                                                    None => view! { <span class="quiet">"never"</span> }.into_any(),
                                                }}
                                            </td>
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
        <CreateDialog open=creating plans changed=Callback::new(move |()| loader.reload())/>
    }
}

/// Chooses a key for what is done to many.
#[component]
fn Choose(key: ApiKey, chosen: RwSignal<Vec<ApiKey>>) -> impl IntoView {
    let id = key.id;
    let name = key.name.clone();
    view! {
        <input
            type="checkbox"
            aria-label=format!("Select {name}")
            prop:checked=move || chosen.with(|chosen| chosen.iter().any(|it| it.id == id))
            on:change=move |ev| {
                chosen.update(|chosen| {
                    chosen.retain(|it| it.id != id);
                    if event_target_checked(&ev) {
                        chosen.push(key.clone());
                    }
                });
            }
        />
    }
}
