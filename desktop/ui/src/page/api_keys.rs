//! API keys: finding one, and making one.

use leptos::{ev::SubmitEvent, prelude::*, task::spawn_local};
use quota_common::{
    Page,
    api_key::{ApiKey, CreateApiKey, CreatedApiKey},
    call::{KeyFilter, PageOf},
    plan::Plan,
};

use super::try_it::TryIt;
use crate::{
    api::{self, Failure},
    app::session,
    component::{
        Alert, CodeBlock, Empty, Field, Head, Loader, Modal, Pager, SelectField, Shape, Shown,
        When, load, now,
    },
    model::{form::optional_rate, text},
    route::route,
};

/// All plans that a list to choose from holds.
pub fn load_plans() -> Loader<Page<Plan>> {
    load(|| {
        api::list_plans(None, PageOf {
            limit: Some(100),
            cursor: None,
        })
    })
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
        (false, _) => view! { <span class="badge off">"inactive"</span> },
        (true, true) => view! { <span class="badge off">"expired"</span> },
        (true, false) => view! { <span class="badge on">"active"</span> },
    }
}

#[component]
pub fn ApiKeys() -> impl IntoView {
    let route = route();
    let query = route.query;
    let part = move |name: &str| query.with(|query| query.get(name));
    let loader = load(move || {
        let filter = KeyFilter {
            plan_id: part("plan_id").and_then(|id| id.parse().ok()),
            is_active: part("is_active").and_then(|it| it.parse().ok()),
            search: part("search"),
            sort: None,
        };
        let page = PageOf {
            limit: None,
            cursor: part("cursor"),
        };
        api::list_api_keys(filter, page)
    });
    let plans = load_plans();
    let plan_name = move |id| {
        plans
            .ready()
            .and_then(|page| page.items.into_iter().find(|plan| plan.id == id))
            .map_or_else(|| "…".to_owned(), |plan| plan.name)
    };
    let is_filtered = move || {
        ["plan_id", "is_active", "search"]
            .iter()
            .any(|name| part(name).is_some())
    };
    let creating = RwSignal::new(query.with_untracked(|query| query.get("new")).is_some());
    let may = move || {
        session()
            .me
            .get()
            .is_some_and(|me| me.tenant.role.may_manage())
    };

    // A filter is part of the address, so that it can be kept and sent around.
    let set = move |name: &'static str, value: String| {
        let query = query.get_untracked().with("cursor", "").with("new", "");
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
                    <option value="">"All plans"</option>
                    {move || {
                        plans
                            .ready()
                            .map(|page| {
                                page.items
                                    .into_iter()
                                    .map(|plan| {
                                        let id = plan.id.to_string();
                                        let same = id.clone();
                                        view! { <option value=id selected=move || part("plan_id").as_ref() == Some(&same)>{plan.name}</option> }
                                    })
                                    .collect_view()
                            })
                    }}
                </select>
            </div>
            <div class="field">
                <label for="state_filter">"State"</label>
                <select id="state_filter" on:change=move |ev| set("is_active", event_target_value(&ev))>
                    <option value="">"Any"</option>
                    <option value="true" selected=move || part("is_active").as_deref() == Some("true")>"Active"</option>
                    <option value="false" selected=move || part("is_active").as_deref() == Some("false")>"Inactive"</option>
                </select>
            </div>
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
                view! {
                    <table class="table">
                        <caption class="unseen">"API keys, newest first"</caption>
                        <thead>
                            <tr>
                                <th scope="col">"Name"</th>
                                <th scope="col">"Key"</th>
                                <th scope="col">"Plan"</th>
                                <th scope="col">"State"</th>
                                <th scope="col">"Last used"</th>
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
                                            <th scope="row" dir="auto"><a href=format!("/console/api-keys/{}", key.id)><span class="clamp">{key.name.clone()}</span></a></th>
                                            <td data-label="Key"><code>{key.prefix.clone()}"…"</code></td>
                                            <td data-label="Plan" dir="auto">{move || plan_name(plan_id)}</td>
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

#[component]
fn CreateDialog(
    open: RwSignal<bool>,
    plans: Loader<Page<Plan>>,
    changed: Callback<()>,
) -> impl IntoView {
    let made = RwSignal::new(None::<CreatedApiKey>);
    let showing = RwSignal::new(false);
    view! {
        <Modal open title="New API key">
            <Shown
                loader=plans
                show=move |page| {
                    if page.items.is_empty() {
                        view! {
                            <p>"A key belongs to a plan, and there is none yet."</p>
                            <div class="actions end">
                                <button class="button" on:click=move |_| open.set(false)>"Cancel"</button>
                                <a class="button first" href="/console/plans?new=1">"Make a plan"</a>
                            </div>
                        }
                            .into_any()
                    } else {
                        view! {
                            <CreateForm plans=page.items open done=Callback::new(move |key: CreatedApiKey| {
                                made.set(Some(key));
                                showing.set(true);
                                changed.run(());
                            })/>
                        }
                            .into_any()
                    }
                }
            />
        </Modal>
        <TextOnce made open=showing/>
    }
}

#[component]
fn CreateForm(
    plans: Vec<Plan>,
    open: RwSignal<bool>,
    done: Callback<CreatedApiKey>,
) -> impl IntoView {
    let name = RwSignal::new(String::new());
    let plan = RwSignal::new(
        plans
            .first()
            .map(|it| it.id.to_string())
            .unwrap_or_default(),
    );
    let rpm = RwSignal::new(String::new());
    let expires = RwSignal::new(String::new());
    let busy = RwSignal::new(false);
    let failure = RwSignal::new(None::<Failure>);
    let rpm_wrong = RwSignal::new(None::<String>);
    let of = move |field: &'static str| Signal::derive(move || failure.get()?.of_field(field));
    let rest = Signal::derive(move || {
        let failure = failure.get()?;
        (!failure.names_fields()).then(|| failure.text())
    });
    let options = plans
        .into_iter()
        .map(|plan| {
            let text = format!(
                "{}, {} a minute",
                plan.name,
                text::number(plan.default_rpm.into())
            );
            (plan.id.to_string(), text)
        })
        .collect::<Vec<_>>();
    let submit = move |ev: SubmitEvent| {
        ev.prevent_default();
        failure.set(None);
        rpm_wrong.set(None);
        let rpm_override = match optional_rate(&rpm.get_untracked()) {
            Ok(rpm) => rpm,
            Err(wrong) => return rpm_wrong.set(Some(wrong.to_owned())),
        };
        let Ok(plan_id) = plan.get_untracked().parse() else {
            return;
        };
        let body = CreateApiKey {
            name: name.get_untracked(),
            plan_id,
            expires_at: local_time(&expires.get_untracked()),
            rpm_override,
        };
        busy.set(true);
        spawn_local(async move {
            match api::create_api_key(body).await {
                Ok(made) => {
                    open.set(false);
                    done.run(made);
                }
                Err(refused) => failure.set(Some(refused)),
            }
            let _ = busy.try_set(false);
        });
    };
    view! {
        <form on:submit=submit>
            <Alert text=rest/>
            <Field id="key_name" label="Name" value=name required=true hint="Who holds it, such as the mobile app." error=of("name")/>
            <SelectField id="key_plan" label="Plan" value=plan options error=of("plan_id")/>
            <div class="pair">
                <Field id="key_rpm" label="Own rate (optional)" value=rpm numeric=true hint="Requests a minute, in place of the plan's." error=Signal::derive(move || rpm_wrong.get().or_else(|| of("rpm_override").get()))/>
                <Field id="key_expires" label="Expires (optional)" kind="datetime-local" value=expires hint="From then on it is refused." error=of("expires_at")/>
            </div>
            <div class="actions end">
                <button type="button" class="button" on:click=move |_| open.set(false)>"Cancel"</button>
                <button class="button first" disabled=busy>"Make key"</button>
            </div>
        </form>
    }
}

/// What a field for a local time holds.
fn local_time(text: &str) -> Option<quota_common::Timestamp> {
    if text.is_empty() {
        return None;
    }
    let iso = js_sys::Date::new(&text.into())
        .to_iso_string()
        .as_string()?;
    iso.parse().ok()
}

/// A key's text, for the only time: it goes when its holder says that it is stored.
#[component]
pub fn TextOnce(made: RwSignal<Option<CreatedApiKey>>, open: RwSignal<bool>) -> impl IntoView {
    let stored = RwSignal::new(false);
    let session = session();
    Effect::new(move |_| {
        if let Some(made) = made.get()
            && let Some(text) = made.key
        {
            stored.set(false);
            session.known_keys.update(|known| {
                known.insert(made.api_key.id, text);
            });
        }
    });
    let text = Signal::derive(move || made.get().and_then(|it| it.key).unwrap_or_default());
    let name = move || made.get().map(|it| it.api_key.name).unwrap_or_default();
    let curl = Signal::derive(move || text::curl(&api::origin(), &text.get()));
    view! {
        <Modal open firm=true wide=true title=Signal::derive(move || format!("The key of {}", text::named(&name())))>
            <p>"This is the only time it is shown. It is stored nowhere; a key that is lost is rotated."</p>
            <CodeBlock id="key-text" text what="the key"/>
            <h3>"Try it"</h3>
            <CodeBlock text=curl what="the curl line"/>
            <TryIt text/>
            <div class="actions end gate">
                <label class="check">
                    <input type="checkbox" name="stored" bind:checked=stored/>
                    <span>"I stored it"</span>
                </label>
                <button
                    class="button first"
                    disabled=move || !stored.get()
                    on:click=move |_| {
                        open.set(false);
                        made.set(None);
                    }
                >
                    "Done"
                </button>
            </div>
        </Modal>
    }
}
