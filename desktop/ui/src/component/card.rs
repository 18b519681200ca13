//! A section of a page.

use leptos::prelude::*;

/// A section with a title. `id` is the title's ID, and must be unique on the page.
#[component]
pub fn Card(id: &'static str, title: &'static str, children: Children) -> impl IntoView {
    view! {
        <section class="card" aria-labelledby=id>
            <h2 id=id>{title}</h2>
            {children()}
        </section>
    }
}
