//! Data from the server: loading it, showing it, and trying again after a failure.

use std::pin::Pin;

use leptos::{prelude::*, task::spawn_local};
use quota_common::{Page, ProblemCode, call::PageOf};

use super::{alert::request_id, focus::keep_focus, toast::Toasts};
use crate::{
    api::{CallError, CallResult, PendingCall},
    host,
    route::{Route, route},
};

#[derive(Debug, Clone, PartialEq)]
pub enum LoadState<T> {
    Loading,
    Ready(T),
    Failed(CallError),
}

/// Data that can be loaded again. The previous data stays on the page while loading.
pub struct Loader<T: Send + Sync + 'static> {
    pub state: RwSignal<LoadState<T>>,
    version: RwSignal<u32>,
    /// Whether the data on the page is about to be replaced.
    pending: RwSignal<bool>,
}

impl<T: Send + Sync + 'static> Clone for Loader<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Send + Sync + 'static> Copy for Loader<T> {}

impl<T: Clone + Send + Sync + 'static> Loader<T> {
    /// Loads again. Does nothing once the page that owns this has been left.
    pub fn reload(self) {
        reload(self.version);
    }

    /// Reloads until the server has recorded requests that were just sent: it does so within seconds.
    pub fn reload_after_requests(self) {
        let version = self.version;
        spawn_local(async move {
            for pause_ms in [0, 2000, 4000] {
                gloo_timers::future::TimeoutFuture::new(pause_ms).await;
                reload(version);
            }
        });
    }

    pub fn ready(self) -> Option<T> {
        match self.state.get() {
            LoadState::Ready(value) => Some(value),
            _ => None,
        }
    }
}

type LocalFuture = Pin<Box<dyn Future<Output = ()>>>;

/// Loads now, and again whenever a signal that `fetch` reads changes. Ignores responses that arrive out of order. If
/// reloading the same data fails, the previous data stays and a toast reports the error.
pub fn load<T, F>(fetch: impl Fn() -> F + 'static) -> Loader<T>
where
    T: Clone + Send + Sync + 'static,
    F: Future<Output = CallResult<T>> + 'static,
{
    let state = RwSignal::new(LoadState::Loading);
    let version = RwSignal::new(0_u32);
    let pending_reload = RwSignal::new(false);
    let latest = StoredValue::new(0_u32);
    let toasts = use_context::<Toasts>();
    let start = move |own: u32, is_reload: bool| -> LocalFuture {
        let pending = fetch();
        let (was_ready, had_failed) = state.with_untracked(|state| {
            (
                matches!(state, LoadState::Ready(_)),
                matches!(state, LoadState::Failed(_)),
            )
        });
        if had_failed {
            state.set(LoadState::Loading);
        }
        pending_reload.set(was_ready);
        Box::pin(async move {
            let result = pending.await;
            if latest.try_get_value() == Some(own) {
                keep_focus();
                let _ = pending_reload.try_set(false);
                let _ = match result {
                    Ok(value) => state.try_set(LoadState::Ready(value)),
                    Err(error) if is_reload && was_ready && !error.is(ProblemCode::NotFound) => {
                        if let Some(toasts) = toasts {
                            toasts.fail(&error);
                        }
                        None
                    }
                    Err(error) => state.try_set(LoadState::Failed(error)),
                };
            }
        })
    };
    start_on_change(version, latest, Box::new(start));
    Loader {
        state,
        version,
        pending: pending_reload,
    }
}

/// Loads the page of a list that the address names. If that page has become empty, for example because its last item
/// was deleted, goes to the first page.
pub fn load_page<T>(fetch: impl Fn(PageOf) -> PendingCall<Page<T>> + 'static) -> Loader<Page<T>>
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
    let state = loader.state;
    let is_empty = move || {
        state.with(|state| matches!(state, LoadState::Ready(page) if page.items.is_empty()))
    };
    let show_loading = move || state.set(LoadState::Loading);
    leave_empty_page(route, Box::new(is_empty), Box::new(show_loading));
    loader
}

// Whatever does not depend on the type of the data is compiled once: every copy would add to the download.

fn start_on_change(
    version: RwSignal<u32>,
    latest: StoredValue<u32>,
    start: Box<dyn Fn(u32, bool) -> LocalFuture>,
) {
    Effect::new(move |previous: Option<u32>| {
        let current = version.get();
        host::track_retries();
        let is_reload = previous.is_some_and(|previous| previous != current);
        latest.update_value(|latest| *latest = latest.wrapping_add(1));
        spawn_local(start(latest.get_value(), is_reload));
        current
    });
}

fn leave_empty_page(route: Route, is_empty: Box<dyn Fn() -> bool>, show_loading: Box<dyn Fn()>) {
    Effect::new(move |_| {
        let is_empty = is_empty();
        let query = route.query.get_untracked();
        if is_empty && query.get("cursor").is_some() {
            show_loading();
            let query = query.with("cursor", "");
            route.replace(&format!("{}{query}", route.path.get_untracked()));
        }
    });
}

/// Shows loaded data, a skeleton while loading, or the error with a button to try again.
#[component]
pub fn Async<T, V>(
    loader: Loader<T>,
    show: impl Fn(T) -> V + Send + Sync + 'static,
) -> impl IntoView
where
    T: Clone + Send + Sync + 'static,
    V: IntoView + 'static,
{
    let is_loading = move || {
        loader.pending.get()
            || loader
                .state
                .with(|state| matches!(state, LoadState::Loading))
    };
    let content = move || match loader.state.get() {
        LoadState::Loading => skeleton(),
        LoadState::Ready(value) => show(value).into_any(),
        LoadState::Failed(error) => failure(&error, loader.version),
    };
    frame(loader.pending, Box::new(is_loading), Box::new(content))
}

fn frame(
    pending: RwSignal<bool>,
    is_loading: Box<dyn Fn() -> bool + Send>,
    content: Box<dyn Fn() -> AnyView + Send>,
) -> AnyView {
    view! {
        <div class="async" class:pending=pending aria-busy=move || is_loading().to_string()>
            {move || content()}
        </div>
    }
    .into_any()
}

fn skeleton() -> AnyView {
    view! {
        <div class="skeleton" role="status">
            <span class="visually-hidden">"Loading"</span>
            <i></i><i></i><i></i><i></i>
        </div>
    }
    .into_any()
}

fn failure(error: &CallError, version: RwSignal<u32>) -> AnyView {
    let id = error.request_id().map(str::to_owned);
    view! {
        <div class="empty" role="alert">
            <h2>"Couldn't load this page"</h2>
            <p class="muted">{error.message()}</p>
            {request_id(id)}
            <button class="button" on:click=move |_| reload(version)>"Try again"</button>
        </div>
    }
    .into_any()
}

fn reload(version: RwSignal<u32>) {
    version.try_update(|version| *version = version.wrapping_add(1));
}
