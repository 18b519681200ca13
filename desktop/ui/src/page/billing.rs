//! The billing page: the subscription, its charges, and the operator's limits.
//!
//! Checkout and the customer portal are Stripe pages. A browser leaves this page to open a Stripe page, and returns
//! afterward. The desktop app opens Stripe pages in the default browser, while this page waits.

use leptos::{prelude::*, task::spawn_local};
use quota_common::{ProblemCode, billing::BillingState, ipc::BillingPage};

use crate::{
    api::{self, CallError},
    clock::now,
    component::{
        Alert, Async, Card, EmptyState, Loader, PageHeader, Shape, StaleNote, Toasts, load,
        refresh_regularly,
    },
    host,
    model::billing::{self, StripeButton},
    reactive::effect,
    route::route,
};

/// How often to check for the result of a visit to Stripe, in milliseconds. After a minute, `SLOW_POLL_MS` applies.
const POLL_MS: u32 = 2000;
const SLOW_POLL_MS: u32 = 10_000;
const SLOW_AFTER: u32 = 30;

/// What this page is waiting for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waiting {
    Nothing,
    /// The result of Checkout. The subscription is hidden until the result is known.
    Payment,
    /// Changes in the customer portal, which is open in the default browser.
    Portal,
}

#[derive(Clone, Copy)]
struct Visit {
    waiting: RwSignal<Waiting>,
    polls: RwSignal<u32>,
    /// The Stripe page that is about to open.
    opening: RwSignal<Option<BillingPage>>,
    failure: RwSignal<Option<CallError>>,
}

#[component]
pub fn Billing() -> impl IntoView {
    view! {
        <PageHeader title="Billing"/>
        <Subscription/>
    }
}

#[component]
fn Subscription() -> impl IntoView {
    let loader = load(api::billing);
    refresh_regularly(loader);
    let route = route();
    let toasts = expect_context::<Toasts>();
    let result = route.query.with_untracked(|query| query.get("checkout"));
    let returns = result.as_deref() == Some("success");
    let visit = Visit {
        waiting: RwSignal::new(if returns {
            Waiting::Payment
        } else {
            Waiting::Nothing
        }),
        polls: RwSignal::new(0),
        opening: RwSignal::new(None),
        failure: RwSignal::new(None),
    };
    if returns {
        poll(visit, loader);
    } else if result.is_some() {
        toasts.succeed("Checkout canceled. You weren't charged.");
        route.replace("/console/billing");
    }
    effect(move || {
        let is_paid = loader.with(|it| it.enabled && it.paid_plans_work) == Some(true);
        if is_paid && visit.waiting.get() == Waiting::Payment {
            toasts.succeed("Subscription active");
            stop_waiting(visit);
        }
    });
    view! {
        <StaleNote loader/>
        <Async loader what="billing" show=move |it| show(&it, loader, visit)/>
    }
}

fn stop_waiting(visit: Visit) {
    visit.waiting.set(Waiting::Nothing);
    route().replace("/console/billing");
}

/// Polls until the page no longer waits for anything, the user leaves the page, or a later visit to Stripe starts.
fn poll(visit: Visit, loader: Loader<BillingState>) {
    visit.polls.set(0);
    spawn_local(async move {
        loop {
            let Some(polls) = visit.polls.try_get_untracked() else {
                return;
            };
            let pause = if polls < SLOW_AFTER {
                POLL_MS
            } else {
                SLOW_POLL_MS
            };
            gloo_timers::future::TimeoutFuture::new(pause).await;
            // A later visit runs its own loop, so this loop ends.
            let is_current = visit.polls.try_get_untracked() == Some(polls);
            let waiting = visit
                .waiting
                .try_get_untracked()
                .unwrap_or(Waiting::Nothing);
            if !is_current || waiting == Waiting::Nothing {
                return;
            }
            visit.polls.set(polls + 1);
            loader.refresh();
        }
    });
}

fn show(it: &BillingState, loader: Loader<BillingState>, visit: Visit) -> AnyView {
    if !it.enabled {
        return view! {
            <EmptyState shape=Shape::Billing title="Billing is off on this server" about="Plans marked Paid work like other plans. The server's operator can turn on billing."/>
            <Limits limits=billing::limits(it, now()).to_string()/>
        }
            .into_any();
    }
    if visit.waiting.get() == Waiting::Payment {
        return view! { <Confirming visit/> }.into_any();
    }
    let subscription = billing::subscription(it, now()).to_string();
    let usage = it
        .usage
        .as_ref()
        .map(|usage| billing::usage(usage, it).to_string());
    let is_action_needed = billing::is_action_needed(it);
    let buttons = billing::buttons(it)
        .into_iter()
        .enumerate()
        .map(|(at, button)| stripe_button(button, at == 0 && is_action_needed, loader, visit))
        .collect_view();
    view! {
        <section class="card" aria-labelledby="subscription">
            <div inner_html=subscription></div>
            <Alert error=visit.failure/>
            <div class="actions">{buttons}</div>
            <p class="muted small-text" role="status">
                {move || {
                    (visit.waiting.get() == Waiting::Portal)
                        .then_some("Stripe opened in your browser. Your changes in Stripe appear here within seconds.")
                }}
            </p>
        </section>
        {usage
            .map(|usage| {
                view! {
                    <Card id="period" title="This billing period">
                        <div inner_html=usage></div>
                    </Card>
                }
            })}
        <Limits limits=billing::limits(it, now()).to_string()/>
    }
    .into_any()
}

#[component]
fn Limits(limits: String) -> impl IntoView {
    (!limits.is_empty()).then(|| {
        view! {
            <Card id="limits" title="Limits">
                <div inner_html=limits></div>
            </Card>
        }
    })
}

/// Shown until Stripe reports the payment, usually within a few seconds after Checkout.
#[component]
fn Confirming(visit: Visit) -> impl IntoView {
    let is_slow = move || visit.polls.get() >= SLOW_AFTER;
    let is_paying = host::OPENS_PAGES_OUTSIDE;
    let (title, about) = if is_paying {
        (
            "Waiting for your payment…",
            "Complete the payment in your browser. This page updates automatically.",
        )
    } else {
        ("Confirming payment…", "This usually takes a few seconds.")
    };
    view! {
        <EmptyState shape=Shape::Billing title about>
            <p role="status">
                {move || is_slow().then_some("Stripe hasn't confirmed the payment yet. Bank debits can take days. You can leave this page.")}
            </p>
            {move || {
                (is_paying || is_slow())
                    .then(|| view! { <button type="button" class="button" on:click=move |_| stop_waiting(visit)>"Show current status"</button> })
            }}
        </EmptyState>
    }
}

fn stripe_button(
    button: StripeButton,
    is_primary: bool,
    loader: Loader<BillingState>,
    visit: Visit,
) -> AnyView {
    let StripeButton { label, page } = button;
    let open = move |_| {
        visit.opening.set(Some(page));
        visit.failure.set(None);
        spawn_local(async move {
            match api::open_billing(page).await {
                Ok(()) if host::OPENS_PAGES_OUTSIDE => {
                    let _ = visit.waiting.try_set(match page {
                        BillingPage::Checkout => Waiting::Payment,
                        BillingPage::Portal => Waiting::Portal,
                    });
                    poll(visit, loader);
                }
                // The button remains busy while the browser leaves this page, but not forever, because the browser may
                // later restore the page in the same state.
                Ok(()) => gloo_timers::future::TimeoutFuture::new(4000).await,
                Err(error) => {
                    let _ = visit.failure.try_set(Some(explained(error)));
                    loader.refresh();
                }
            }
            let _ = visit.opening.try_set(None);
        });
    };
    view! {
        <button
            type="button"
            class="button"
            class:primary=is_primary
            data-focus-key=label
            aria-disabled=move || visit.opening.get().map(|_| "true")
            data-busy=move || (visit.opening.get() == Some(page)).then_some("true")
            on:click=open
        >
            {label}
        </button>
    }
    .into_any()
}

/// If Stripe or the database is unavailable, replaces the error's text with one that says that nothing was charged.
fn explained(mut error: CallError) -> CallError {
    if error.is(ProblemCode::Unavailable)
        && let CallError::Problem(problem) = &mut error
    {
        "Couldn't open Stripe. Nothing was charged. Try again in a few minutes."
            .clone_into(&mut problem.detail);
    }
    error
}
