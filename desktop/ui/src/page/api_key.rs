//! One API key: what it is, what can be done with it, and a place to try it.

use leptos::{ev::SubmitEvent, prelude::*, task::spawn_local};
use quota_common::{
    ApiKeyId,
    api_key::{ApiKey, CreatedApiKey, RotateApiKey, UpdateApiKey},
    plan::Plan,
};

use super::{
    api_keys::{NoPlans, State, load_plans, plan_name},
    new_api_key::{TextOnce, in_field, local_time},
    try_it::TryIt,
};
use crate::{
    api::{self, Failure},
    app::session,
    component::{
        Alert, Confirm, CopyButton, Field, Head, Loader, Modal, SelectField, Shown, Toasts, When,
        held, load, now,
    },
    model::{
        form::{changed, optional_rate},
        text,
    },
    route::route,
};

#[component]
pub fn ApiKeyPage(id: ApiKeyId) -> impl IntoView {
    let loader = load(move || api::get_api_key(id));
    let title = Signal::derive(move || {
        loader
            .ready()
            .map_or_else(|| "API key".to_owned(), |key| key.name)
    });
    let known = session().known_keys;
    let typed = RwSignal::new(String::new());
    let known_text = Memo::new(move |_| {
        known.with(|known| {
            let own = known.iter().find(|(it, _)| *it == id);
            own.map(|(_, text)| text.clone())
        })
    });
    let text = Signal::derive(move || known_text.get().unwrap_or_else(|| typed.get()));
    // Not of the facts, which are drawn anew whenever they are loaded: a new text is shown once.
    let rotating = RwSignal::new(false);
    let made = RwSignal::new(None::<CreatedApiKey>);
    let showing = RwSignal::new(false);
    let done = Callback::new(move |key: CreatedApiKey| {
        made.set(Some(key));
        showing.set(true);
    });
    Effect::new(move |was: Option<bool>| {
        let shown = showing.get();
        if was == Some(true) && !shown {
            loader.reload();
        }
        shown
    });
    view! {
        <p class="up"><a href="/console/api-keys">"API keys"</a></p>
        <Head title/>
        <Shown loader show=move |key| view! { <Facts key loader rotating/> }/>
        <section class="card" aria-labelledby="try-title">
            <h2 id="try-title">"Try it"</h2>
            {move || {
                if known_text.get().is_some() {
                    view! {
                        <p class="quiet">"The text of this key is still in this window; it goes with it."</p>
                        <p class="known"><CopyButton text what="the key"/></p>
                    }
                        .into_any()
                } else {
                    view! {
                        <Field id="try_text" label="Key" kind="password" value=typed placeholder="qk_…" hint="Its text is not stored here. Paste it to send requests with it."/>
                    }
                        .into_any()
                }
            }}
            <TryIt text/>
        </section>
        <RotateDialog id loader open=rotating done/>
        <TextOnce made open=showing/>
    }
}

#[component]
fn Facts(key: ApiKey, loader: Loader<ApiKey>, rotating: RwSignal<bool>) -> impl IntoView {
    let toasts = expect_context::<Toasts>();
    let may = session()
        .me
        .get_untracked()
        .is_some_and(|me| me.tenant.role.may_manage());
    let plans = load_plans();
    let plan_id = key.plan_id;
    let (editing, deleting) = (RwSignal::new(false), RwSignal::new(false));
    let switching = RwSignal::new(false);
    let busy = RwSignal::new(false);
    let id = key.id;
    let is_active = key.is_active;
    let switch = move || {
        busy.set(true);
        spawn_local(async move {
            let body = UpdateApiKey {
                is_active: Some(!is_active),
                ..UpdateApiKey::default()
            };
            match api::update_api_key(id, body).await {
                Ok(_) => {
                    toasts.say(if is_active {
                        "The key is switched off."
                    } else {
                        "The key is switched on."
                    });
                    loader.reload();
                }
                Err(failure) => toasts.fail(failure.text()),
            }
            let _ = busy.try_set(false);
            let _ = switching.try_set(false);
        });
    };
    // What a switch comes to is said by a toast.
    let never = Signal::derive(|| None::<String>);
    let name = text::named(&key.name);
    view! {
        <NoPlans plans/>
        <section class="card">
            <dl class="facts">
                <div><dt>"State"</dt><dd><State key=key.clone()/></dd></div>
                <div><dt>"Key"</dt><dd><code>{key.prefix.clone()}"…"</code></dd></div>
                <div><dt>"Plan"</dt><dd dir="auto"><span class="clamp">{move || plan_name(plans, plan_id)}</span></dd></div>
                <div><dt>"Own rate"</dt><dd>{key.rpm_override.map_or_else(|| "the plan's".to_owned(), |rpm| format!("{} a minute", text::number(rpm.into())))}</dd></div>
                <div><dt>"Last used"</dt><dd>{match key.last_used_at {
                    Some(at) => view! { <When at/> }.into_any(),
                    None => view! { <span class="quiet">"unused"</span> }.into_any(),
                }}</dd></div>
                <div><dt>"Expires"</dt><dd>{match key.expires_at {
                    Some(at) => view! { <When at/> }.into_any(),
                    None => view! { <span class="quiet">"never"</span> }.into_any(),
                }}</dd></div>
                {key.previous_expires_at.map(|at| view! { <div><dt>"Text before the rotation"</dt><dd>"works, ends " <When at/></dd></div> })}
                <div><dt>"Made"</dt><dd><When at=key.created_at/></dd></div>
            </dl>
            {may
                .then(|| {
                    view! {
                        <div class="actions">
                            {if is_active {
                                view! { <button class="button" data-keep="switch" aria-disabled=held(busy) on:click=move |_| switching.set(true)>"Deactivate"</button> }.into_any()
                            } else {
                                view! { <button class="button first" data-keep="switch" aria-disabled=held(busy) on:click=move |_| switch()>"Activate"</button> }.into_any()
                            }}
                            <button class="button" data-keep="edit" on:click=move |_| editing.set(true)>"Edit"</button>
                            <button class="button" data-keep="rotate" on:click=move |_| rotating.set(true)>"Rotate"</button>
                            <button class="button danger" on:click=move |_| deleting.set(true)>"Delete"</button>
                        </div>
                    }
                })}
        </section>
        <Confirm
            open=switching
            title=format!("Deactivate {name}?")
            breaks="Within a second every request with this key is refused with 401. It can be switched on again."
            action="Deactivate key"
            busy
            failure=never
            run=Callback::new(move |()| switch())
        />
        <EditDialog key=key.clone() plans open=editing loader/>
        <DeleteDialog id name open=deleting/>
    }
}

#[component]
fn DeleteDialog(id: ApiKeyId, name: String, open: RwSignal<bool>) -> impl IntoView {
    let toasts = expect_context::<Toasts>();
    let route = route();
    let busy = RwSignal::new(false);
    let failure = RwSignal::new(None::<String>);
    let gone = format!("The key {name} is deleted.");
    let run = Callback::new(move |()| {
        let gone = gone.clone();
        busy.set(true);
        spawn_local(async move {
            match api::delete_api_key(id).await {
                Ok(()) => {
                    toasts.say(gone);
                    // Unless one went elsewhere meanwhile; back to what is deleted leads nothing.
                    if busy.try_set(false).is_none() {
                        route.replace("/console/api-keys");
                    }
                }
                Err(refused) => {
                    failure.set(Some(refused.text()));
                    busy.set(false);
                }
            }
        });
    });
    view! {
        <Confirm
            open
            title=format!("Delete {name}?")
            breaks="Within a second every request with this key is refused with 401. A key that is deleted does not come back."
            action="Delete key"
            busy
            failure
            run
        />
    }
}

#[component]
fn RotateDialog(
    id: ApiKeyId,
    loader: Loader<ApiKey>,
    open: RwSignal<bool>,
    done: Callback<CreatedApiKey>,
) -> impl IntoView {
    let busy = RwSignal::new(false);
    let name = move || loader.ready().map(|key| key.name).unwrap_or_default();
    view! {
        <Modal open firm=busy title=Signal::derive(move || format!("Rotate {}", text::named(&name())))>
            <RotateForm id loader open busy done/>
        </Modal>
    }
}

#[component]
fn RotateForm(
    id: ApiKeyId,
    loader: Loader<ApiKey>,
    open: RwSignal<bool>,
    busy: RwSignal<bool>,
    done: Callback<CreatedApiKey>,
) -> impl IntoView {
    let grace = RwSignal::new("86400".to_owned());
    let failure = RwSignal::new(None::<String>);
    let options = [
        ("0", "Ends at once"),
        ("3600", "Works for an hour"),
        ("86400", "Works for a day"),
        ("604800", "Works for a week"),
        ("2592000", "Works for 30 days"),
    ]
    .map(|(value, text)| (value.to_owned(), text.to_owned()))
    .to_vec();
    // A key has one text beside its own.
    let earlier = move || {
        let until = loader.ready()?.previous_expires_at;
        until.filter(|at| at.inner().timestamp_millis() > now())
    };
    let submit = move |ev: SubmitEvent| {
        ev.prevent_default();
        busy.set(true);
        failure.set(None);
        let body = RotateApiKey {
            grace_seconds: grace.get_untracked().parse::<u32>().ok().map(Into::into),
        };
        spawn_local(async move {
            let answer = api::rotate_api_key(id, body).await;
            let _ = busy.try_set(false);
            match answer {
                Ok(made) => {
                    let _ = open.try_set(false);
                    let _ = done.try_run(made);
                }
                Err(refused) => {
                    let _ = failure.try_set(Some(refused.text()));
                }
            }
        });
    };
    view! {
        <form on:submit=submit>
            <p>"The key gets a new text. The one before works on for a while, so that its holder can change over."</p>
            {move || {
                earlier()
                    .map(|at| view! { <p class="alert warn">"It was rotated before: the text from before that, which would end " <When at/> ", ends now."</p> })
            }}
            <Alert text=failure/>
            <SelectField id="grace" label="The text before" value=grace options/>
            <div class="actions end">
                <button type="button" class="button" aria-disabled=held(busy) on:click=move |_| open.set(false)>"Cancel"</button>
                <button class="button first" aria-disabled=held(busy)>"Rotate key"</button>
            </div>
        </form>
    }
}

#[component]
fn EditDialog(
    key: ApiKey,
    plans: Loader<Vec<Plan>>,
    open: RwSignal<bool>,
    loader: Loader<ApiKey>,
) -> impl IntoView {
    view! {
        <Modal open title="Edit the key">
            <EditForm key=key.clone() plans open loader/>
        </Modal>
    }
}

#[component]
fn EditForm(
    key: ApiKey,
    plans: Loader<Vec<Plan>>,
    open: RwSignal<bool>,
    loader: Loader<ApiKey>,
) -> impl IntoView {
    let toasts = expect_context::<Toasts>();
    let name = RwSignal::new(key.name.clone());
    let plan = RwSignal::new(key.plan_id.to_string());
    let rpm = RwSignal::new(
        key.rpm_override
            .map(|it| it.to_string())
            .unwrap_or_default(),
    );
    let was = StoredValue::new(key.expires_at.map(in_field).unwrap_or_default());
    let expires = RwSignal::new(was.get_value());
    let busy = RwSignal::new(false);
    let failure = RwSignal::new(None::<Failure>);
    let rpm_wrong = RwSignal::new(None::<String>);
    let plan_id = key.plan_id;
    let options = Signal::derive(move || {
        let plans = plans.ready().unwrap_or_default();
        // As long as the plans are not there, the key's own is.
        let own = (!plans.iter().any(|plan| plan.id == plan_id))
            .then(|| (plan_id.to_string(), "…".to_owned()));
        own.into_iter()
            .chain(
                plans
                    .into_iter()
                    .map(|plan| (plan.id.to_string(), plan.name)),
            )
            .collect::<Vec<_>>()
    });
    let of = move |field: &'static str| Signal::derive(move || failure.get()?.of_field(field));
    let rest = Signal::derive(move || {
        let failure = failure.get()?;
        (!failure.names_fields()).then(|| failure.text())
    });
    let submit = move |ev: SubmitEvent| {
        ev.prevent_default();
        failure.set(None);
        rpm_wrong.set(None);
        let rpm_override = match optional_rate(&rpm.get_untracked()) {
            Ok(rpm) => rpm,
            Err(wrong) => return rpm_wrong.set(Some(wrong.to_owned())),
        };
        let now = expires.get_untracked();
        let body = UpdateApiKey {
            name: changed(&key.name, name.get_untracked()).map(Into::into),
            plan_id: plan
                .get_untracked()
                .parse()
                .ok()
                .and_then(|plan| changed(&plan_id, plan)),
            rpm_override: changed(&key.rpm_override, rpm_override).map(|rpm| rpm.map(Into::into)),
            // The field is blunter than the time, which is not sent back as it was shown.
            expires_at: (now != was.get_value()).then(|| local_time(&now)),
            ..UpdateApiKey::default()
        };
        if body == UpdateApiKey::default() {
            return open.set(false);
        }
        let id = key.id;
        busy.set(true);
        spawn_local(async move {
            match api::update_api_key(id, body).await {
                Ok(_) => {
                    let _ = open.try_set(false);
                    toasts.say("The key is changed.");
                    loader.reload();
                }
                Err(refused) => {
                    let _ = failure.try_set(Some(refused));
                }
            }
            let _ = busy.try_set(false);
        });
    };
    view! {
        <form on:submit=submit>
            <Alert text=rest/>
            <Field id="edit_name" label="Name" value=name required=true error=of("name")/>
            <SelectField id="edit_plan" label="Plan" value=plan options error=of("plan_id")/>
            <div class="pair">
                <Field id="edit_rpm" label="Own rate (optional)" value=rpm numeric=true hint="Requests a minute, in place of the plan's." error=Signal::derive(move || rpm_wrong.get().or_else(|| of("rpm_override").get()))/>
                <Field id="edit_expires" label="Expires (optional)" kind="datetime-local" value=expires hint="From then on it is refused. Empty: never." error=of("expires_at")/>
            </div>
            <div class="actions end">
                <button type="button" class="button" on:click=move |_| open.set(false)>"Cancel"</button>
                <button class="button first" aria-disabled=held(busy)>"Save"</button>
            </div>
        </form>
    }
}
