//! Text with a button to copy it.

use leptos::{prelude::*, task::spawn_local};

use super::icon::{Icon, Shape};
use crate::{api, model::text::capitalized};

#[component]
pub fn CopyButton(
    #[prop(into)] text: Signal<String>,
    /// What the button copies. This text is part of the button's accessible name.
    #[prop(into)]
    what: String,
    #[prop(optional)] on_copied: Option<Callback<()>>,
) -> impl IntoView {
    let copied = RwSignal::new(false);
    let failed = RwSignal::new(false);
    let copy = move |_| {
        let text = text.get_untracked();
        spawn_local(async move {
            let done = api::copy(&text).await;
            let _ = failed.try_set(!done);
            if done {
                let _ = copied.try_set(true);
                if let Some(on_copied) = on_copied {
                    let _ = on_copied.try_run(());
                }
                gloo_timers::future::TimeoutFuture::new(2000).await;
                let _ = copied.try_set(false);
            }
        });
    };
    view! {
        <button type="button" class="button small" on:click=copy>
            {move || {
                if copied.get() {
                    view! { <Icon shape=Shape::Check/> "Copied" }.into_any()
                } else {
                    view! { <Icon shape=Shape::Copy/> "Copy" }.into_any()
                }
            }}
            <span class="visually-hidden">" "{what}</span>
        </button>
        <span role="status" class="copied" class:visually-hidden=move || !failed.get()>
            {move || match (failed.get(), copied.get()) {
                (true, _) => "Couldn't copy. Select the text and copy it manually.",
                (_, true) => "Copied",
                _ => "",
            }}
        </span>
    }
}

#[component]
pub fn CodeBlock(
    #[prop(into)] text: Signal<String>,
    #[prop(into)] what: String,
    #[prop(optional)] id: Option<&'static str>,
    #[prop(optional)] on_copied: Option<Callback<()>>,
) -> impl IntoView {
    let label = capitalized(&what);
    let on_copied = on_copied.unwrap_or_else(|| Callback::new(|()| {}));
    view! {
        <div class="code">
            <pre tabindex="0" role="region" aria-label=label><code id=id>{text}</code></pre>
            <CopyButton text what on_copied/>
        </div>
    }
}
