//! Loads data from the server, shows it, and offers to retry after a failure.
//!
//! Most functions erase the type of the data, because compiling these functions for each type would make the download
//! 25% larger.

use std::{any::Any, marker::PhantomData, pin::Pin, sync::Arc, time::Duration};

use leptos::{prelude::*, task::spawn_local};
use quota_common::{Page, ProblemCode, call::PageOf};

use super::{alert::request_id, focus::keep_focus, toast::Toasts};
use crate::{
    api::{CallError, CallResult, PendingCall},
    clock::{now, track_ticks},
    host,
    model::text::{capitalized, relative},
    reactive::effect,
    route::{Route, route},
};

type Data = Arc<dyn Any + Send + Sync>;

#[derive(Clone)]
enum LoadState {
    Loading,
    Ready(Data),
    Failed(CallError),
}

#[derive(Clone, Copy)]
struct Core {
    state: RwSignal<LoadState>,
    version: RwSignal<u32>,
    /// Whether to dim the current data, which shows the user that a reload is in progress.
    pending: RwSignal<bool>,
    /// Whether the next load runs in the background.
    quiet: StoredValue<bool>,
    /// When the data on the page was loaded, in milliseconds since the Unix epoch.
    loaded_at: StoredValue<i64>,
    /// Why the latest background load failed. `None` if the load succeeded.
    stale: RwSignal<Option<CallError>>,
}

impl Core {
    fn reload(self) {
        self.version
            .try_update(|version| *version = version.wrapping_add(1));
    }

    /// Reloads in the background. If the reload fails, [`StaleNote`] appears.
    fn refresh(self) {
        let is_ready = self
            .state
            .try_with_untracked(|state| matches!(state, LoadState::Ready(_)));
        if is_ready == Some(true) && self.pending.try_get_untracked() == Some(false) {
            self.quiet.set_value(true);
            self.reload();
        }
    }

    fn reload_after_requests(self) {
        spawn_local(async move {
            for pause_ms in [500, 2000, 4000] {
                gloo_timers::future::TimeoutFuture::new(pause_ms).await;
                // Loads in the background, so that the page is not dimmed.
                if self.quiet.try_update_value(|quiet| *quiet = true).is_some() {
                    self.reload();
                }
            }
        });
    }

    fn data(self) -> Option<Data> {
        self.state.with(|state| match state {
            LoadState::Ready(data) => Some(data.clone()),
            _ => None,
        })
    }
}

/// Data that can be reloaded. The current data remains on the page until the new data arrives.
pub struct Loader<T> {
    core: Core,
    of: PhantomData<fn() -> T>,
}

impl<T> Clone for Loader<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Loader<T> {}

impl<T: Clone + Send + Sync + 'static> Loader<T> {
    /// Loads the data again. Does nothing if the user has left the page that owns this loader.
    pub fn reload(self) {
        self.core.reload();
    }

    /// Reloads the data if the last load failed. Otherwise, does nothing.
    pub fn retry(self) {
        let has_failed = |state: &LoadState| matches!(state, LoadState::Failed(_));
        if self.core.state.try_with_untracked(has_failed) == Some(true) {
            self.core.reload();
        }
    }

    /// Reloads in the background. If the reload fails, [`StaleNote`] appears.
    pub fn refresh(self) {
        self.core.refresh();
    }

    /// Reloads a few times, because the server can take a few seconds to record the requests that have just been sent.
    pub fn reload_after_requests(self) {
        self.core.reload_after_requests();
    }

    pub fn ready(self) -> Option<T> {
        self.with(T::clone)
    }

    pub fn with<R>(self, of: impl FnOnce(&T) -> R) -> Option<R> {
        self.core.data()?.downcast_ref::<T>().map(of)
    }

    pub fn error(self) -> Option<CallError> {
        self.core.state.with(|state| match state {
            LoadState::Failed(error) => Some(error.clone()),
            _ => None,
        })
    }
}

type LocalFuture<T> = Pin<Box<dyn Future<Output = T>>>;

/// Loads now, and reloads whenever a signal read by `fetch` changes. Ignores responses to outdated requests. If
/// [`Loader::reload`] fails, the current data remains and a toast shows the error, unless the resource no longer
/// exists.
pub fn load<T, F>(fetch: impl Fn() -> F + 'static) -> Loader<T>
where
    T: Clone + Send + Sync + 'static,
    F: Future<Output = CallResult<T>> + 'static,
{
    let fetch = move || {
        let pending = fetch();
        let erased = async move { pending.await.map(|data| Arc::new(data) as Data) };
        Box::pin(erased) as LocalFuture<CallResult<Data>>
    };
    Loader {
        core: load_data(Box::new(fetch)),
        of: PhantomData,
    }
}

fn load_data(fetch: Box<dyn Fn() -> LocalFuture<CallResult<Data>>>) -> Core {
    let core = Core {
        state: RwSignal::new(LoadState::Loading),
        version: RwSignal::new(0),
        pending: RwSignal::new(false),
        quiet: StoredValue::new(false),
        loaded_at: StoredValue::new(0),
        stale: RwSignal::new(None),
    };
    let latest = StoredValue::new(0_u32);
    let toasts = use_context::<Toasts>();
    Effect::new(move |previous: Option<u32>| {
        let current = core.version.get();
        host::track_retries();
        let is_reload = previous.is_some_and(|previous| previous != current);
        latest.update_value(|latest| *latest = latest.wrapping_add(1));
        let own = latest.get_value();
        let pending = fetch();
        let (was_ready, had_failed) = core.state.with_untracked(|state| {
            (
                matches!(state, LoadState::Ready(_)),
                matches!(state, LoadState::Failed(_)),
            )
        });
        if had_failed {
            core.state.set(LoadState::Loading);
        }
        let is_quiet = core
            .quiet
            .try_update_value(std::mem::take)
            .unwrap_or_default();
        core.pending.set(was_ready && !is_quiet);
        spawn_local(async move {
            let result = pending.await;
            if latest.try_get_value() != Some(own) {
                return;
            }
            keep_focus();
            let _ = core.pending.try_set(false);
            match result {
                Ok(data) => {
                    let _ = core.loaded_at.try_set_value(now());
                    let _ = core.stale.try_set(None);
                    let _ = core.state.try_set(LoadState::Ready(data));
                }
                Err(error) if is_quiet && was_ready => {
                    let _ = core.stale.try_set(Some(error));
                }
                Err(error) if is_reload && was_ready && !error.is(ProblemCode::NotFound) => {
                    if let Some(toasts) = toasts {
                        toasts.fail(&error);
                    }
                }
                Err(error) => {
                    let _ = core.state.try_set(LoadState::Failed(error));
                }
            }
        });
        current
    });
    core
}

/// Loads one page of a list: the page that the URL query selects. If that page has become empty, for example because
/// its last item was deleted, goes to the first page.
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
    let is_empty = |data: &Data| {
        let page = data.downcast_ref::<Page<T>>();
        page.is_some_and(|page| page.items.is_empty())
    };
    leave_empty_page(route, loader.core, is_empty);
    loader
}

fn leave_empty_page(route: Route, core: Core, is_empty: fn(&Data) -> bool) {
    effect(move || {
        let is_empty = core.data().is_some_and(|data| is_empty(&data));
        let query = route.query.get_untracked();
        if is_empty && query.get("cursor").is_some() {
            core.state.set(LoadState::Loading);
            let query = query.with("cursor", "");
            route.replace(&format!("{}{query}", route.path.get_untracked()));
        }
    });
}

/// Shows a skeleton while loading, then the data, or an error with a button to retry.
#[component]
pub fn Async<T, V>(
    loader: Loader<T>,
    /// Completes the error message `Couldn't load …`.
    #[prop(default = "this page")]
    what: &'static str,
    /// Whether the view is inside a card. If so, errors have no frame of their own.
    #[prop(optional)]
    inside: bool,
    show: impl Fn(T) -> V + Send + Sync + 'static,
) -> impl IntoView
where
    T: Clone + Send + Sync + 'static,
    V: IntoView + 'static,
{
    let show = move |data: &Data| {
        let data = data.downcast_ref::<T>().cloned();
        data.map(|data| show(data).into_any()).into_any()
    };
    view_data(loader.core, what, inside, Box::new(show))
}

fn view_data(
    core: Core,
    what: &'static str,
    inside: bool,
    show: Box<dyn Fn(&Data) -> AnyView + Send + Sync>,
) -> AnyView {
    let is_loading =
        move || core.pending.get() || core.state.with(|state| matches!(state, LoadState::Loading));
    let content = move || match core.state.get() {
        LoadState::Loading => skeleton(),
        LoadState::Ready(data) => show(&data),
        LoadState::Failed(error) => failure(&error, what, inside, core),
    };
    view! {
        <div class="async" class:pending=core.pending aria-busy=move || is_loading().to_string()>
            {content}
        </div>
    }
    .into_any()
}

/// How long loading may take before the skeleton says that it is still in progress.
const SLOW: Duration = Duration::from_secs(5);

fn skeleton() -> AnyView {
    let is_slow = RwSignal::new(false);
    set_timeout(
        move || {
            let _ = is_slow.try_set(true);
        },
        SLOW,
    );
    view! {
        <div class="skeleton" role="status">
            <span class="visually-hidden">"Loading"</span>
            <i></i><i></i><i></i><i></i>
            {move || is_slow.get().then(|| view! { <p class="muted small-text">"Still loading…"</p> })}
        </div>
    }
    .into_any()
}

fn failure(error: &CallError, what: &str, inside: bool, core: Core) -> AnyView {
    if error.is(ProblemCode::NotFound) {
        let about = format!("{} doesn't exist or was deleted.", capitalized(what));
        return view! {
            <div class="empty" role="alert">
                <h2>"Not found"</h2>
                <p class="muted">{about}</p>
            </div>
        }
        .into_any();
    }
    let id = error.request_id().map(str::to_owned);
    let title = format!("Couldn't load {what}");
    let retry = move |_| core.reload();
    if inside {
        return view! {
            <div class="alert" role="alert">
                <p><strong>{title}"."</strong>" "{error.message()}</p>
                {request_id(id)}
                <button type="button" class="button small" on:click=retry>"Retry"</button>
            </div>
        }
        .into_any();
    }
    view! {
        <div class="empty" role="alert">
            <h2>{title}</h2>
            <p class="muted">{error.message()}</p>
            {request_id(id)}
            <button type="button" class="button" on:click=retry>"Retry"</button>
        </div>
    }
    .into_any()
}

/// Reloads every half minute while the page is visible.
pub fn refresh_regularly<T>(loader: Loader<T>) {
    let core = loader.core;
    Effect::new(move |previous: Option<()>| {
        track_ticks();
        if previous.is_some() && !document().hidden() {
            core.refresh();
        }
    });
}

/// Shown if the data on the page could not be refreshed.
#[component]
pub fn StaleNote<T>(loader: Loader<T>) -> impl IntoView {
    stale_note(loader.core)
}

fn stale_note(core: Core) -> AnyView {
    view! {
        <div role="status">
            {move || {
                track_ticks();
                core.stale
                    .get()
                    .map(|error| {
                        let id = error.request_id().map(str::to_owned);
                        let updated = relative(core.loaded_at.get_value(), now());
                        view! {
                            <div class="alert warn stale">
                                <p>
                                    {format!("Couldn't refresh. Last updated {updated}. ")}
                                    <button type="button" class="link" on:click=move |_| core.reload()>"Retry"</button>
                                </p>
                                {request_id(id)}
                            </div>
                        }
                    })
            }}
        </div>
    }
    .into_any()
}
