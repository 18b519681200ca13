//! Actions on several API keys at once.

use leptos::{prelude::*, task::spawn_local};
use quota_common::{
    ApiKeyId,
    api_key::{ApiKey, UpdateApiKey},
};

use crate::{
    api::{self, CallError, CallResult},
    clock::now,
    component::{Confirm, Toasts, focus_soon},
    model::{bulk::BulkAction, text},
};

const DAY_MS: i64 = 24 * 60 * 60 * 1000;

async fn apply(action: BulkAction, key: &ApiKey) -> CallResult<()> {
    let set_active = |active| UpdateApiKey {
        is_active: Some(active),
        ..UpdateApiKey::default()
    };
    match action {
        BulkAction::Activate => api::update_api_key(key.id, set_active(true))
            .await
            .map(drop),
        BulkAction::Deactivate => api::update_api_key(key.id, set_active(false))
            .await
            .map(drop),
        BulkAction::Delete => api::delete_api_key(key.id).await,
    }
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
    /// The keys on this page.
    shown: Vec<ApiKeyId>,
    /// The number of keys on all pages.
    total: u64,
    selected: RwSignal<Vec<ApiKey>>,
    on_changed: Callback<()>,
) -> impl IntoView {
    let toasts = expect_context::<Toasts>();
    let action = RwSignal::new(BulkAction::Activate);
    let confirming = RwSignal::new(false);
    let busy = RwSignal::new(false);
    let count = Signal::derive(move || selected.with(Vec::len));
    let shown_count = shown.len();
    // Deselect keys that are no longer shown.
    Effect::new(move |_| {
        if selected.with_untracked(|it| it.iter().any(|key| !shown.contains(&key.id))) {
            selected.update(|it| it.retain(|key| shown.contains(&key.id)));
        }
    });
    let run = Callback::new(move |()| {
        busy.set(true);
        let (action, keys) = (action.get_untracked(), selected.get_untracked());
        spawn_local(async move {
            let mut failed = Vec::new();
            let mut last_error = String::new();
            for key in &keys {
                if let Err(error) = apply(action, key).await {
                    last_error = error.message();
                    failed.push(key.clone());
                }
            }
            let outcome = action.outcome(keys.len() - failed.len(), failed.len(), &last_error);
            if failed.is_empty() {
                toasts.succeed(outcome);
            } else {
                toasts.fail_with(outcome);
            }
            let _ = busy.try_set(false);
            let _ = confirming.try_set(false);
            // Keys that failed stay selected.
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
                    0 => text::count(total, "key", "keys"),
                    n => format!("{n} of {shown_count} selected"),
                }}
            </span>
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
                                            confirming.set(true);
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
        <Confirm
            open=confirming
            title=Signal::derive(move || action.get().title(count.get()))
            message=Signal::derive(move || selected.with(|selected| consequences(action.get(), selected)))
            action=Signal::derive(move || action.get().button(count.get()))
            danger=Signal::derive(move || action.get() != BulkAction::Activate)
            phrase=Signal::derive(move || action.get().phrase(count.get()))
            busy
            failure=Signal::derive(|| None::<CallError>)
            run
        />
    }
}

/// Selects all keys on the page, or none.
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
