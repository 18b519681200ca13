//! Links to the first, previous, and next page of a list.

use std::cell::RefCell;

use leptos::prelude::*;

use crate::{
    model::text::{list_total, number},
    route::route,
};

thread_local! {
    /// Maps the URL of a list page to the URL of the previous page, because cursors lead only forward.
    static PREVIOUS: RefCell<Vec<(String, String)>> = const { RefCell::new(Vec::new()) };
}

/// Links to the first and the next page, and to the previous page if it was shown in this window.
#[component]
pub fn Pager(total: u64, shown: usize, next: Option<String>) -> impl IntoView {
    let route = route();
    let (path, query) = (route.path.get_untracked(), route.query.get_untracked());
    let here = format!("{path}{query}");
    let first = query
        .get("cursor")
        .map(|_| format!("{path}{}", query.clone().with("cursor", "")));
    let next = next.map(|cursor| format!("{path}{}", query.with("cursor", &cursor)));
    let previous = PREVIOUS.with_borrow_mut(|known| {
        let found = known.iter().find(|(page, _)| *page == here);
        let previous = found.map(|(_, previous)| previous.clone());
        if let Some(next) = &next {
            known.retain(|(page, _)| page != next);
            known.push((next.clone(), here));
        }
        previous
    });
    view! {
        <nav class="pager" aria-label="Pages">
            <span class="muted">{format!("{} of {}", number(shown as u64), list_total(total))}</span>
            {first.map(|href| view! { <a class="button small" href=href>"First page"</a> })}
            {previous.map(|href| view! { <a class="button small" href=href>"Previous page"</a> })}
            {next.map(|href| view! { <a class="button small" href=href>"Next page"</a> })}
        </nav>
    }
}
