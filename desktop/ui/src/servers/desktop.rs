//! The desktop app's additions to the console.
//!
//! While the server is unreachable or its responses do not arrive completely, the app shows previously loaded data. A
//! banner contains the time at which the data was loaded and a button to retry. Another banner appears if no keychain
//! is available to store sessions.

use std::cell::RefCell;

use leptos::{prelude::*, task::spawn_local};
use quota_common::ipc::Profile;

use crate::{
    api::{self, CallError},
    component::{Alert, Card, Confirm, Confirmation, Field, FormState, RelativeTime, busy_attr},
    host,
    session::{AuthState, Session},
};

/// Asks the host for its status, and then mounts the console.
pub fn start(mount: impl FnOnce() + 'static) {
    // Leptos cannot spawn tasks before the first mount.
    wasm_bindgen_futures::spawn_local(async move {
        if let Ok(status) = api::host_status().await {
            host::set_status(status);
        }
        mount();
    });
}

/// Notifies the app when the first usable page has been painted.
pub fn report_first_paint(session: Session) {
    let reported = RefCell::new(false);
    Effect::new(move |_| {
        if session.auth.get() != AuthState::Unknown && !reported.replace(true) {
            request_animation_frame(|| request_animation_frame(|| spawn_local(api::ready())));
        }
    });
}

#[component]
pub fn Banners() -> impl IntoView {
    let stored = host::stored();
    let has_no_keychain =
        || host::status().with(|it| it.as_ref().is_some_and(|it| !it.keeps_sessions));
    view! {
        <div class="banners" role="status">
            {move || {
                stored
                    .get()
                    .map(|it| {
                        let reason = if it.server_responded {
                            "The server's response didn't arrive completely."
                        } else {
                            "Can't reach the server."
                        };
                        view! {
                            <p class="banner warn">
                                <span>{reason} " Showing data from " <RelativeTime at=it.loaded_at/> "."</span>
                                <button class="button small" on:click=move |_| host::retry()>"Retry"</button>
                            </p>
                        }
                    })
            }}
            {move || {
                has_no_keychain()
                    .then(|| view! { <p class="banner">"No keychain found. You'll be signed out when Quota closes."</p> })
            }}
        </div>
    }
}

/// Shows the server in use, and lets users choose another server. Part of the sign-in pages, and of the error page that
/// appears if the console could not be loaded.
#[component]
pub fn ServerPicker() -> impl IntoView {
    view! {
        <details class="server-picker">
            <summary>"Server: " <bdi>{host::server_address()}</bdi></summary>
            <ServerList/>
        </details>
    }
}

/// The servers section of the settings page.
#[component]
pub fn ServerSettings() -> impl IntoView {
    view! {
        <Card id="servers" title="Servers">
            <p class="muted">"You sign in to each server separately."</p>
            <ServerList/>
        </Card>
    }
}

/// Reloads the console from its first page, because all loaded data belongs to the previous server.
fn restart() {
    let _ = window().location().replace("/console");
}

#[component]
fn ServerList() -> impl IntoView {
    let status = host::status();
    let failure = RwSignal::new(None::<CallError>);
    view! {
        <div class="servers">
            <Alert error=failure/>
            <ul class="sessions">
                {move || {
                    status
                        .get()
                        .map(|it| {
                            it.servers
                                .into_iter()
                                .map(|server| {
                                    let current = server.address == it.current;
                                    view! { <ServerRow server current failure/> }
                                })
                                .collect_view()
                        })
                }}
            </ul>
            <AddServer/>
        </div>
    }
}

#[component]
fn ServerRow(
    server: Profile,
    current: bool,
    failure: RwSignal<Option<CallError>>,
) -> impl IntoView {
    let Profile { address, name } = server;
    let label = if name.is_empty() {
        address.clone()
    } else {
        name.clone()
    };
    let confirmation = Confirmation::new();
    let to_use = address.clone();
    let select = move |_| {
        let address = to_use.clone();
        spawn_local(async move {
            match api::use_server(&address).await {
                Ok(_) => restart(),
                Err(error) => failure.set(Some(error)),
            }
        });
    };
    let to_remove = address.clone();
    let remove = Callback::new(move |()| {
        let address = to_remove.clone();
        let call = Box::pin(async move { api::forget_server(&address).await });
        confirmation.send(call, move |status| {
            if current {
                restart();
            } else {
                host::set_status(status);
            }
        });
    });
    view! {
        <li>
            <div>
                <strong dir="auto">{label.clone()}</strong>
                {current.then(|| view! { <span class="badge">"In use"</span> })}
                {(!name.is_empty()).then(|| view! { <p class="muted">{address.clone()}</p> })}
            </div>
            <div class="actions">
                {(!current).then(|| view! { <button type="button" class="button small" aria-label=format!("Use {label}") on:click=select>"Use"</button> })}
                <button type="button" class="button small" aria-label=format!("Remove {label}") on:click=move |_| confirmation.ask()>"Remove"</button>
            </div>
            <Confirm
                confirmation
                title=format!("Remove {label}?")
                message="You'll be signed out of this server. Data on the server isn't deleted."
                action="Remove server"
                run=remove
            />
        </li>
    }
}

#[component]
fn AddServer() -> impl IntoView {
    let (address, name) = (RwSignal::new(String::new()), RwSignal::new(String::new()));
    let form = FormState::new();
    let submit = form.on_submit(move || {
        let (server, label) = (address.get_untracked(), name.get_untracked());
        let call = Box::pin(async move { api::add_server(&server, &label).await });
        form.send(call, move |status| {
            address.set(String::new());
            name.set(String::new());
            host::set_status(status);
        });
    });
    view! {
        <form novalidate on:submit=submit>
            <Alert error=form.failure()/>
            <div class="pair">
                <Field form name="server_address" label="Address" value=address required=true placeholder="https://quota.example.com"/>
                <Field form name="server_name" label="Name (optional)" value=name/>
            </div>
            <div class="actions"><button class="button" aria-disabled=busy_attr(form.busy)>"Add server"</button></div>
        </form>
    }
}
