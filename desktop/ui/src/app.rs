//! The frame of the console: which page is shown, and to whom.
//!
//! A visitor who is not signed in is sent to sign in, and back. While the server cannot be reached that is said,
//! with a way to try again, and nobody is signed out for it.

use leptos::{prelude::*, task::spawn_local};
use quota_common::{ApiKeyId, ProblemCode, auth::Me};

use crate::{
    api::{self, Failure},
    component::{
        self, Commands, CommandsView, Empty, Icon, PaletteButton, Shape, Toasts, ToastsView,
        keep_clicks_from_held,
    },
    model::address::{Place, Query},
    page,
    preferences::Preferences,
    route::{Route, route},
    shell,
};

/// Who is signed in, as far as is known.
#[derive(Debug, Clone, PartialEq)]
pub enum Gate {
    Unknown,
    In,
    Out,
    /// The server did not say.
    Unsaid(Failure),
}

/// What pages share. Key texts are here as long as the page lives, for the keys made in it.
#[derive(Clone, Copy)]
pub struct Session {
    pub gate: RwSignal<Gate>,
    pub me: RwSignal<Option<Me>>,
    pub known_keys: RwSignal<Vec<(ApiKeyId, String)>>,
    /// Changes while time passes.
    pub minute: RwSignal<u32>,
}

impl Session {
    fn provide(route: Route, toasts: Toasts) -> Self {
        let session = Self {
            gate: RwSignal::new(Gate::Unknown),
            me: RwSignal::new(None),
            known_keys: RwSignal::new(Vec::new()),
            minute: component::minute(),
        };
        provide_context(session);
        api::when_over(move |failure| {
            session.end();
            if *failure == Failure::Elsewhere {
                // Theirs begins where it would for them.
                session.gate.set(Gate::Unknown);
                route.replace("/console");
                toasts.say(failure.text());
                session.ask();
            }
        });
        session
    }

    /// Asks the server who is signed in.
    pub fn ask(self) {
        spawn_local(async move {
            match api::me().await {
                Ok(me) => {
                    self.me.set(Some(me));
                    self.gate.set(Gate::In);
                }
                Err(failure) => self.failed(&failure),
            }
        });
    }

    /// Of the question who is signed in; that nobody is, any call tells.
    fn failed(self, failure: &Failure) {
        if !failure.is(ProblemCode::Unauthorized) && self.gate.get_untracked() != Gate::In {
            self.gate.set(Gate::Unsaid(failure.clone()));
        }
    }

    pub fn end(self) {
        self.me.set(None);
        self.known_keys.set(Vec::new());
        self.gate.set(Gate::Out);
    }
}

pub fn session() -> Session {
    expect_context()
}

#[component]
pub fn App() -> impl IntoView {
    let toasts = Toasts::provide();
    Preferences::provide();
    let route = Route::provide();
    let session = Session::provide(route, toasts);
    keep_clicks_from_held();
    session.ask();
    let place = Memo::new(move |_| Place::of(&route.path.get()));
    // One frame around all the pages in it: only what is inside changes with the address.
    let is_entry = Memo::new(move |_| {
        Some(place.get()).filter(|place| matches!(place, Place::SignIn | Place::Register))
    });
    shell::watch(session);
    view! {
        <shell::Banner/>
        {move || match is_entry.get() {
            Some(Place::SignIn) => view! { <page::SignIn/> }.into_any(),
            Some(_) => view! { <page::Register/> }.into_any(),
            None => view! { <Frame place/> }.into_any(),
        }}
        <ToastsView toasts/>
    }
}

const PLACES: [(&str, &str, Shape); 6] = [
    ("/console", "Home", Shape::Home),
    ("/console/plans", "Plans", Shape::Plans),
    ("/console/api-keys", "API keys", Shape::Key),
    ("/console/service-tokens", "Service tokens", Shape::Token),
    ("/console/audit", "Audit", Shape::Audit),
    ("/console/settings", "Settings", Shape::Settings),
];

#[component]
fn Frame(place: Memo<Place>) -> impl IntoView {
    let session = session();
    let route = route();
    Effect::new(move |_| {
        if session.gate.get() == Gate::Out {
            let here = format!(
                "{}{}",
                route.path.get_untracked(),
                route.query.get_untracked()
            );
            let query = Query::default().with("next", &here);
            route.replace(&format!("/console/sign-in{query}"));
        }
    });
    let gate = Memo::new(move |_| session.gate.get());
    move || {
        match gate.get() {
        Gate::In => view! { <Inside place/> }.into_any(),
        Gate::Unsaid(failure) => view! {
            <main class="alone">
                <Empty alone=true shape=Shape::Close title="The server does not answer" about=failure.text()>
                    <button class="button first" on:click=move |_| session.ask()>"Try again"</button>
                    <shell::OtherServer/>
                </Empty>
            </main>
        }
            .into_any(),
        Gate::Unknown | Gate::Out => view! {
            <main class="alone" aria-busy="true">
                <p class="unseen" role="status">"Loading"</p>
            </main>
        }
            .into_any(),
    }
    }
}

/// The desktop app has forgotten the session, and the server knows nothing of it.
const SIGNED_OUT_HERE: &str = "You are signed out on this computer, but the server could not be told. The session \
    there ends by itself, or can be ended in Settings.";

#[component]
fn Inside(place: Memo<Place>) -> impl IntoView {
    let session = session();
    let toasts = expect_context::<Toasts>();
    let path = route().path;
    let open = RwSignal::new(false);
    let sign_out = Callback::new(move |()| {
        spawn_local(async move {
            match api::logout().await {
                Ok(()) => session.end(),
                Err(_) if shell::SIGNS_OUT_ALONE => {
                    session.end();
                    toasts.say(SIGNED_OUT_HERE);
                }
                Err(Failure::Elsewhere) => {}
                Err(failure) => toasts.say(failure.text()),
            }
        });
    });
    let commands = Commands::new(sign_out);
    let content = NodeRef::<leptos::html::Main>::new();
    Effect::new(move |before: Option<()>| {
        path.track();
        open.set(false);
        // Who moves by keyboard or ear goes on where the new page begins.
        if let (Some(()), Some(content)) = (before, content.get_untracked()) {
            let _ = content.focus();
        }
    });
    let is_here = move |place: &str| {
        let path = path.get();
        let path = path.trim_end_matches('/');
        path == place || (place != "/console" && path.starts_with(&format!("{place}/")))
    };
    view! {
        <a class="skip" href="#content">"Skip to content"</a>
        <div class="frame">
            <header class="side" class:open=open>
                <div class="brand-row">
                    <a class="brand" href="/console"><crate::component::Mark/>"Quota"</a>
                    <PaletteButton commands/>
                    <button
                        class="button icon-only menu"
                        aria-expanded=move || open.get().to_string()
                        aria-controls="places"
                        aria-label="Menu"
                        on:click=move |_| open.update(|open| *open = !*open)
                    >
                        <Icon shape=Shape::Menu/>
                    </button>
                </div>
                <nav id="places" aria-label="Console">
                    <ul>
                        {PLACES
                            .into_iter()
                            .map(|(href, name, shape)| {
                                view! {
                                    <li>
                                        <a
                                            href=href
                                            aria-current=move || is_here(href).then_some("page")
                                        >
                                            <Icon shape/>
                                            {name}
                                        </a>
                                    </li>
                                }
                            })
                            .collect_view()}
                    </ul>
                    <p class="who">
                        <span class="tenant" dir="auto">
                            {move || session.me.get().map(|me| me.tenant.name)}
                        </span>
                        <span class="quiet" dir="auto">
                            {move || session.me.get().map(|me| me.user.email)}
                        </span>
                        <button class="link" on:click=move |_| sign_out.run(())>"Sign out"</button>
                    </p>
                </nav>
            </header>
            <main id="content" tabindex="-1" node_ref=content>
                {move || match place.get() {
                    Place::Home => view! { <page::Home/> }.into_any(),
                    Place::Plans => view! { <page::Plans/> }.into_any(),
                    Place::ApiKeys => view! { <page::ApiKeys/> }.into_any(),
                    Place::ApiKey(id) => view! { <page::ApiKeyPage id/> }.into_any(),
                    Place::ServiceTokens => view! { <page::ServiceTokens/> }.into_any(),
                    Place::Audit => view! { <page::Audit/> }.into_any(),
                    Place::Settings => view! { <page::Settings/> }.into_any(),
                    Place::SignIn | Place::Register | Place::Nowhere => {
                        view! { <page::NotFound/> }.into_any()
                    }
                }}
            </main>
        </div>
        <CommandsView commands/>
    }
}
