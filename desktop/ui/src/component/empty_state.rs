//! The placeholder for a page without content.

use leptos::prelude::*;

use super::icon::{Icon, Shape};

#[component]
pub fn EmptyState(
    shape: Shape,
    #[prop(into)] title: String,
    #[prop(into)] about: String,
    /// Whether the page shows nothing else. If so, the title is the page's heading.
    #[prop(optional)]
    standalone: bool,
    #[prop(optional)] children: Option<Children>,
) -> impl IntoView {
    let title = if standalone {
        view! { <h1>{title}</h1> }.into_any()
    } else {
        view! { <h2>{title}</h2> }.into_any()
    };
    view! {
        <div class="empty">
            <Icon shape/>
            {title}
            <p class="muted">{about}</p>
            {children.map(|children| children())}
        </div>
    }
}
