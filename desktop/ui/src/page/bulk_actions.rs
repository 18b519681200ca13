use leptos::{prelude::*, task::spawn_local};
use quota_common::{
    ApiKeyId, PlanId,
    api_key::{ApiKey, UpdateApiKey},
    plan::Plan,
};

use crate::{
    api::{self, CallResult},
    clock::now,
    component::{
        Confirm, Confirmation, DialogForm, FormState, Loader, Modal, SelectField, Toasts,
        focus_soon,
    },
    model::{
        bulk::{BulkAction, moved},
        text,
    },
    reactive::effect,
};

const DAY_MS: i64 = 24 * 60 * 60 * 1000;

async fn apply(action: BulkAction, key: &ApiKey) -> CallResult<()> {
    match action {
        BulkAction::Activate => set_active(key.id, true).await,
        BulkAction::Deactivate => set_active(key.id, false).await,
        BulkAction::Delete => api::delete_api_key(key.id).await,
    }
}

async fn set_active(id: ApiKeyId, active: bool) -> CallResult<()> {
    let body = UpdateApiKey {
        is_active: Some(active),
        ..UpdateApiKey::default()
    };
    api::update_api_key(id, body).await.map(drop)
}

pub fn activate(keys: Vec<(ApiKeyId, String)>, toasts: Toasts, on_changed: Callback<()>) {
    spawn_local(async move {
        let mut last_error = None;
        for (id, _) in &keys {
            last_error = set_active(*id, true).await.err().or(last_error);
        }
        match (last_error, &keys[..]) {
            (Some(error), _) => toasts.fail(&error),
            (None, [(_, name)]) => toasts.succeed(format!("Key {} activated", text::quoted(name))),
            (None, keys) => toasts.succeed(BulkAction::Activate.outcome(keys.len(), 0, "")),
        }
        let _ = on_changed.try_run(());
    });
}

fn consequences(action: BulkAction, keys: &[ApiKey]) -> String {
    let names: Vec<&str> = keys.iter().map(|key| &*key.name).collect();
    let was_recently_used = |key: &&ApiKey| {
        key.last_used_at
            .is_some_and(|at| now() - at.inner().timestamp_millis() < DAY_MS)
    };
    action.consequences(&names, keys.iter().filter(was_recently_used).count())
}

#[component]
pub fn BulkActions(
    /// The keys on the current page.
    shown: Vec<ApiKeyId>,
    /// The number of keys on all pages.
    total: u64,
    selected: RwSignal<Vec<ApiKey>>,
    plans: Loader<Vec<Plan>>,
    on_changed: Callback<()>,
) -> impl IntoView {
    let moving = RwSignal::new(false);
    let toasts = expect_context::<Toasts>();
    let action = RwSignal::new(BulkAction::Activate);
    let confirmation = Confirmation::new();
    let count = Signal::derive(move || selected.with(Vec::len));
    let shown_count = shown.len();
    // Deselects keys that are no longer shown.
    effect(move || {
        if selected.with_untracked(|it| it.iter().any(|key| !shown.contains(&key.id))) {
            selected.update(|it| it.retain(|key| shown.contains(&key.id)));
        }
    });
    let run = Callback::new(move |()| {
        confirmation.busy.set(true);
        let (action, keys) = (action.get_untracked(), selected.get_untracked());
        spawn_local(async move {
            let mut failed = Vec::new();
            let mut last_error = String::new();
            for key in &keys {
                if let Err(error) = apply(action, key).await {
                    last_error = error.full_message();
                    failed.push(key.clone());
                }
            }
            let outcome = action.outcome(keys.len() - failed.len(), failed.len(), &last_error);
            let was_active =
                |key: &&ApiKey| key.is_active && failed.iter().all(|it| it.id != key.id);
            let changed = keys.iter().filter(was_active);
            let changed: Vec<_> = changed.map(|key| (key.id, key.name.clone())).collect();
            if failed.is_empty() && action == BulkAction::Deactivate && !changed.is_empty() {
                toasts.succeed_with_undo(outcome, move || {
                    activate(changed.clone(), toasts, on_changed);
                });
            } else if failed.is_empty() {
                toasts.succeed(outcome);
            } else {
                toasts.fail_with(outcome);
            }
            let _ = confirmation.busy.try_set(false);
            let _ = confirmation.open.try_set(false);
            // Keys for which the action failed remain selected.
            if selected.try_set(failed).is_none() {
                focus_soon("#content");
                on_changed.run(());
            }
        });
    });
    view! {
        <div class="bulk" role="group" aria-label="Bulk actions">
            <span role="status">
                {move || match count.get() {
                    0 if total == 1 => "1 key".to_owned(),
                    0 => format!("{} keys", text::list_total(total)),
                    n => format!("{n} of {shown_count} selected"),
                }}
            </span>
            {move || (count.get() > 0).then(|| view! { <button class="button small" on:click=move |_| moving.set(true)>"Move"</button> })}
            {move || {
                (count.get() > 0)
                    .then(|| {
                        BulkAction::ALL
                            .map(|it| {
                                view! {
                                    <button
                                        class="button small"
                                        class:danger={it == BulkAction::Delete}
                                        on:click=move |_| {
                                            action.set(it);
                                            confirmation.ask();
                                        }
                                    >
                                        {it.label()}
                                    </button>
                                }
                            })
                            .into_iter()
                            .collect_view()
                    })
            }}
        </div>
        <MoveDialog open=moving selected plans on_changed/>
        <Confirm
            confirmation
            title=Signal::derive(move || action.get().title(count.get()))
            message=Signal::derive(move || selected.with(|selected| consequences(action.get(), selected)))
            action=Signal::derive(move || action.get().button(count.get()))
            danger=Signal::derive(move || action.get() != BulkAction::Activate)
            phrase=Signal::derive(move || action.get().phrase(count.get()))
            run
        />
    }
}

#[component]
fn MoveDialog(
    open: RwSignal<bool>,
    selected: RwSignal<Vec<ApiKey>>,
    plans: Loader<Vec<Plan>>,
    on_changed: Callback<()>,
) -> impl IntoView {
    let title = move || {
        let count = selected.with(Vec::len) as u64;
        format!("Move {} to another plan", text::count(count, "key", "keys"))
    };
    view! {
        <Modal open panel=true title=Signal::derive(title)>
            <MoveForm open selected plans on_changed/>
        </Modal>
    }
}

#[component]
fn MoveForm(
    open: RwSignal<bool>,
    selected: RwSignal<Vec<ApiKey>>,
    plans: Loader<Vec<Plan>>,
    on_changed: Callback<()>,
) -> impl IntoView {
    let toasts = expect_context::<Toasts>();
    let form = FormState::new();
    let plan = RwSignal::new(String::new());
    let options = Signal::derive(move || {
        let choose = (String::new(), "Choose a plan".to_owned());
        let plans = plans.ready().unwrap_or_default();
        let plans = plans
            .into_iter()
            .map(|plan| (plan.id.to_string(), plan.name));
        [choose].into_iter().chain(plans).collect::<Vec<_>>()
    });
    let submit = move || {
        let id = plan.get_untracked();
        let Ok(plan_id) = id.parse::<PlanId>() else {
            return;
        };
        let name = options.with_untracked(|all| all.iter().find(|(it, _)| *it == id).cloned());
        let name = name.map(|(_, name)| name).unwrap_or_default();
        let keys = selected.get_untracked();
        spawn_local(async move {
            let (mut failed, mut last_error) = (Vec::new(), String::new());
            for key in &keys {
                let body = UpdateApiKey {
                    plan_id: Some(plan_id),
                    ..UpdateApiKey::default()
                };
                if let Err(error) = api::update_api_key(key.id, body).await {
                    last_error = error.full_message();
                    failed.push(key.clone());
                }
            }
            let text = moved(keys.len() - failed.len(), &name, failed.len(), &last_error);
            if failed.is_empty() {
                toasts.succeed(text);
            } else {
                toasts.fail_with(text);
            }
            let _ = form.busy.try_set(false);
            let _ = open.try_set(false);
            let _ = selected.try_set(failed);
            let _ = on_changed.try_run(());
        });
    };
    view! {
        <DialogForm form open action="Move keys" submit>
            <SelectField form name="plan_id" id="move_plan" label="Plan" value=plan options required=true/>
            <p class="muted">"Within a second, the plan's limits will apply to these keys. Usage isn't reset. Rate overrides are kept."</p>
        </DialogForm>
    }
}

/// Selects or deselects all keys on the page.
#[component]
pub fn SelectAll(keys: Vec<ApiKey>, selected: RwSignal<Vec<ApiKey>>) -> impl IntoView {
    let all = keys.len();
    let count = move || selected.with(Vec::len);
    view! {
        <label class="check">
            <input
                type="checkbox"
                data-focus-key="select-all"
                prop:checked=move || count() == all
                prop:indeterminate=move || (1..all).contains(&count())
                on:change=move |ev| selected.set(if event_target_checked(&ev) { keys.clone() } else { Vec::new() })
            />
            <span>"Select all on this page"</span>
        </label>
    }
}
