//! The order of a list, which is part of the address.

use leptos::prelude::*;

use crate::route::route;

/// With another order, from the first page on.
fn ordered(sort: &str) -> String {
    let route = route();
    let query = route.query.get().with("cursor", "").with("sort", sort);
    format!("{}{query}", route.path.get_untracked())
}

fn current() -> String {
    route()
        .query
        .with(|query| query.get("sort"))
        .unwrap_or_default()
}

/// Chooses among all orders; the first is what stands for none.
#[component]
pub fn SortSelect(options: &'static [(&'static str, &'static str)]) -> impl IntoView {
    let route = route();
    view! {
        <div class="field">
            <label for="sort">"Sort"</label>
            <select
                id="sort"
                on:change=move |ev| {
                    let sort = event_target_value(&ev);
                    let query = route.query.get_untracked().with("cursor", "").with("sort", &sort);
                    route.replace(&format!("{}{query}", route.path.get_untracked()));
                }
            >
                {options
                    .iter()
                    .map(|&(value, name)| view! { <option value=value prop:selected=move || current() == value>{name}</option> })
                    .collect_view()}
            </select>
        </div>
    }
}

/// The head of a column that its list can be ordered by: first this way, then the other.
#[component]
pub fn SortHead(
    name: &'static str,
    /// Upwards.
    up: &'static str,
    /// Downwards.
    down: &'static str,
    /// Whether upwards comes first.
    #[prop(optional)]
    up_first: bool,
) -> impl IntoView {
    let direction = move || match current() {
        it if it == up => Some("ascending"),
        it if it == down => Some("descending"),
        _ => None,
    };
    let next = move || match direction() {
        Some("ascending") => down,
        Some(_) => up,
        None if up_first => up,
        None => down,
    };
    view! {
        <th scope="col" aria-sort=direction>
            <a class="sort" data-keep=format!("sort-{up}") href=move || ordered(next())>
                {name}
                <span class="arrow" aria-hidden="true">
                    {move || match direction() {
                        Some("ascending") => "↑",
                        Some(_) => "↓",
                        None => "↕",
                    }}
                </span>
            </a>
        </th>
    }
}
