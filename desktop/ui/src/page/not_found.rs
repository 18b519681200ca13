use leptos::prelude::*;

use crate::component::PageHeader;

#[component]
pub fn NotFound() -> impl IntoView {
    view! {
        <PageHeader title="Page not found" about="Check the address, or go to Home."/>
        <a class="button primary" href="/console">"Go to Home"</a>
    }
}
