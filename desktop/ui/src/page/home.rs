//! Home: how much there is, and what comes next.

use leptos::{prelude::*, task::spawn_local};
use quota_common::{
    Page,
    api_key::ApiKey,
    call::{KeyFilter, PageOf},
    page::ApiKeyOrder,
    plan::Plan,
};

use crate::{
    api,
    component::{Head, Icon, Shape, Shown, When, load},
    model::text::number,
};

#[derive(Clone)]
struct Overview {
    plans: Page<Plan>,
    /// The one that was used last.
    keys: Page<ApiKey>,
    active: u64,
    tokens: u64,
}

impl Overview {
    fn last_used(&self) -> Option<quota_common::Timestamp> {
        last_used(&self.keys)
    }
}

fn last_used(keys: &Page<ApiKey>) -> Option<quota_common::Timestamp> {
    keys.items.first()?.last_used_at
}

const fn one() -> PageOf {
    PageOf {
        limit: Some(1),
        cursor: None,
    }
}

fn used_last() -> api::Pending<Page<ApiKey>> {
    let filter = KeyFilter {
        sort: Some(ApiKeyOrder::LastUsed),
        ..KeyFilter::default()
    };
    api::list_api_keys(filter, one())
}

async fn overview() -> api::Answer<Overview> {
    let active = KeyFilter {
        is_active: Some(true),
        is_expired: Some(false),
        ..KeyFilter::default()
    };
    Ok(Overview {
        plans: api::list_plans(None, one()).await?,
        keys: used_last().await?,
        active: api::list_api_keys(active, one()).await?.total,
        tokens: api::list_service_tokens(one()).await?.total,
    })
}

#[component]
fn Stat(
    #[prop(into)] name: String,
    value: u64,
    #[prop(into)] about: String,
    href: &'static str,
) -> impl IntoView {
    view! {
        <a class="stat card" href=href>
            <span class="quiet">{name}</span>
            <strong>{number(value)}</strong>
            <span class="quiet small-text">{about}</span>
        </a>
    }
}

#[component]
fn Step(
    done: bool,
    #[prop(into)] title: String,
    #[prop(into)] about: String,
    #[prop(into)] href: String,
    #[prop(into)] action: String,
) -> impl IntoView {
    view! {
        <li class="step" class:done=done>
            <span class="tick">{done.then(|| view! { <Icon shape=Shape::Check/> })}</span>
            <div>
                <h3>{title} {done.then(|| view! { <span class="unseen">" (done)"</span> })}</h3>
                <p class="quiet">{about}</p>
            </div>
            {(!done).then(|| view! { <a class="button small" href=href>{action}</a> })}
        </li>
    }
}

#[component]
pub fn Home() -> impl IntoView {
    let loader = load(overview);
    // The first request is seen without a reload of the page; once it was seen there is nothing to wait for.
    let waiting = move || {
        loader
            .ready()
            .is_some_and(|it| it.keys.total > 0 && it.last_used().is_none())
    };
    let poll = set_interval_with_handle(
        move || {
            if untrack(waiting) && !document().hidden() {
                spawn_local(async move {
                    if used_last()
                        .await
                        .is_ok_and(|keys| last_used(&keys).is_some())
                    {
                        loader.reload();
                    }
                });
            }
        },
        std::time::Duration::from_secs(5),
    );
    on_cleanup(move || {
        if let Ok(poll) = poll {
            poll.clear();
        }
    });
    view! {
        <Head title="Home" about="Your plans, keys and tokens at a glance."/>
        <Shown
            loader
            show=move |it| {
                let used = it.last_used();
                let key_page = it
                    .keys
                    .items
                    .first()
                    .map_or_else(|| "/console/api-keys".to_owned(), |key| format!("/console/api-keys/{}", key.id));
                let all_done = it.plans.total > 0 && it.keys.total > 0 && used.is_some();
                view! {
                    <div class="stats">
                        <Stat name="API keys" value=it.keys.total about=format!("{} active", number(it.active)) href="/console/api-keys"/>
                        <Stat name="Plans" value=it.plans.total about="Limits for your keys" href="/console/plans"/>
                        <Stat name="Service tokens" value=it.tokens about="For your own gateways" href="/console/service-tokens"/>
                    </div>
                    {if all_done {
                        view! {
                            <p class="quiet">
                                "Last request: " {used.map(|at| view! { <When at/> })}
                            </p>
                        }
                            .into_any()
                    } else {
                        view! {
                            <section class="card" aria-labelledby="first-steps">
                                <h2 id="first-steps">"First steps"</h2>
                                <ol class="steps">
                                    <Step
                                        done={it.plans.total > 0}
                                        title="Create a plan"
                                        about="Set how many requests are allowed per minute, day and month."
                                        href="/console/plans?new=1"
                                        action="New plan"
                                    />
                                    <Step
                                        done={it.keys.total > 0}
                                        title="Create an API key"
                                        about="You see it once. Your consumer sends it as X-API-Key."
                                        href="/console/api-keys?new=1"
                                        action="New key"
                                    />
                                    <Step
                                        done=used.is_some()
                                        title="Send the first request"
                                        about="Try the key here, or run the curl command anywhere. This step checks itself off."
                                        href=key_page
                                        action="Try it"
                                    />
                                </ol>
                            </section>
                        }
                            .into_any()
                    }}
                }
            }
        />
    }
}
