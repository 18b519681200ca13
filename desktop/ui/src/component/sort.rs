//! The sort order of a list, stored in the page's URL.

use leptos::prelude::*;

use super::filter::{fixed_options, select_filter};
use crate::route::route;

/// Returns the URL of the list's first page in another order.
fn sorted_address(sort: &str) -> String {
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

/// The sort orders that all sortable lists have. The first one is the server's default.
const COMMON_ORDERS: &[(&str, &str)] = &[
    ("", "Newest first"),
    ("created_at", "Oldest first"),
    ("name", "Name, A to Z"),
    ("-name", "Name, Z to A"),
];

#[component]
pub fn SortSelect(
    /// Sort orders that only this list has.
    #[prop(optional)]
    more: &'static [(&'static str, &'static str)],
) -> impl IntoView {
    select_filter(
        "sort",
        "sort",
        "Sort",
        fixed_options(COMMON_ORDERS.iter().chain(more)),
    )
}

/// A column header that sorts the list. Another click reverses the order.
#[component]
pub fn SortHead(
    name: &'static str,
    /// The `sort` value for ascending order.
    ascending: &'static str,
    /// The `sort` value for descending order.
    descending: &'static str,
    #[prop(optional)] ascending_first: bool,
) -> impl IntoView {
    let direction = move || match current() {
        it if it == ascending => Some("ascending"),
        it if it == descending => Some("descending"),
        _ => None,
    };
    let next = move || match direction() {
        Some("ascending") => descending,
        Some(_) => ascending,
        None if ascending_first => ascending,
        None => descending,
    };
    view! {
        <th scope="col" aria-sort=direction>
            <a class="sort" data-focus-key=format!("sort-{ascending}") href=move || sorted_address(next())>
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
