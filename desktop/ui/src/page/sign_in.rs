//! Signing in and registering.

use leptos::{ev::SubmitEvent, prelude::*, task::spawn_local};
use quota_common::{
    ProblemCode,
    auth::{self, Login},
};

use crate::{
    api::{self, Answer, Failure},
    app::{Gate, session},
    component::{Alert, Field, Head, Mark, held},
    model::{address::Query, form::next_page},
    route::route,
    shell,
};

/// The frame of both forms: what they share, and where they lead.
#[derive(Clone, Copy)]
struct Entry {
    busy: RwSignal<bool>,
    failure: RwSignal<Option<Failure>>,
}

impl Entry {
    fn new() -> Self {
        let session = session();
        let route = route();
        // Also for one who comes here signed in.
        Effect::new(move |_| {
            if session.gate.get() == Gate::In {
                let next = route.query.with_untracked(|query| query.get("next"));
                route.replace(&next_page(next.as_deref()));
            }
        });
        Self {
            busy: RwSignal::new(false),
            failure: RwSignal::new(None),
        }
    }

    fn run(self, call: impl Future<Output = Answer<auth::SignedIn>> + 'static) {
        let session = session();
        self.busy.set(true);
        self.failure.set(None);
        spawn_local(async move {
            match call.await {
                // What the cookies say is what counts.
                Ok(_) => match api::me().await {
                    Ok(me) => {
                        session.me.set(Some(me));
                        session.gate.set(Gate::In);
                    }
                    Err(failure) => {
                        let kept = !failure.is(ProblemCode::Unauthorized);
                        self.failure
                            .set(Some(if kept { failure } else { Failure::NotKept }));
                    }
                },
                Err(failure) => self.failure.set(Some(failure)),
            }
            self.busy.set(false);
        });
    }

    fn of(self, field: &'static str) -> Signal<Option<String>> {
        Signal::derive(move || self.failure.get()?.of_field(field))
    }

    fn rest(self) -> Signal<Option<String>> {
        Signal::derive(move || {
            if !api::is_reachable_securely() {
                return Some(
                    "This page was not loaded over https, so your browser will not keep you signed in. Open it over https, \
                     or at localhost."
                        .to_owned(),
                );
            }
            let failure = self.failure.get()?;
            (!failure.names_fields()).then(|| failure.text())
        })
    }
}

/// The address of the other form, which leads to the same page.
fn other(path: &str) -> String {
    let next = route().query.with_untracked(|query| query.get("next"));
    let query = Query::default().with("next", &next.unwrap_or_default());
    format!("{path}{query}")
}

#[component]
pub fn SignIn() -> impl IntoView {
    let entry = Entry::new();
    let (email, password) = (RwSignal::new(String::new()), RwSignal::new(String::new()));
    let submit = move |ev: SubmitEvent| {
        ev.prevent_default();
        let (email, password) = (email.get_untracked(), password.get_untracked());
        entry.run(api::login(Login {
            email: email.into(),
            password: password.into(),
            device_token: None,
        }));
    };
    view! {
        <main class="entry">
            <form class="card" on:submit=submit>
                <Mark/>
                <Head title="Sign in"/>
                <Alert text=entry.rest()/>
                <Field id="email" label="Email" kind="email" autocomplete="username" value=email required=true error=entry.of("email")/>
                <Field id="password" label="Password" kind="password" autocomplete="current-password" value=password required=true error=entry.of("password")/>
                <button class="button first full" aria-disabled=held(entry.busy)>"Sign in"</button>
                <p class="quiet center">"New here? " <a href=other("/console/register")>"Create an account"</a></p>
            </form>
            <shell::OtherServer/>
        </main>
    }
}

#[component]
pub fn Register() -> impl IntoView {
    let entry = Entry::new();
    let (email, password, tenant) = (
        RwSignal::new(String::new()),
        RwSignal::new(String::new()),
        RwSignal::new(String::new()),
    );
    let submit = move |ev: SubmitEvent| {
        ev.prevent_default();
        let tenant = tenant.get_untracked();
        entry.run(api::register(auth::Register {
            email: email.get_untracked().into(),
            password: password.get_untracked().into(),
            tenant_name: (!tenant.trim().is_empty()).then(|| tenant.into()),
        }));
    };
    view! {
        <main class="entry">
            <form class="card" on:submit=submit>
                <Mark/>
                <Head title="Create an account" about="Plans, keys and limits for your API, ready in a minute."/>
                <Alert text=entry.rest()/>
                <Field id="email" label="Email" kind="email" autocomplete="username" value=email required=true error=entry.of("email")/>
                <Field
                    id="password"
                    label="Password"
                    kind="password"
                    autocomplete="new-password"
                    value=password
                    required=true
                    hint="At least 12 characters. A few unrelated words are good."
                    error=entry.of("password")
                />
                <Field id="tenant_name" label="Organisation (optional)" value=tenant autocomplete="organization" error=entry.of("tenant_name")/>
                <button class="button first full" aria-disabled=held(entry.busy)>"Create account"</button>
                <p class="quiet center">"Have an account? " <a href=other("/console/sign-in")>"Sign in"</a></p>
            </form>
            <shell::OtherServer/>
        </main>
    }
}
