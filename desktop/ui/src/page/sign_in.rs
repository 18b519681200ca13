use leptos::{prelude::*, task::spawn_local};
use quota_common::{
    ProblemCode,
    auth::{self, Login},
};

use crate::{
    api::{self, CallError, CallResult},
    component::{Alert, Field, FormState, Logo, PageHeader, busy_attr},
    model::{
        address::Query,
        form::{check_email, next_page},
    },
    reactive::effect,
    route::route,
    servers,
    session::{AuthState, session},
};

/// Goes to the requested page once the visitor is signed in.
fn redirect_when_signed_in() {
    let session = session();
    let route = route();
    effect(move || {
        if session.auth.get() == AuthState::SignedIn {
            let next = route.query.with_untracked(|query| query.get("next"));
            route.replace(&next_page(next.as_deref()));
        }
    });
}

fn sign_in(form: FormState, call: impl Future<Output = CallResult<auth::SignedIn>> + 'static) {
    let session = session();
    spawn_local(async move {
        let result = match call.await {
            // Only another call can show whether the browser has stored the cookies.
            Ok(_) => api::me().await.map_err(|error| {
                if error.is(ProblemCode::Unauthorized) {
                    CallError::CookiesBlocked
                } else {
                    error
                }
            }),
            Err(error) => Err(error),
        };
        if let Some(me) = form.finish(result) {
            session.begin(me);
        }
    });
}

#[component]
fn InsecureWarning() -> impl IntoView {
    (!api::is_secure()).then(|| {
        view! {
            <p class="alert" role="alert">
                "This page wasn't loaded over HTTPS, so your browser can't keep you signed in. Use HTTPS or localhost."
            </p>
        }
    })
}

/// Returns `path` with the page to open after sign-in as a query parameter.
fn with_next(path: &str) -> String {
    let next = route().query.with_untracked(|query| query.get("next"));
    let query = Query::default().with("next", &next.unwrap_or_default());
    format!("{path}{query}")
}

#[component]
pub fn SignIn() -> impl IntoView {
    redirect_when_signed_in();
    let has_expired = session().has_expired;
    let form = FormState::new();
    let (email, password) = (RwSignal::new(String::new()), RwSignal::new(String::new()));
    let submit = form.on_submit(move || {
        let body = Login {
            email: email.get_untracked().into(),
            password: password.get_untracked().into(),
            device_token: None,
        };
        sign_in(form, api::login(body));
    });
    view! {
        <main class="entry">
            <form class="card" novalidate on:submit=submit>
                <Logo/>
                <PageHeader title="Sign in"/>
                <InsecureWarning/>
                <div role="status">
                    {move || has_expired.get().then(|| view! { <p class="alert warn">"Your session has expired. Sign in again to continue."</p> })}
                </div>
                <Alert error=form.failure()/>
                <Field form name="email" label="Email" kind="email" autocomplete="username" value=email required=true check=check_email/>
                <Field form name="password" label="Password" kind="password" autocomplete="current-password" value=password required=true/>
                <button class="button primary full" aria-disabled=busy_attr(form.busy) data-busy=busy_attr(form.busy)>"Sign in"</button>
                <p class="muted center">"New to Quota? " <a href=with_next("/console/register")>"Create an account"</a></p>
            </form>
            <servers::ServerPicker/>
        </main>
    }
}

#[component]
pub fn Register() -> impl IntoView {
    redirect_when_signed_in();
    let form = FormState::new();
    let (email, password, organization) = (
        RwSignal::new(String::new()),
        RwSignal::new(String::new()),
        RwSignal::new(String::new()),
    );
    let submit = form.on_submit(move || {
        let organization = organization.get_untracked();
        let body = auth::Register {
            email: email.get_untracked().into(),
            password: password.get_untracked().into(),
            tenant_name: (!organization.trim().is_empty()).then(|| organization.into()),
        };
        sign_in(form, api::register(body));
    });
    view! {
        <main class="entry">
            <form class="card" novalidate on:submit=submit>
                <Logo/>
                <PageHeader title="Create an account" about="Manage API keys, rate limits and quotas for your API."/>
                <InsecureWarning/>
                <Alert error=form.failure()/>
                <Field form name="email" label="Email" kind="email" autocomplete="username" value=email required=true check=check_email/>
                <Field
                    form
                    name="password"
                    label="Password"
                    kind="password"
                    autocomplete="new-password"
                    value=password
                    required=true
                    hint="At least 12 characters. Try a few unrelated words."
                />
                <Field form name="tenant_name" label="Organization (optional)" value=organization autocomplete="organization"/>
                <button class="button primary full" aria-disabled=busy_attr(form.busy) data-busy=busy_attr(form.busy)>"Create account"</button>
                <p class="muted center">"Already have an account? " <a href=with_next("/console/sign-in")>"Sign in"</a></p>
            </form>
            <servers::ServerPicker/>
        </main>
    }
}
