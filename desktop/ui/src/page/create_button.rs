use leptos::prelude::*;

use crate::session::session;

/// Shown only to users whose role can create the resource.
#[component]
pub fn CreateButton(open: RwSignal<bool>, label: &'static str) -> impl IntoView {
    let session = session();
    let button = move || {
        view! { <button class="button primary" on:click=move |_| open.set(true)>{label}</button> }
    };
    move || session.can_manage().then(button)
}
