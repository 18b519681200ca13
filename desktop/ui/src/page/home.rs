//! Home: an overview and the first steps.

use std::time::Duration;

use leptos::{prelude::*, task::spawn_local};
use quota_common::{
    Page, Timestamp,
    api_key::ApiKey,
    call::{KeyFilter, PageOf},
    page::ApiKeyOrder,
    plan::Plan,
};

use crate::{
    api::{self, CallResult, PendingCall},
    component::{Async, Icon, PageHeader, RelativeTime, Shape, load},
    model::text::number,
};

/// How often to look for the first request.
const POLL: Duration = Duration::from_secs(5);

#[derive(Clone)]
struct Overview {
    plans: Page<Plan>,
    /// Contains the most recently used key.
    keys: Page<ApiKey>,
    active_keys: u64,
    tokens: u64,
}

impl Overview {
    fn last_request(&self) -> Option<Timestamp> {
        last_request(&self.keys)
    }
}

fn last_request(keys: &Page<ApiKey>) -> Option<Timestamp> {
    keys.items.first()?.last_used_at
}

const fn one_item() -> PageOf {
    PageOf {
        limit: Some(1),
        cursor: None,
    }
}

fn most_recently_used() -> PendingCall<Page<ApiKey>> {
    let filter = KeyFilter {
        sort: Some(ApiKeyOrder::LastUsed),
        ..KeyFilter::default()
    };
    api::list_api_keys(filter, one_item())
}

async fn overview() -> CallResult<Overview> {
    let active = KeyFilter {
        is_active: Some(true),
        is_expired: Some(false),
        ..KeyFilter::default()
    };
    Ok(Overview {
        plans: api::list_plans(None, one_item()).await?,
        keys: most_recently_used().await?,
        active_keys: api::list_api_keys(active, one_item()).await?.total,
        tokens: api::list_service_tokens(one_item()).await?.total,
    })
}

#[component]
fn Stat(
    name: &'static str,
    value: u64,
    #[prop(into)] about: String,
    href: &'static str,
) -> impl IntoView {
    view! {
        <a class="stat card" href=href>
            <span class="muted">{name}</span>
            <strong>{number(value)}</strong>
            <span class="muted small-text">{about}</span>
        </a>
    }
}

#[component]
fn Step(
    done: bool,
    /// Whether the steps before it are done.
    available: bool,
    title: &'static str,
    about: &'static str,
    #[prop(into)] href: String,
    action: &'static str,
) -> impl IntoView {
    view! {
        <li class="step" class:done=done>
            <span class="tick">{done.then(|| view! { <Icon shape=Shape::Check/> })}</span>
            <div>
                <h3>{title} {done.then(|| view! { <span class="visually-hidden">" (done)"</span> })}</h3>
                <p class="muted">{about}</p>
            </div>
            {(available && !done).then(|| view! { <a class="button small" href=href>{action}</a> })}
        </li>
    }
}

#[component]
fn GetStarted(overview: Overview) -> impl IntoView {
    let key_page = overview.keys.items.first().map_or_else(
        || "/console/api-keys".to_owned(),
        |key| format!("/console/api-keys/{}", key.id),
    );
    let (has_plan, has_key) = (overview.plans.total > 0, overview.keys.total > 0);
    view! {
        <section class="card" aria-labelledby="get-started">
            <h2 id="get-started">"Get started"</h2>
            <ol class="steps">
                <Step
                    done=has_plan
                    available=true
                    title="Create a plan"
                    about="Set a rate limit and, if you like, daily and monthly quotas."
                    href="/console/plans?new=1"
                    action="New plan"
                />
                <Step
                    done=has_key
                    available=has_plan
                    title="Create an API key"
                    about="Shown once. Clients send it in X-API-Key."
                    href="/console/api-keys?new=1"
                    action="New key"
                />
                <Step
                    done=overview.last_request().is_some()
                    available=has_key
                    title="Send a request"
                    about="Try the key here or use curl. We'll detect your first request."
                    href=key_page
                    action="Try it"
                />
            </ol>
        </section>
    }
}

#[component]
pub fn Home() -> impl IntoView {
    let loader = load(overview);
    let is_waiting = move || {
        loader
            .ready()
            .is_some_and(|it| it.keys.total > 0 && it.last_request().is_none())
    };
    let poll = set_interval_with_handle(
        move || {
            if untrack(is_waiting) && !document().hidden() {
                spawn_local(async move {
                    if most_recently_used()
                        .await
                        .is_ok_and(|keys| last_request(&keys).is_some())
                    {
                        loader.reload();
                    }
                });
            }
        },
        POLL,
    );
    on_cleanup(move || {
        if let Ok(poll) = poll {
            poll.clear();
        }
    });
    view! {
        <PageHeader title="Home"/>
        <Async
            loader
            show=move |it| {
                let last_request = it.last_request();
                let is_set_up = it.plans.total > 0 && it.keys.total > 0 && last_request.is_some();
                view! {
                    <div class="stats">
                        <Stat name="API keys" value=it.keys.total about=format!("{} active", number(it.active_keys)) href="/console/api-keys"/>
                        <Stat name="Plans" value=it.plans.total about="Limits for your keys" href="/console/plans"/>
                        <Stat name="Service tokens" value=it.tokens about="Used by your gateways" href="/console/service-tokens"/>
                    </div>
                    {if is_set_up {
                        view! { <p class="muted">"Last request: " {last_request.map(|at| view! { <RelativeTime at/> })}</p> }
                            .into_any()
                    } else {
                        view! { <GetStarted overview=it/> }.into_any()
                    }}
                }
            }
        />
    }
}
