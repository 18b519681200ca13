//! The page of one API key: its limits, usage, and actions, and a form to test it.

use leptos::{prelude::*, task::spawn_local};
use quota_common::{
    ApiKeyId,
    api_key::{ApiKey, UpdateApiKey},
    plan::Plan,
};

use super::{
    create_api_key::NewKeyDialog,
    create_button::can_create,
    edit_api_key::EditDialog,
    key_status::key_status,
    key_usage::{KeyActivity, KeyUsage, LimitMeters},
    plan_list::{PlansError, find_plan, load_plans},
    rotate_api_key::RotateDialog,
    try_it::{TryIt, other_key},
};
use crate::{
    api,
    clock::now,
    component::{
        Async, Card, Confirm, Confirmation, CopyButton, Field, FormState, Loader, NewSecret,
        PageHeader, Toasts, busy_attr, load,
    },
    model::{
        key::{key_details, limit_details},
        text,
    },
    reactive::{effect, flag_memo, text_memo},
    route::route,
    session::session,
};

/// The dialogs. They are outside the key details, which are rendered again after each load. Otherwise, each load would
/// discard typed text or a new key in a dialog.
#[derive(Clone, Copy)]
struct Dialogs {
    editing: RwSignal<bool>,
    rotating: RwSignal<bool>,
    deactivating: Confirmation,
    deleting: Confirmation,
    /// Whether a status change is in progress.
    busy: RwSignal<bool>,
}

#[component]
pub fn ApiKeyPage(id: ApiKeyId) -> impl IntoView {
    let toasts = expect_context::<Toasts>();
    let loader = load(move || api::get_api_key(id));
    let plans = load_plans();
    let usage = KeyUsage::load(id);
    let on_sent = Callback::new(move |()| {
        loader.reload_after_requests();
        usage.reload_after_requests();
    });
    let name = Signal::derive(move || loader.ready().map(|key| key.name).unwrap_or_default());
    let title = Signal::derive(move || {
        Some(name.get())
            .filter(|name| !name.is_empty())
            .unwrap_or_else(|| "API key".to_owned())
    });
    let is_loaded = flag_memo(move || loader.with(|_| ()).is_some());
    // Once the key has been loaded, retries the parts of the page that could not be loaded.
    effect(move || {
        if is_loaded.get() {
            plans.retry();
            usage.retry();
        }
    });
    let deactivating = Confirmation::new();
    let busy = deactivating.busy;
    let dialogs = Dialogs {
        editing: RwSignal::new(false),
        rotating: RwSignal::new(false),
        deactivating,
        // This dialog shares `busy`, because it also offers to deactivate the key.
        deleting: Confirmation {
            busy,
            ..Confirmation::new()
        },
        busy,
    };
    let set_active = Callback::new(move |active: bool| {
        dialogs.busy.set(true);
        // The toast may appear on another page, so it needs the key's name.
        let key = text::quoted(&name.get_untracked());
        spawn_local(async move {
            if change_status(id, &key, active, loader, toasts).await && !active {
                toasts.succeed_with_undo(format!("Key {key} deactivated"), move || {
                    let key = key.clone();
                    spawn_local(async move {
                        change_status(id, &key, true, loader, toasts).await;
                    });
                });
            }
            let _ = dialogs.busy.try_set(false);
            let _ = dialogs.deactivating.open.try_set(false);
            let _ = dialogs.deleting.open.try_set(false);
        });
    });
    let rotated = NewSecret::new();
    open_dialog_from_query(dialogs, loader);
    view! {
        <p class="breadcrumb"><a href="/console/api-keys">"API keys"</a></p>
        <PageHeader title>{move || loader.ready().map(|key| key_status(&key))}</PageHeader>
        <Async
            loader
            what="this API key"
            show=move |key| {
                view! {
                    <PlansError plans/>
                    <KeyDetails key plans usage dialogs set_active/>
                }
            }
        />
        // If the key itself cannot be loaded, showing one error is enough.
        {move || {
            is_loaded
                .get()
                .then(|| {
                    view! {
                        <KeyActivity key=loader id usage/>
                        <TrySection id loader on_sent/>
                    }
                })
        }}
        <EditDialog
            loader
            plans
            open=dialogs.editing
            // Replicas may apply the new limits up to a second later, so the usage is loaded several times.
            on_saved=Callback::new(move |()| usage.reload_after_requests())
        />
        <RotateDialog id loader open=dialogs.rotating rotated/>
        <Confirm
            confirmation=dialogs.deactivating
            title=Signal::derive(move || format!("Deactivate key {}?", text::quoted(&name.get())))
            message="Within a second, requests with this key will be rejected (401). You can activate it again later."
            action="Deactivate key"
            run=Callback::new(move |()| set_active.run(false))
        />
        <DeleteDialog id loader dialogs set_active/>
        <NewKeyDialog new=rotated on_close=on_sent/>
    }
}

/// Opens the dialog named by the `open` query parameter as soon as the key is loaded, and removes this parameter. If
/// the user's role cannot change keys, only removes the parameter.
fn open_dialog_from_query(dialogs: Dialogs, loader: Loader<ApiKey>) {
    let route = route();
    let own_path = route.path.get_untracked();
    let is_allowed = can_create();
    effect(move || {
        let name = route.query.with(|query| query.get("open"));
        let is_ready = loader.with(|_| ()).is_some();
        let Some(name) = name.filter(|_| is_ready) else {
            return;
        };
        if route.path.with_untracked(|path| *path != own_path) {
            return;
        }
        match &*name {
            _ if !is_allowed => {}
            "edit" => dialogs.editing.set(true),
            "rotate" => dialogs.rotating.set(true),
            "deactivate" => dialogs.deactivating.ask(),
            "delete" => dialogs.deleting.ask(),
            _ => {}
        }
        let query = route.query.get_untracked().with("open", "");
        route.replace(&format!("{own_path}{query}"));
    });
}

/// Activates or deactivates the key. Reports errors and successful activation in a toast. Returns whether the call
/// succeeded.
async fn change_status(
    id: ApiKeyId,
    name: &str,
    active: bool,
    loader: Loader<ApiKey>,
    toasts: Toasts,
) -> bool {
    let body = UpdateApiKey {
        is_active: Some(active),
        ..UpdateApiKey::default()
    };
    let result = api::update_api_key(id, body).await;
    match &result {
        Ok(_) if active => toasts.succeed(format!("Key {name} activated")),
        Ok(_) => {}
        Err(error) => toasts.fail(error),
    }
    loader.reload();
    result.is_ok()
}

#[component]
fn TrySection(id: ApiKeyId, loader: Loader<ApiKey>, on_sent: Callback<()>) -> impl IntoView {
    let known_keys = session().known_keys;
    let pasted = RwSignal::new(String::new());
    // Empty if this page does not have the full key.
    let known = text_memo(move || {
        known_keys.with(|keys| {
            let own = keys.iter().find(|(it, _)| *it == id);
            own.map(|(_, secret)| secret.clone()).unwrap_or_default()
        })
    });
    let is_known = move || known.with(|known| !known.is_empty());
    let secret = Signal::derive(move || {
        if is_known() {
            known.get()
        } else {
            pasted.get()
        }
    });
    // Requests with a different key, pasted by mistake, would count against that key's limits.
    let mistake = move || {
        let key = loader.ready()?;
        let pasted = pasted.get();
        let pasted = pasted.trim();
        let is_other = !pasted.is_empty()
            && !pasted.starts_with(&*key.prefix)
            && !key.prefix.starts_with(pasted);
        is_other.then(|| other_key(&key))
    };
    view! {
        <Card id="try-title" title="Try it">
            {move || {
                if is_known() {
                    view! {
                        <p class="muted">"The full key is available until you close or reload this page, or sign out."</p>
                        <p class="known-key"><CopyButton text=secret what="key"/></p>
                    }
                        .into_any()
                } else {
                    view! {
                        <Field form=FormState::new() name="pasted_key" label="Key" kind="password" value=pasted placeholder="qk_…" hint="Quota doesn't store the full key. Paste it to send requests."/>
                        <div role="status">{move || mistake().map(|text| view! { <p class="alert warn">{text}</p> })}</div>
                    }
                        .into_any()
                }
            }}
            <TryIt secret key=Signal::derive(move || loader.ready()) on_sent/>
        </Card>
    }
}

#[component]
fn KeyDetails(
    key: ApiKey,
    plans: Loader<Vec<Plan>>,
    usage: KeyUsage,
    dialogs: Dialogs,
    set_active: Callback<bool>,
) -> impl IntoView {
    let can_manage = session().can_manage();
    let id = key.id.to_string();
    let (is_active, busy) = (key.is_active, dialogs.busy);
    let time_zone = session().time_zone();
    let limited = key.clone();
    let limits = move || {
        let plan = find_plan(plans, limited.plan_id);
        plan.map(|plan| limit_details(&limited, &plan, &time_zone).to_string())
            .unwrap_or_default()
    };
    let details = move || {
        let plan = find_plan(plans, key.plan_id);
        key_details(&key, plan.as_ref(), now()).to_string()
    };
    view! {
        <Card id="key-limits" title="Limits">
            <div inner_html=limits></div>
            <LimitMeters limits=usage.limits/>
        </Card>
        <Card id="key-details" title="Details">
            <div inner_html=details></div>
            <p class="key-id">
                <span class="muted small-text">"Key ID"</span>
                <code>{id.clone()}</code>
                <CopyButton text=Signal::derive(move || id.clone()) what="key ID"/>
            </p>
            {can_manage
                .then(|| {
                    view! {
                        <div class="actions">
                            <button class="button" data-focus-key="edit" on:click=move |_| dialogs.editing.set(true)>"Edit"</button>
                            <button class="button" data-focus-key="rotate" on:click=move |_| dialogs.rotating.set(true)>"Rotate"</button>
                            {if is_active {
                                view! { <button class="button" data-focus-key="status" aria-disabled=busy_attr(busy) on:click=move |_| dialogs.deactivating.ask()>"Deactivate"</button> }.into_any()
                            } else {
                                view! { <button class="button primary" data-focus-key="status" aria-disabled=busy_attr(busy) on:click=move |_| set_active.run(true)>"Activate"</button> }.into_any()
                            }}
                            <button class="button danger" data-focus-key="delete" on:click=move |_| dialogs.deleting.ask()>"Delete"</button>
                        </div>
                    }
                })}
        </Card>
    }
}

#[component]
fn DeleteDialog(
    id: ApiKeyId,
    loader: Loader<ApiKey>,
    dialogs: Dialogs,
    set_active: Callback<bool>,
) -> impl IntoView {
    let toasts = expect_context::<Toasts>();
    let route = route();
    let Confirmation { busy, failure, .. } = dialogs.deleting;
    let run = Callback::new(move |()| {
        let name = untrack(move || loader.ready()).map(|key| key.name);
        busy.set(true);
        spawn_local(async move {
            match api::delete_api_key(id).await {
                Ok(()) => {
                    let name = name.unwrap_or_default();
                    toasts.succeed(format!("Key {} deleted", text::quoted(&name)));
                    // Leaves the page of the deleted key, unless the user has already left the page.
                    if busy.try_set(false).is_none() {
                        route.replace("/console/api-keys");
                    }
                }
                Err(error) => {
                    let _ = failure.try_set(Some(error));
                    let _ = busy.try_set(false);
                }
            }
        });
    });
    let message = move || {
        let last_used = loader.ready().and_then(|key| key.last_used_at);
        let usage = last_used.map_or_else(
            || "Never used.".to_owned(),
            |at| {
                let at = at.inner().timestamp_millis();
                format!("Last used {}.", text::relative(at, now()))
            },
        );
        format!(
            "{usage} Within a second, requests with this key will be rejected (401). This can't be undone."
        )
    };
    let alternative = (
        "Deactivate instead",
        Callback::new(move |()| set_active.run(false)),
    );
    let is_active = Signal::derive(move || loader.ready().is_some_and(|key| key.is_active));
    view! {
        <Confirm
            confirmation=dialogs.deleting
            title=Signal::derive(move || {
                let name = loader.ready().map(|key| key.name).unwrap_or_default();
                format!("Delete key {}?", text::quoted(&name))
            })
            message=Signal::derive(message)
            action="Delete key"
            alternative
            has_alternative=is_active
            run
        />
    }
}
