//! What is loaded from the server: waiting for it, showing it, and asking again when that failed.

use std::cell::RefCell;

use leptos::{prelude::*, task::spawn_local};
use quota_common::{Page, ProblemCode, call::PageOf};

use super::{Toasts, focus::keep_focus};
use crate::{
    api::{Answer, Failure, Pending},
    route::route,
    shell,
};

#[derive(Debug, Clone, PartialEq)]
pub enum Load<T> {
    Loading,
    Ready(T),
    Failed(Failure),
}

/// Something from the server that can be loaded again. What was loaded stays shown meanwhile.
pub struct Loader<T: Send + Sync + 'static> {
    pub state: RwSignal<Load<T>>,
    version: RwSignal<u32>,
}

impl<T: Send + Sync + 'static> Clone for Loader<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Send + Sync + 'static> Copy for Loader<T> {}

impl<T: Clone + Send + Sync + 'static> Loader<T> {
    pub fn reload(self) {
        self.version
            .update(|version| *version = version.wrapping_add(1));
    }

    pub fn ready(self) -> Option<T> {
        match self.state.get() {
            Load::Ready(value) => Some(value),
            _ => None,
        }
    }
}

/// Loads now, and again whenever something that `fetch` reads changes. An answer that was overtaken is dropped. When
/// the same could not be loaded again, what was there stays, and a toast says so.
pub fn load<T, F>(fetch: impl Fn() -> F + 'static) -> Loader<T>
where
    T: Clone + Send + Sync + 'static,
    F: Future<Output = Answer<T>> + 'static,
{
    let state = RwSignal::new(Load::Loading);
    let version = RwSignal::new(0_u32);
    let turn = StoredValue::new(0_u32);
    let toasts = use_context::<Toasts>();
    Effect::new(move |before: Option<u32>| {
        let asked = version.get();
        shell::again();
        let again = before.is_some_and(|before| before != asked);
        turn.update_value(|turn| *turn = turn.wrapping_add(1));
        let own = turn.get_value();
        let answer = fetch();
        let (is_there, failed) = state.with_untracked(|state| {
            (
                matches!(state, Load::Ready(_)),
                matches!(state, Load::Failed(_)),
            )
        });
        if failed {
            state.set(Load::Loading);
        }
        spawn_local(async move {
            let answer = answer.await;
            if turn.try_get_value() == Some(own) {
                keep_focus();
                let _ = match answer {
                    Ok(value) => state.try_set(Load::Ready(value)),
                    Err(failure) if again && is_there && stays(toasts, &failure) => None,
                    Err(failure) => state.try_set(Load::Failed(failure)),
                };
            }
        });
        asked
    });
    Loader { state, version }
}

/// Loads the page of a list that the address asks for. Where nothing is left on it, as when the last of it was deleted,
/// that is the first one.
pub fn load_page<T>(fetch: impl Fn(PageOf) -> Pending<Page<T>> + 'static) -> Loader<Page<T>>
where
    T: Clone + Send + Sync + 'static,
{
    let route = route();
    let loader = load(move || {
        fetch(PageOf {
            limit: None,
            cursor: route.query.with(|query| query.get("cursor")),
        })
    });
    Effect::new(move |_| {
        let is_empty = loader
            .state
            .with(|state| matches!(state, Load::Ready(page) if page.items.is_empty()));
        let query = route.query.get_untracked();
        if is_empty && query.get("cursor").is_some() {
            loader.state.set(Load::Loading);
            let query = query.with("cursor", "");
            route.replace(&format!("{}{query}", route.path.get_untracked()));
        }
    });
    loader
}

/// Whether what is shown stays when it cannot be loaded again; then that is said.
fn stays(toasts: Option<Toasts>, failure: &Failure) -> bool {
    let stays = !failure.is(ProblemCode::NotFound);
    if let Some(toasts) = toasts.filter(|_| stays) {
        toasts.say(failure.text());
    }
    stays
}

/// Shows what is loaded, or lines where it will be, or what went wrong with a way to try again.
#[component]
pub fn Shown<T, V>(
    loader: Loader<T>,
    /// Shows it.
    show: impl Fn(T) -> V + Send + Sync + 'static,
) -> impl IntoView
where
    T: Clone + Send + Sync + 'static,
    V: IntoView + 'static,
{
    view! {
        <div class="shown" aria-busy=move || (matches!(loader.state.get(), Load::Loading)).to_string()>
            {move || match loader.state.get() {
                Load::Loading => view! {
                    <div class="skeleton" role="status">
                        <span class="unseen">"Loading"</span>
                        <i></i><i></i><i></i><i></i>
                    </div>
                }
                    .into_any(),
                Load::Ready(value) => show(value).into_any(),
                Load::Failed(failure) => view! {
                    <div class="empty" role="alert">
                        <h2>"This could not be loaded"</h2>
                        <p class="quiet">{failure.text()}</p>
                        <button class="button" on:click=move |_| loader.reload()>"Try again"</button>
                    </div>
                }
                    .into_any(),
            }}
        </div>
    }
}

/// Opens when the address asks for something new, which is then no longer part of it.
pub fn open_when_asked(open: RwSignal<bool>) {
    let route = route();
    let own = route.path.get_untracked();
    Effect::new(move |_| {
        // The page that is being left sees the address of the next one as well.
        if route.path.with_untracked(|path| *path == own)
            && route.query.with(|query| query.get("new")).is_some()
        {
            open.set(true);
            let query = route.query.get_untracked().with("new", "");
            route.replace(&format!("{}{query}", route.path.get_untracked()));
        }
    });
}

thread_local! {
    /// Addresses of pages, each with that of the page before: a cursor knows no way back.
    static BEFORE: RefCell<Vec<(String, String)>> = const { RefCell::new(Vec::new()) };
}

/// Leads from one page of a list to the next, by address, and back to those that were shown in this window.
#[component]
pub fn Pager(total: u64, shown: usize, next: Option<String>) -> impl IntoView {
    let route = route();
    let (path, query) = (route.path.get_untracked(), route.query.get_untracked());
    let here = format!("{path}{query}");
    let first = query
        .get("cursor")
        .map(|_| format!("{path}{}", query.clone().with("cursor", "")));
    let next = next.map(|cursor| format!("{path}{}", query.with("cursor", &cursor)));
    let previous = BEFORE.with_borrow_mut(|before| {
        let found = before.iter().find(|(page, _)| *page == here);
        let previous = found.map(|(_, previous)| previous.clone());
        if let Some(next) = &next {
            before.retain(|(page, _)| page != next);
            before.push((next.clone(), here));
        }
        previous
    });
    view! {
        <nav class="pager" aria-label="Pages">
            <span class="quiet">
                {format!(
                    "{} of {}",
                    crate::model::text::number(shown as u64),
                    crate::model::text::number(total),
                )}
            </span>
            {first.map(|href| view! { <a class="button small" href=href>"First page"</a> })}
            {previous.map(|href| view! { <a class="button small" href=href>"Previous page"</a> })}
            {next.map(|href| view! { <a class="button small" href=href>"Next page"</a> })}
        </nav>
    }
}
