//! Settings: how the console looks, who one is, and where one is signed in.

use leptos::{ev::SubmitEvent, prelude::*, task::spawn_local};
use quota_common::{
    Page,
    auth::{ChangePassword, Session, UpdateMe},
    call::PageOf,
};

use crate::{
    api::{self, Failure},
    app::session,
    component::{Alert, Confirm, Field, Head, Loader, Shown, Toasts, When, held, load},
    preferences::preferences,
    shell,
};

#[component]
pub fn Settings() -> impl IntoView {
    view! {
        <Head title="Settings"/>
        <shell::Servers/>
        <Profile/>
        <Theme/>
        <Password/>
        <Sessions/>
    }
}

/// What one form has come to.
#[derive(Clone, Copy)]
struct Outcome {
    busy: RwSignal<bool>,
    failure: RwSignal<Option<Failure>>,
}

impl Outcome {
    fn new() -> Self {
        Self {
            busy: RwSignal::new(false),
            failure: RwSignal::new(None),
        }
    }

    fn of(self, field: &'static str) -> Signal<Option<String>> {
        Signal::derive(move || self.failure.get()?.of_field(field))
    }

    fn rest(self) -> Signal<Option<String>> {
        Signal::derive(move || {
            let failure = self.failure.get()?;
            (!failure.names_fields()).then(|| failure.text())
        })
    }
}

#[component]
fn Profile() -> impl IntoView {
    let session = session();
    let toasts = expect_context::<Toasts>();
    let me = session.me.get_untracked();
    let text = |text: Option<String>| RwSignal::new(text.unwrap_or_default());
    let name = text(me.as_ref().map(|me| me.user.name.clone()));
    let tenant = text(me.as_ref().map(|me| me.tenant.name.clone()));
    let zone = text(me.as_ref().map(|me| me.tenant.time_zone.clone()));
    let administers = me.is_some_and(|me| me.tenant.role.may_administer());
    let it = Outcome::new();
    let here = here();
    let submit = move |ev: SubmitEvent| {
        ev.prevent_default();
        it.busy.set(true);
        it.failure.set(None);
        let own = name.get_untracked();
        let body = UpdateMe {
            name: (!own.trim().is_empty()).then(|| own.into()),
            tenant_name: administers.then(|| tenant.get_untracked().into()),
            time_zone: administers.then(|| zone.get_untracked().into()),
        };
        spawn_local(async move {
            match api::update_me(body).await {
                Ok(me) => {
                    session.me.set(Some(me));
                    toasts.say("Profile saved.");
                }
                Err(failure) => it.failure.set(Some(failure)),
            }
            let _ = it.busy.try_set(false);
        });
    };
    view! {
        <section class="card" aria-labelledby="profile">
            <h2 id="profile">"Profile"</h2>
            <form on:submit=submit>
                <Alert text=it.rest()/>
                <div class="pair">
                    <Field id="own_name" label="Your name" value=name autocomplete="name" error=it.of("name")/>
                    {administers.then(|| view! { <Field id="tenant_name" label="Organisation" value=tenant autocomplete="organization" error=it.of("tenant_name")/> })}
                </div>
                {administers
                    .then(|| {
                        view! {
                            <Field
                                id="time_zone"
                                label="Time zone for quotas"
                                value=zone
                                hint=format!("Decides when a day or month starts. This browser is in {here}.")
                                error=it.of("time_zone")
                            />
                        }
                    })}
                <div class="actions"><button class="button first" aria-disabled=held(it.busy)>"Save"</button></div>
            </form>
        </section>
    }
}

/// The browser's time zone.
fn here() -> String {
    let options = js_sys::Intl::DateTimeFormat::default().resolved_options();
    js_sys::Reflect::get(&options, &"timeZone".into())
        .ok()
        .and_then(|zone| zone.as_string())
        .unwrap_or_else(|| "UTC".to_owned())
}

const THEMES: [(&str, &str); 3] = [("system", "System"), ("light", "Light"), ("dark", "Dark")];

#[component]
fn Theme() -> impl IntoView {
    let preferences = preferences();
    view! {
        <section class="card">
            <fieldset class="radios">
                <legend><h2>"Theme"</h2></legend>
                {THEMES
                    .into_iter()
                    .map(|(value, name)| {
                        view! {
                            <label class="check">
                                <input type="radio" name="theme" value=value prop:checked=move || preferences.theme.get() == value on:change=move |_| preferences.choose_theme(value)/>
                                <span>{name}</span>
                            </label>
                        }
                    })
                    .collect_view()}
            </fieldset>
        </section>
    }
}

#[component]
fn Password() -> impl IntoView {
    let toasts = expect_context::<Toasts>();
    let (current, new) = (RwSignal::new(String::new()), RwSignal::new(String::new()));
    let it = Outcome::new();
    let submit = move |ev: SubmitEvent| {
        ev.prevent_default();
        it.busy.set(true);
        it.failure.set(None);
        let body = ChangePassword {
            current_password: current.get_untracked().into(),
            new_password: new.get_untracked().into(),
        };
        spawn_local(async move {
            match api::change_password(body).await {
                Ok(()) => {
                    current.set(String::new());
                    new.set(String::new());
                    toasts.say("Password changed. All other sessions have ended.");
                }
                Err(failure) => it.failure.set(Some(failure)),
            }
            let _ = it.busy.try_set(false);
        });
    };
    view! {
        <section class="card" aria-labelledby="password-title">
            <h2 id="password-title">"Password"</h2>
            <form on:submit=submit>
                <Alert text=it.rest()/>
                <div class="pair">
                    <Field id="current_password" label="Current password" kind="password" autocomplete="current-password" value=current required=true error=it.of("current_password")/>
                    <Field
                        id="new_password"
                        label="New password"
                        kind="password"
                        autocomplete="new-password"
                        value=new
                        required=true
                        hint="At least 12 characters."
                        error=it.of("new_password")
                    />
                </div>
                <div class="actions"><button class="button first" aria-disabled=held(it.busy)>"Change password"</button></div>
            </form>
        </section>
    }
}

/// What a browser calls itself, in a few words.
fn client(agent: Option<&str>) -> String {
    let Some(agent) = agent else {
        return "Unknown client".to_owned();
    };
    let named = |names: &[(&str, &'static str)]| {
        names
            .iter()
            .find(|(part, _)| agent.contains(part))
            .map(|(_, name)| *name)
    };
    let browser = named(&[
        ("Quota-Desktop/", "Quota for the desktop"),
        ("Edg/", "Edge"),
        ("Firefox/", "Firefox"),
        ("Chrome/", "Chrome"),
        ("Safari/", "Safari"),
        ("curl/", "curl"),
    ]);
    let system = named(&[
        ("Windows", "Windows"),
        ("Android", "Android"),
        ("iPhone", "iOS"),
        ("iPad", "iPadOS"),
        ("Mac OS", "macOS"),
        ("Linux", "Linux"),
    ]);
    match (browser, system) {
        (Some(browser), Some(system)) => format!("{browser} on {system}"),
        (Some(browser), None) => browser.to_owned(),
        _ => agent.chars().take(60).collect(),
    }
}

#[component]
fn Sessions() -> impl IntoView {
    let loader = load(|| {
        api::list_sessions(PageOf {
            limit: Some(100),
            cursor: None,
        })
    });
    let show = move |page: Page<Session>| {
        view! {
            <ul class="sessions">
                {page.items.into_iter().map(|it| view! { <OneSession it loader/> }).collect_view()}
            </ul>
        }
    };
    view! {
        <section class="card" aria-labelledby="sessions">
            <h2 id="sessions">"Where you are signed in"</h2>
            <Shown loader show/>
        </section>
    }
}

#[component]
fn OneSession(it: Session, loader: Loader<Page<Session>>) -> impl IntoView {
    let toasts = expect_context::<Toasts>();
    let name = client(it.user_agent.as_deref());
    let asking = RwSignal::new(false);
    let busy = RwSignal::new(false);
    let failure = RwSignal::new(None::<String>);
    let id = it.id;
    let run = Callback::new(move |()| {
        busy.set(true);
        spawn_local(async move {
            match api::end_session(id).await {
                Ok(()) => {
                    toasts.say("Session ended.");
                    asking.set(false);
                    loader.reload();
                }
                Err(refused) => failure.set(Some(refused.text())),
            }
            let _ = busy.try_set(false);
        });
    });
    view! {
        <li>
            <div>
                <strong>{name.clone()}</strong>
                {it.current.then(|| view! { <span class="badge on">"this device"</span> })}
                <p class="quiet">
                    {it.ip.clone().map(|ip| format!("{ip}, "))} "used " <When at=it.last_used_at/>
                </p>
            </div>
            {(!it.current)
                .then(|| view! { <button class="button small" aria-label=format!("End the session of {name}") on:click=move |_| asking.set(true)>"End"</button> })}
            <Confirm
                open=asking
                title=format!("End the session of {name}?")
                breaks="That device is signed out immediately."
                action="End session"
                busy
                failure
                run
            />
        </li>
    }
}
