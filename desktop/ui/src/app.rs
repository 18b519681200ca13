//! The frame around all pages: navigation, account menu, and the current page.
//!
//! Users who are not signed in are sent to the sign-in page, and return to the page they requested after they have
//! signed in. If the account cannot be loaded, for example because the server is unreachable, users stay signed in, and
//! a notice with a button to retry replaces the frame.

use leptos::{prelude::*, task::spawn_local};

use crate::{
    api::{self, CallError},
    clock,
    component::{
        Commands, CommandsView, EmptyState, Icon, Logo, PaletteButton, Shape, Toasts, ToastsView,
        ignore_clicks_on_busy_buttons, request_id, watch_presses,
    },
    host,
    model::address::{ConsolePage, Query},
    page::{self, Chunk, LazyPage},
    preferences::Preferences,
    reactive::{effect, text_memo},
    route::{Route, route},
    servers,
    session::{AuthState, Session, session},
};

#[component]
pub fn App() -> impl IntoView {
    clock::provide_ticks();
    let toasts = Toasts::provide();
    Preferences::provide();
    let route = Route::provide();
    let session = Session::provide(route, toasts);
    ignore_clicks_on_busy_buttons();
    watch_presses();
    session.load();
    let current = Memo::new(move |_| ConsolePage::of(&route.path.get()));
    // Empty for all pages inside the frame, so that moving from one of these pages to another does not render the frame
    // again.
    let outside_frame = text_memo(move || {
        match current.get() {
            ConsolePage::SignIn => "sign-in",
            ConsolePage::Register => "register",
            _ => "",
        }
        .to_owned()
    });
    servers::report_first_paint(session);
    view! {
        <servers::Banners/>
        {move || match &*outside_frame.get() {
            "sign-in" => view! { <page::SignIn/> }.into_any(),
            "register" => view! { <page::Register/> }.into_any(),
            _ => view! { <AuthGate current/> }.into_any(),
        }}
        <ToastsView toasts/>
    }
}

/// The path, name, and icon of a link.
type NavigationLink = (&'static str, &'static str, Shape);

/// The link that shows the number of new alerts.
const ALERTS: &str = "/console/alerts";

const NAVIGATION: [(&str, &[NavigationLink]); 3] = [
    (
        "Observe",
        &[
            ("/console", "Home", Shape::Home),
            ("/console/usage", "Usage", Shape::Usage),
            (ALERTS, "Alerts", Shape::Alerts),
            ("/console/audit", "Audit log", Shape::Audit),
        ],
    ),
    (
        "Configure",
        &[
            ("/console/plans", "Plans", Shape::Plans),
            ("/console/api-keys", "API keys", Shape::Key),
            ("/console/service-tokens", "Service tokens", Shape::Token),
            ("/console/webhooks", "Webhooks", Shape::Webhook),
        ],
    ),
    (
        "Account",
        &[
            ("/console/billing", "Billing", Shape::Billing),
            ("/console/settings", "Settings", Shape::Settings),
        ],
    ),
];

/// Shows the frame only to users who are signed in.
#[component]
fn AuthGate(current: Memo<ConsolePage>) -> impl IntoView {
    let session = session();
    let route = route();
    effect(move || {
        if session.auth.get() == AuthState::SignedOut {
            let here = format!(
                "{}{}",
                route.path.get_untracked(),
                route.query.get_untracked()
            );
            let query = Query::default().with("next", &here);
            route.replace(&format!("/console/sign-in{query}"));
        }
    });
    let auth = Memo::new(move |_| session.auth.get());
    move || match auth.get() {
        AuthState::SignedIn => view! { <Frame current/> }.into_any(),
        AuthState::Failed(error) => {
            let id = error.request_id().map(str::to_owned);
            let (title, about) = match error {
                CallError::Unreachable => (
                    "Can't reach the server",
                    "Check your connection and try again.".to_owned(),
                ),
                error => ("Couldn't load the console", error.message()),
            };
            view! {
                <main class="standalone">
                    <EmptyState standalone=true shape=Shape::Close title about>
                        {request_id(id)}
                        <button class="button primary" on:click=move |_| session.load()>"Retry"</button>
                        <servers::ServerPicker/>
                    </EmptyState>
                </main>
            }
                .into_any()
        }
        AuthState::Unknown | AuthState::SignedOut => view! {
            <main class="standalone loading" aria-busy="true">
                <p class="muted" role="status">"Loading…"</p>
            </main>
        }
        .into_any(),
    }
}

/// Shown after the desktop app has dropped its tokens while the session still exists on the server.
const SIGNED_OUT_LOCALLY: &str = "Signed out on this computer. The server couldn't be reached, so your session \
    remains active on the server until it expires. To end it sooner, sign in again and revoke it in Settings.";

#[component]
fn Frame(current: Memo<ConsolePage>) -> impl IntoView {
    let session = session();
    let toasts = expect_context::<Toasts>();
    let path = route().path;
    let is_menu_open = RwSignal::new(false);
    let sign_out = Callback::new(move |()| {
        spawn_local(async move {
            match api::logout().await {
                Ok(()) => session.end(),
                Err(_) if host::SIGNS_OUT_LOCALLY => {
                    session.end();
                    toasts.fail_with(SIGNED_OUT_LOCALLY);
                }
                Err(CallError::AccountChanged) => {}
                Err(error) => toasts.fail(&error),
            }
        });
    });
    page::preload_chunks();
    let new_alerts = page::NewAlerts::watch(toasts);
    // The navigation contains only pages that the user's role may use.
    let is_hidden = move |href: &str| !session.has(ConsolePage::of(href).right().0);
    let new_count = move |href: &str| {
        let text = (href == ALERTS).then(|| new_alerts.label()).flatten()?;
        Some(view! { " " <span class="badge limited">{text}</span> })
    };
    let lazy = |page| view! { <LazyPage page/> }.into_any();
    let commands = Commands::new(sign_out, Callback::new(move |right| session.has(right)));
    // The current page and, if the user's role has no access to the page, the name of what the page shows.
    let shown = Memo::new(move |_| {
        let page = current.get();
        let (right, what) = page.right();
        let is_missing = session
            .me
            .with(|me| me.as_ref().is_some_and(|me| !right.is_of(me.tenant.role)));
        (page, is_missing.then_some(what))
    });
    let content = NodeRef::<leptos::html::Main>::new();
    Effect::new(move |previous: Option<()>| {
        path.track();
        is_menu_open.set(false);
        // Moves keyboard and screen-reader users to the start of the new page.
        if let (Some(()), Some(content)) = (previous, content.get_untracked()) {
            let _ = content.focus();
        }
    });
    let is_current = move |href: &str| {
        let path = path.get();
        let path = path.trim_end_matches('/');
        path == href || (href != "/console" && path.starts_with(&format!("{href}/")))
    };
    view! {
        <a class="skip" href="#content">"Skip to content"</a>
        <div class="frame">
            <header class="side" class:open=is_menu_open>
                <div class="brand-row">
                    <a class="brand" href="/console"><Logo/>"Quota"</a>
                    <PaletteButton commands/>
                    <button
                        class="button icon-only menu"
                        aria-expanded=move || is_menu_open.get().to_string()
                        aria-controls="navigation"
                        aria-label="Menu"
                        on:click=move |_| is_menu_open.update(|open| *open = !*open)
                    >
                        <Icon shape=Shape::Menu/>
                    </button>
                </div>
                <nav id="navigation" aria-label="Console">
                    {NAVIGATION
                        .into_iter()
                        .map(|(group, pages)| {
                            let links = pages
                                .iter()
                                .map(|&(href, name, shape)| {
                                    view! {
                                        <li hidden=move || is_hidden(href)>
                                            <a href=href aria-current=move || is_current(href).then_some("page")>
                                                <Icon shape/>
                                                {name}
                                                {move || new_count(href)}
                                            </a>
                                        </li>
                                    }
                                })
                                .collect_view();
                            let is_empty = move || pages.iter().all(|(href, ..)| is_hidden(href));
                            view! {
                                <p class="nav-group" aria-hidden="true" hidden=is_empty>{group}</p>
                                <ul aria-label=group>{links}</ul>
                            }
                        })
                        .collect_view()}
                    <p class="account">
                        <span class="organization" dir="auto">
                            {move || session.me.get().map(|me| me.tenant.name)}
                        </span>
                        <span class="muted" dir="auto">
                            {move || session.me.get().map(|me| me.user.email)}
                        </span>
                        <button class="link" on:click=move |_| sign_out.run(())>"Sign out"</button>
                    </p>
                </nav>
            </header>
            <main id="content" tabindex="-1" node_ref=content>
                {move || {
                    let (current, missing) = shown.get();
                    if let Some(what) = missing {
                        return view! { <page::NoAccess what/> }.into_any();
                    }
                    match current {
                        ConsolePage::Home => view! { <page::Home/> }.into_any(),
                        ConsolePage::Usage => lazy(Chunk::Usage),
                        ConsolePage::Plans => view! { <page::Plans/> }.into_any(),
                        ConsolePage::ApiKeys => view! { <page::ApiKeys/> }.into_any(),
                        ConsolePage::ApiKey(id) => view! { <page::ApiKeyPage id/> }.into_any(),
                        ConsolePage::ServiceTokens => view! { <page::ServiceTokens/> }.into_any(),
                        ConsolePage::Webhooks | ConsolePage::Webhook(_) => lazy(Chunk::Webhooks),
                        ConsolePage::Alerts => lazy(Chunk::Alerts),
                        ConsolePage::Audit => lazy(Chunk::Audit),
                        ConsolePage::Billing => lazy(Chunk::Billing),
                        ConsolePage::Settings => lazy(Chunk::Settings),
                        ConsolePage::SignIn | ConsolePage::Register | ConsolePage::NotFound => {
                            view! { <page::NotFound/> }.into_any()
                        }
                    }
                }}
            </main>
        </div>
        <CommandsView commands/>
    }
}
