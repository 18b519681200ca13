//! Settings: profile, theme, password, and active sessions.

use leptos::prelude::*;
use quota_common::{
    Page,
    auth::{ChangePassword, Session, UpdateMe},
    call::PageOf,
};
use wasm_bindgen::JsCast;

use crate::{
    api,
    component::{
        Async, Card, Confirm, Confirmation, Field, FormState, Loader, PageForm, PageHeader,
        RelativeTime, Toasts, browser_time_zone, load,
    },
    preferences::preferences,
    servers,
    session::session,
};

#[component]
pub fn Settings() -> impl IntoView {
    view! {
        <PageHeader title="Settings"/>
        <servers::ServerSettings/>
        <Profile/>
        <Theme/>
        <Password/>
        <Sessions/>
    }
}

#[component]
fn Profile() -> impl IntoView {
    let session = session();
    let toasts = expect_context::<Toasts>();
    let me = session.me.get_untracked();
    let text = |text: Option<String>| RwSignal::new(text.unwrap_or_default());
    let name = text(me.as_ref().map(|me| me.user.name.clone()));
    // A name can be changed but not removed.
    let has_name = name.with_untracked(|name| !name.is_empty());
    let tenant = text(me.as_ref().map(|me| me.tenant.name.clone()));
    let zone = text(me.as_ref().map(|me| me.tenant.time_zone.clone()));
    let can_administer = me.is_some_and(|me| me.tenant.role.may_administer());
    let form = FormState::new();
    let browser_zone = browser_time_zone();
    let submit = move || {
        let name = name.get_untracked();
        let body = UpdateMe {
            name: (!name.trim().is_empty()).then(|| name.into()),
            tenant_name: can_administer.then(|| tenant.get_untracked().into()),
            time_zone: can_administer.then(|| zone.get_untracked().into()),
        };
        form.send(api::update_me(body), move |me| {
            session.me.set(Some(me));
            toasts.succeed("Changes saved");
        });
    };
    view! {
        <Card id="profile" title="Profile">
            <PageForm form action="Save changes" submit>
                <div class="pair">
                    <Field form name="name" id="own_name" label="Your name" value=name autocomplete="name" required=has_name/>
                    {can_administer.then(|| view! { <Field form name="tenant_name" label="Organization" value=tenant autocomplete="organization" required=true/> })}
                </div>
                {can_administer
                    .then(|| {
                        view! {
                            <Field
                                form
                                name="time_zone"
                                label="Quota time zone"
                                value=zone
                                required=true
                                suggestions=time_zones()
                                hint=format!("Determines when days and months start. Your browser's time zone is {browser_zone}.")
                            />
                        }
                    })}
            </PageForm>
        </Card>
    }
}

/// Returns the time zones that the browser supports.
fn time_zones() -> Vec<String> {
    // Older browsers cannot list time zones. The field then has no suggestions.
    let intl = js_sys::Reflect::get(&js_sys::global(), &"Intl".into()).unwrap_or_default();
    let list = js_sys::Reflect::get(&intl, &"supportedValuesOf".into())
        .ok()
        .and_then(|it| it.dyn_into::<js_sys::Function>().ok())
        .and_then(|it| it.call1(&intl, &"timeZone".into()).ok())
        .map(|it| js_sys::Array::from(&it))
        .unwrap_or_default();
    let utc = "UTC".to_owned();
    [utc]
        .into_iter()
        .chain(list.iter().filter_map(|it| it.as_string()))
        .collect()
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
                                <input type="radio" name="theme" value=value prop:checked=move || preferences.theme.get() == value on:change=move |_| preferences.set_theme(value)/>
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
    let form = FormState::new();
    let submit = move || {
        let body = ChangePassword {
            current_password: current.get_untracked().into(),
            new_password: new.get_untracked().into(),
        };
        form.send(api::change_password(body), move |()| {
            let _ = current.try_set(String::new());
            let _ = new.try_set(String::new());
            toasts.succeed("Password changed. All other sessions were revoked.");
        });
    };
    view! {
        <Card id="password-title" title="Password">
            <PageForm form action="Change password" submit>
                <div class="pair">
                    <Field form name="current_password" label="Current password" kind="password" autocomplete="current-password" value=current required=true/>
                    <Field
                        form
                        name="new_password"
                        label="New password"
                        kind="password"
                        autocomplete="new-password"
                        value=new
                        required=true
                        hint="At least 12 characters. Try a few unrelated words."
                    />
                </div>
            </PageForm>
        </Card>
    }
}

/// Describes a client, such as `Firefox on Linux`, based on its `User-Agent`.
fn client_name(user_agent: Option<&str>) -> String {
    let Some(agent) = user_agent else {
        return "Unknown client".to_owned();
    };
    let find = |names: &[(&str, &'static str)]| {
        names
            .iter()
            .find(|(part, _)| agent.contains(part))
            .map(|(_, name)| *name)
    };
    let browser = find(&[
        ("Quota-Desktop/", "Quota desktop app"),
        ("Edg/", "Edge"),
        ("Firefox/", "Firefox"),
        ("Chrome/", "Chrome"),
        ("Safari/", "Safari"),
        ("curl/", "curl"),
    ]);
    let system = find(&[
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
                {page.items.into_iter().map(|it| view! { <SessionRow it loader/> }).collect_view()}
            </ul>
        }
    };
    view! {
        <Card id="sessions" title="Active sessions">
            <Async loader what="sessions" inside=true show/>
        </Card>
    }
}

#[component]
fn SessionRow(it: Session, loader: Loader<Page<Session>>) -> impl IntoView {
    let toasts = expect_context::<Toasts>();
    let name = client_name(it.user_agent.as_deref());
    let confirmation = Confirmation::new();
    let id = it.id;
    let run = Callback::new(move |()| {
        confirmation.send(api::revoke_session(id), move |()| {
            toasts.succeed("Session revoked");
            loader.reload();
        });
    });
    view! {
        <li>
            <div>
                <strong>{name.clone()}</strong>
                {it.current.then(|| view! { <span class="badge">"This device"</span> })}
                <p class="muted">
                    {it.ip.clone().map(|ip| format!("{ip} · "))} "Last used " <RelativeTime at=it.last_used_at/>
                </p>
            </div>
            {(!it.current)
                .then(|| view! { <button class="button small" aria-label=format!("Revoke session: {name}") on:click=move |_| confirmation.ask()>"Revoke"</button> })}
            <Confirm
                confirmation
                title="Revoke session?"
                message=format!("{name} will be signed out immediately.")
                action="Revoke session"
                run
            />
        </li>
    }
}
