use leptos::prelude::*;

use crate::session::session;

/// Returns whether the user's role can create plans, keys, tokens, and webhooks.
pub fn can_create() -> bool {
    let session = session();
    untrack(move || session.can_manage())
}

/// A button that is shown only to users whose role can create the resource.
#[component]
pub fn CreateButton(open: RwSignal<bool>, label: &'static str) -> impl IntoView {
    let session = session();
    let button = move || {
        view! { <button class="button primary" on:click=move |_| open.set(true)>{label}</button> }
    };
    move || session.can_manage().then(button)
}
