//! Text to take along: copied with a button, or selected.

use leptos::{prelude::*, task::spawn_local};

use super::{Icon, Shape};
use crate::api;

#[component]
pub fn CopyButton(
    #[prop(into)] text: Signal<String>,
    /// What is copied, for those who do not see where the button stands.
    #[prop(into)]
    what: String,
) -> impl IntoView {
    let copied = RwSignal::new(false);
    // Said here: behind an open dialog nothing is seen or heard.
    let refused = RwSignal::new(false);
    let copy = move |_| {
        let text = text.get_untracked();
        spawn_local(async move {
            let done = api::copy(&text).await;
            let _ = refused.try_set(!done);
            if done {
                let _ = copied.try_set(true);
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
            <span class="unseen">" "{what}</span>
        </button>
        <span role="status" class="copied" class:unseen=move || !refused.get()>
            {move || match (refused.get(), copied.get()) {
                (true, _) => "Copying was not allowed. Select the text instead.",
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
    /// A name for tests and labels to find it by.
    #[prop(optional)]
    id: &'static str,
) -> impl IntoView {
    let label = what.clone();
    view! {
        <div class="code">
            <pre tabindex="0" role="region" aria-label=label><code id=(!id.is_empty()).then_some(id)>{text}</code></pre>
            <CopyButton text what/>
        </div>
    }
}
