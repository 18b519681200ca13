//! What is done to many API keys at once: chosen, confirmed, and done one after the other.

use leptos::{prelude::*, task::spawn_local};
use quota_common::{
    ApiKeyId,
    api_key::{ApiKey, UpdateApiKey},
};

use crate::{
    api,
    component::{Confirm, Toasts, focus_soon, now},
    model::{bulk::Deed, text},
};

const DAY_MS: i64 = 24 * 60 * 60 * 1000;

async fn act(deed: Deed, key: &ApiKey) -> api::Answer<()> {
    let switch = |on| UpdateApiKey {
        is_active: Some(on),
        ..UpdateApiKey::default()
    };
    match deed {
        Deed::Activate => api::update_api_key(key.id, switch(true)).await.map(drop),
        Deed::Deactivate => api::update_api_key(key.id, switch(false)).await.map(drop),
        Deed::Delete => api::delete_api_key(key.id).await,
    }
}

fn breaks(deed: Deed, keys: &[ApiKey]) -> String {
    let names: Vec<&str> = keys.iter().map(|key| &*key.name).collect();
    let lately = |key: &&ApiKey| {
        key.last_used_at
            .is_some_and(|at| now() - at.inner().timestamp_millis() < DAY_MS)
    };
    deed.breaks(&names, keys.iter().filter(lately).count())
}

#[component]
pub fn Bulk(
    /// Those that are shown.
    shown: Vec<ApiKeyId>,
    /// How many there are on all pages.
    total: u64,
    chosen: RwSignal<Vec<ApiKey>>,
    changed: Callback<()>,
) -> impl IntoView {
    let toasts = expect_context::<Toasts>();
    let deed = RwSignal::new(Deed::Activate);
    let asking = RwSignal::new(false);
    let busy = RwSignal::new(false);
    let count = Signal::derive(move || chosen.with(Vec::len));
    let all = shown.len();
    // What is not shown any more is not chosen.
    Effect::new(move |_| {
        if chosen.with_untracked(|it| it.iter().any(|key| !shown.contains(&key.id))) {
            chosen.update(|it| it.retain(|key| shown.contains(&key.id)));
        }
    });
    let run = Callback::new(move |()| {
        busy.set(true);
        let (deed, keys) = (deed.get_untracked(), chosen.get_untracked());
        spawn_local(async move {
            let mut failed = Vec::new();
            let mut why = String::new();
            for key in &keys {
                if let Err(refused) = act(deed, key).await {
                    why = refused.text();
                    failed.push(key.clone());
                }
            }
            let outcome = deed.outcome(keys.len() - failed.len(), failed.len(), &why);
            if failed.is_empty() {
                toasts.say(outcome);
            } else {
                toasts.fail(outcome);
            }
            let _ = busy.try_set(false);
            let _ = asking.try_set(false);
            // What could not be done stays chosen.
            if chosen.try_set(failed).is_none() {
                focus_soon("#content");
                changed.run(());
            }
        });
    });
    view! {
        <div class="bulk" role="group" aria-label="Many keys at once">
            <span role="status">
                {move || match count.get() {
                    0 => text::count(total, "key", "keys"),
                    n => format!("{n} of {all} selected"),
                }}
            </span>
            {move || {
                (count.get() > 0)
                    .then(|| {
                        Deed::ALL
                            .map(|it| {
                                view! {
                                    <button
                                        class="button small"
                                        class:danger={it == Deed::Delete}
                                        on:click=move |_| {
                                            deed.set(it);
                                            asking.set(true);
                                        }
                                    >
                                        {it.name()}
                                    </button>
                                }
                            })
                            .into_iter()
                            .collect_view()
                    })
            }}
        </div>
        <Confirm
            open=asking
            title=Signal::derive(move || deed.get().title(count.get()))
            breaks=Signal::derive(move || chosen.with(|chosen| breaks(deed.get(), chosen)))
            action=Signal::derive(move || deed.get().name().to_owned())
            phrase=Signal::derive(move || deed.get().phrase(count.get()))
            busy
            failure=Signal::derive(|| None::<String>)
            run
        />
    }
}

/// Chooses all that are shown, or none.
#[component]
pub fn ChooseAll(keys: Vec<ApiKey>, chosen: RwSignal<Vec<ApiKey>>) -> impl IntoView {
    let all = keys.len();
    let count = move || chosen.with(Vec::len);
    view! {
        <label class="check">
            <input
                type="checkbox"
                data-keep="choose-all"
                prop:checked=move || count() == all
                prop:indeterminate=move || (1..all).contains(&count())
                on:change=move |ev| chosen.set(if event_target_checked(&ev) { keys.clone() } else { Vec::new() })
            />
            <span>"Select all on this page"</span>
        </label>
    }
}
