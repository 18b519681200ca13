use leptos::prelude::*;

use crate::reactive::effect;

/// Shows the page's title, and sets the window's title to the same text.
#[component]
pub fn PageHeader(
    #[prop(into)] title: Signal<String>,
    #[prop(optional, into)] about: String,
    #[prop(optional)] children: Option<Children>,
) -> impl IntoView {
    effect(move || {
        document().set_title(&format!("{} · Quota", title.get()));
    });
    view! {
        <header class="page-header">
            <div>
                <h1 dir="auto">{title}</h1>
                {(!about.is_empty()).then(|| view! { <p class="muted">{about}</p> })}
            </div>
            {children.map(|children| view! { <div class="actions">{children()}</div> })}
        </header>
    }
}
