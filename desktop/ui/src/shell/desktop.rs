//! Within the desktop app.
//!
//! While the server is away the app answers with what it had loaded; then a banner says so and from when that is, and
//! leads to trying again. Another banner says it when there is no keychain to keep sessions in.

use std::cell::RefCell;

use leptos::{ev::SubmitEvent, prelude::*, task::spawn_local};
use quota_common::{
    Timestamp,
    shell::{Profile, Standing},
};

use crate::{
    api::{self, Failure},
    app::{Gate, Session},
    component::{Alert, Confirm, Field, When, held},
};

/// What the app told of itself. Without an owner: it is there before the first page and after the last.
struct Around {
    standing: ArcRwSignal<Option<Standing>>,
    /// While the server is away: when what is shown was loaded.
    loaded_at: ArcRwSignal<Option<Timestamp>>,
    again: ArcRwSignal<u32>,
}

thread_local! {
    static AROUND: Around = Around {
        standing: ArcRwSignal::new(None),
        loaded_at: ArcRwSignal::new(None),
        again: ArcRwSignal::new(0),
    };
}

fn standing() -> ArcRwSignal<Option<Standing>> {
    AROUND.with(|around| around.standing.clone())
}

/// Shows the console once it is known how the app stands.
pub fn begin(show: impl FnOnce() + 'static) {
    // Leptos spawns nothing before something is mounted.
    wasm_bindgen_futures::spawn_local(async move {
        if let Ok(standing) = api::standing().await {
            stands(standing);
        }
        show();
    });
}

pub fn stands(now: Standing) {
    standing().set(Some(now));
}

/// The address of the server.
pub fn current() -> String {
    standing().with_untracked(|it| it.as_ref().map(|it| it.current.clone()).unwrap_or_default())
}

/// What a call told about the server: that it is away, by when the answer had been loaded, or that it is there.
pub fn heard(loaded_at: Option<Timestamp>) {
    AROUND.with(|around| {
        if around.loaded_at.get_untracked() != loaded_at {
            around.loaded_at.set(loaded_at);
        }
    });
}

/// Tells the app when the first page that a person can use has been painted.
pub fn watch(session: Session) {
    let told = RefCell::new(false);
    Effect::new(move |_| {
        if session.gate.get() != Gate::Unknown && !told.replace(true) {
            request_animation_frame(|| request_animation_frame(|| spawn_local(api::ready())));
        }
    });
}

/// Whether signing out is done also when the server cannot be told: the app holds the tokens.
pub const SIGNS_OUT_ALONE: bool = true;

/// Read by what loads: it loads again when a person asks for that.
pub fn again() {
    AROUND.with(|around| around.again.track());
}

#[component]
pub fn Banner() -> impl IntoView {
    let (loaded_at, again) = AROUND.with(|it| (it.loaded_at.clone(), it.again.clone()));
    let forgetful = move || standing().with(|it| it.as_ref().is_some_and(|it| !it.keeps_sessions));
    view! {
        <div class="banners" role="status">
            {move || {
                let again = again.clone();
                loaded_at
                    .get()
                    .map(|at| {
                        view! {
                            <p class="banner warn">
                                <span>"The server cannot be reached. What is shown was loaded " <When at/> "."</span>
                                <button class="button small" on:click=move |_| again.update(|it| *it = it.wrapping_add(1))>
                                    "Try again"
                                </button>
                            </p>
                        }
                    })
            }}
            {move || {
                forgetful()
                    .then(|| {
                        view! {
                            <p class="banner">
                                "This computer's keychain does not answer: you stay signed in only until Quota is closed."
                            </p>
                        }
                    })
            }}
        </div>
    }
}

/// Where nobody is signed in: which server that is about, and the others.
#[component]
pub fn OtherServer() -> impl IntoView {
    view! {
        <details class="other-server">
            <summary>"Server: " <bdi>{current()}</bdi></summary>
            <List/>
        </details>
    }
}

/// A part of the settings.
#[component]
pub fn Servers() -> impl IntoView {
    view! {
        <section class="card" aria-labelledby="servers">
            <h2 id="servers">"Servers"</h2>
            <p class="quiet">"Each keeps a session of its own."</p>
            <List/>
        </section>
    }
}

/// All that is shown is of one server: another begins anew.
fn begin_anew() {
    let _ = window().location().replace("/console");
}

#[component]
fn List() -> impl IntoView {
    let standing = standing();
    let failure = RwSignal::new(None::<String>);
    view! {
        <div class="servers">
            <Alert text=failure/>
            <ul class="sessions">
                {move || {
                    standing
                        .get()
                        .map(|it| {
                            it.servers
                                .into_iter()
                                .map(|server| {
                                    let current = server.address == it.current;
                                    view! { <One server current failure/> }
                                })
                                .collect_view()
                        })
                }}
            </ul>
            <Add/>
        </div>
    }
}

#[component]
fn One(server: Profile, current: bool, failure: RwSignal<Option<String>>) -> impl IntoView {
    let Profile { address, name } = server;
    let shown = if name.is_empty() {
        address.clone()
    } else {
        name.clone()
    };
    let (asking, busy) = (RwSignal::new(false), RwSignal::new(false));
    let refused = RwSignal::new(None::<String>);
    let to_use = address.clone();
    let choose = move |_| {
        let address = to_use.clone();
        spawn_local(async move {
            match api::use_server(&address).await {
                Ok(_) => begin_anew(),
                Err(it) => failure.set(Some(it.text())),
            }
        });
    };
    let to_forget = address.clone();
    let forget = Callback::new(move |()| {
        let address = to_forget.clone();
        busy.set(true);
        spawn_local(async move {
            match api::forget_server(&address).await {
                Ok(_) if current => begin_anew(),
                Ok(standing) => stands(standing),
                Err(it) => {
                    let _ = refused.try_set(Some(it.text()));
                }
            }
            let _ = busy.try_set(false);
        });
    });
    view! {
        <li>
            <div>
                <strong dir="auto">{shown.clone()}</strong>
                {current.then(|| view! { <span class="badge on">"in use"</span> })}
                {(!name.is_empty()).then(|| view! { <p class="quiet">{address.clone()}</p> })}
            </div>
            <div class="actions">
                {(!current).then(|| view! { <button type="button" class="button small" aria-label=format!("Use {shown}") on:click=choose>"Use"</button> })}
                <button type="button" class="button small" aria-label=format!("Remove {shown}") on:click=move |_| asking.set(true)>"Remove"</button>
            </div>
            <Confirm
                open=asking
                title=format!("Remove {shown}?")
                breaks="Its session ends. Nothing on the server is deleted."
                action="Remove server"
                busy
                failure=refused
                run=forget
            />
        </li>
    }
}

#[component]
fn Add() -> impl IntoView {
    let (address, name) = (RwSignal::new(String::new()), RwSignal::new(String::new()));
    let busy = RwSignal::new(false);
    let failure = RwSignal::new(None::<Failure>);
    let of = move |field: &'static str| Signal::derive(move || failure.get()?.of_field(field));
    let rest = Signal::derive(move || {
        let failure = failure.get()?;
        (!failure.names_fields()).then(|| failure.text())
    });
    let submit = move |ev: SubmitEvent| {
        ev.prevent_default();
        busy.set(true);
        failure.set(None);
        spawn_local(async move {
            match api::add_server(&address.get_untracked(), &name.get_untracked()).await {
                Ok(standing) => {
                    address.set(String::new());
                    name.set(String::new());
                    stands(standing);
                }
                Err(it) => failure.set(Some(it)),
            }
            let _ = busy.try_set(false);
        });
    };
    view! {
        <form on:submit=submit>
            <Alert text=rest/>
            <div class="pair">
                <Field id="server_address" label="Address" value=address required=true placeholder="https://quota.example.com" error=of("server_address")/>
                <Field id="server_name" label="Name (optional)" value=name error=of("server_name")/>
            </div>
            <div class="actions"><button class="button" aria-disabled=held(busy)>"Add server"</button></div>
        </form>
    }
}
