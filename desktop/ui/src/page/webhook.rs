//! The page of one webhook: its status, actions, and deliveries.

use leptos::{prelude::*, task::spawn_local};
use quota_common::{
    WebhookDeliveryId, WebhookId,
    call::PageOf,
    webhook::{UpdateWebhook, Webhook, WebhookDelivery},
};

use super::{
    deliveries::{Deliveries, Log, load_log},
    webhook_forms::{EditDialog, NewSecretDialog, RotateDialog},
};
use crate::{
    api::{self, CallError, CallResult},
    clock::now,
    component::{
        Alert, Async, Confirm, Confirmation, CopyButton, Loader, NewSecret, PageHeader, StaleNote,
        Toasts, busy_attr, load, refresh_regularly,
    },
    model::{
        text::quoted,
        webhook::{find, has_result, results, test_result, webhook_details},
    },
    reactive::text_memo,
    route::route,
    session::session,
};

/// The page's dialogs. They are kept apart from the webhook details, which are rendered again after each load:
/// rendering a dialog again would discard typed text or a new secret.
#[derive(Clone, Copy)]
struct Dialogs {
    editing: RwSignal<bool>,
    rotating: RwSignal<bool>,
    disabling: Confirmation,
    deleting: Confirmation,
    /// Whether a status change is in progress.
    busy: RwSignal<bool>,
}

#[component]
pub fn WebhookPage(id: WebhookId) -> impl IntoView {
    let toasts = expect_context::<Toasts>();
    let loader = load(move || api::get_webhook(id));
    refresh_regularly(loader);
    let log = load_log(id);
    // When a delivery gets a result, load the webhook again, because the result can change the webhook's status.
    let results = text_memo(move || log.with(|page| results(&page.items)).unwrap_or_default());
    Effect::new(move |was_loaded: Option<bool>| {
        let is_loaded = results.with(|it| !it.is_empty());
        if was_loaded == Some(true) {
            loader.refresh();
        }
        is_loaded
    });
    let name = Signal::derive(move || loader.ready().map(|it| it.name).unwrap_or_default());
    let title = Signal::derive(move || {
        Some(name.get())
            .filter(|name| !name.is_empty())
            .unwrap_or_else(|| "Webhook".to_owned())
    });
    let disabling = Confirmation::new();
    let busy = disabling.busy;
    let dialogs = Dialogs {
        editing: RwSignal::new(false),
        rotating: RwSignal::new(false),
        disabling,
        // This dialog shares `busy`, because it also offers to disable the webhook.
        deleting: Confirmation {
            busy,
            ..Confirmation::new()
        },
        busy,
    };
    let set_enabled = Callback::new(move |enabled: bool| {
        dialogs.busy.set(true);
        let webhook = quoted(&name.get_untracked());
        spawn_local(async move {
            change_status(id, &webhook, enabled, toasts).await;
            loader.reload();
            // Disabling a webhook cancels its pending deliveries.
            log.refresh();
            let _ = dialogs.busy.try_set(false);
            let _ = dialogs.disabling.open.try_set(false);
            let _ = dialogs.deleting.open.try_set(false);
        });
    });
    let rotated = NewSecret::new();
    let test = Test::new(id, loader, log);
    let exists = move || loader.with(|_| ()).is_some();
    view! {
        <p class="breadcrumb"><a href="/console/webhooks">"Webhooks"</a></p>
        <PageHeader title/>
        <StaleNote loader/>
        <Async loader what="this webhook" show=move |webhook| view! { <WebhookDetails webhook dialogs test set_enabled/> }/>
        <Show when=exists>
            <Deliveries log/>
        </Show>
        <EditDialog loader open=dialogs.editing/>
        <RotateDialog id loader open=dialogs.rotating rotated/>
        <NewSecretDialog new=rotated on_close=Callback::new(|()| {})/>
        <Confirm
            confirmation=dialogs.disabling
            title=Signal::derive(move || format!("Disable webhook {}?", quoted(&name.get())))
            message="Events that occur while the webhook is disabled are never sent. Pending deliveries are canceled, but you can redeliver them later."
            action="Disable webhook"
            run=Callback::new(move |()| set_enabled.run(false))
        />
        <DeleteDialog id loader dialogs set_enabled/>
    }
}

/// Enables or disables a webhook, and reports the result in a toast.
async fn change_status(id: WebhookId, name: &str, enabled: bool, toasts: Toasts) {
    let body = UpdateWebhook {
        is_active: Some(enabled),
        ..UpdateWebhook::default()
    };
    match api::update_webhook(id, body).await {
        Ok(_) if enabled => toasts.succeed(format!("Webhook {name} enabled")),
        Ok(_) => toasts.succeed(format!("Webhook {name} disabled")),
        Err(error) => toasts.fail(&error),
    }
}

#[component]
fn WebhookDetails(
    webhook: Webhook,
    dialogs: Dialogs,
    test: Test,
    set_enabled: Callback<bool>,
) -> impl IntoView {
    let can_manage = session().can_manage();
    let id = webhook.id.to_string();
    let (is_enabled, busy) = (webhook.is_active, dialogs.busy);
    let details = webhook_details(&webhook, now()).to_string();
    view! {
        <section class="card">
            <div inner_html=details></div>
            <p class="key-id">
                <span class="muted small-text">"Webhook ID"</span>
                <code>{id.clone()}</code>
                <CopyButton text=Signal::stored(id) what="webhook ID"/>
            </p>
            {can_manage
                .then(|| {
                    let status = if is_enabled {
                        view! { <button class="button" data-focus-key="status" aria-disabled=busy_attr(busy) on:click=move |_| dialogs.disabling.ask()>"Disable"</button> }.into_any()
                    } else {
                        view! { <button class="button primary" data-focus-key="status" aria-disabled=busy_attr(busy) on:click=move |_| set_enabled.run(true)>"Enable"</button> }.into_any()
                    };
                    view! {
                        <div class="actions">
                            <button class="button" data-focus-key="test" aria-disabled=busy_attr(test.busy) data-busy=busy_attr(test.busy) on:click=move |_| test.send()>"Send test event"</button>
                            {status}
                            <button class="button" data-focus-key="edit" on:click=move |_| dialogs.editing.set(true)>"Edit"</button>
                            <button class="button" data-focus-key="rotate" on:click=move |_| dialogs.rotating.set(true)>"Rotate secret"</button>
                            <button class="button danger" data-focus-key="delete" on:click=move |_| dialogs.deleting.ask()>"Delete"</button>
                        </div>
                        <TestResult test/>
                    }
                })}
        </section>
    }
}

/// How often to check for the result of a test event.
const POLL_MS: u32 = 400;
/// The maximum number of polls. Together, they take longer than any attempt.
const MAX_POLLS: u32 = 50;

#[derive(Clone)]
enum TestState {
    Idle,
    Sending,
    Sent(Box<WebhookDelivery>),
    Slow,
}

#[derive(Clone, Copy)]
struct Test {
    id: WebhookId,
    loader: Loader<Webhook>,
    log: Log,
    busy: RwSignal<bool>,
    state: RwSignal<TestState>,
    failure: RwSignal<Option<CallError>>,
}

impl Test {
    fn new(id: WebhookId, loader: Loader<Webhook>, log: Log) -> Self {
        Self {
            id,
            loader,
            log,
            busy: RwSignal::new(false),
            state: RwSignal::new(TestState::Idle),
            failure: RwSignal::new(None),
        }
    }

    fn send(self) {
        self.busy.set(true);
        self.failure.set(None);
        self.state.set(TestState::Sending);
        spawn_local(async move {
            let (state, failure) = match self.result().await {
                Ok(Some(delivery)) => (TestState::Sent(Box::new(delivery)), None),
                Ok(None) => (TestState::Slow, None),
                Err(error) => (TestState::Idle, Some(error)),
            };
            let _ = self.state.try_set(state);
            let _ = self.failure.try_set(failure);
            let _ = self.busy.try_set(false);
            // The result can change the webhook's status.
            self.loader.refresh();
            self.log.refresh();
        });
    }

    /// Sends a test event, and returns its delivery once the first attempt has ended. Returns `None` if the attempt
    /// takes too long, or if the user leaves the page.
    async fn result(self) -> CallResult<Option<WebhookDelivery>> {
        let sent = api::test_webhook(self.id).await?;
        self.log.refresh();
        for _ in 0..MAX_POLLS {
            gloo_timers::future::TimeoutFuture::new(POLL_MS).await;
            if self.busy.try_get_untracked().is_none() {
                break;
            }
            let delivery = self.find(sent.id).await?;
            if let Some(it) = delivery.filter(has_result) {
                return Ok(Some(it));
            }
        }
        Ok(None)
    }

    async fn find(self, id: WebhookDeliveryId) -> CallResult<Option<WebhookDelivery>> {
        let newest = PageOf::default();
        let page = api::list_deliveries(self.id, None, newest).await?;
        Ok(find(&page.items, id).cloned())
    }
}

#[component]
fn TestResult(test: Test) -> impl IntoView {
    view! {
        <div class="test-result" role="status">
            {move || match test.state.get() {
                TestState::Idle => ().into_any(),
                TestState::Sending => view! { <p class="muted">"Sending a test event…"</p> }.into_any(),
                TestState::Sent(it) => view! { <p inner_html=test_result(&it, now()).to_string()></p> }.into_any(),
                TestState::Slow => view! { <p class="muted">"The test event hasn't been sent yet. The result will appear below."</p> }.into_any(),
            }}
        </div>
        <Alert error=test.failure/>
    }
}

#[component]
fn DeleteDialog(
    id: WebhookId,
    loader: Loader<Webhook>,
    dialogs: Dialogs,
    set_enabled: Callback<bool>,
) -> impl IntoView {
    let toasts = expect_context::<Toasts>();
    let route = route();
    let Confirmation { busy, failure, .. } = dialogs.deleting;
    let name = move || loader.ready().map(|it| it.name).unwrap_or_default();
    let run = Callback::new(move |()| {
        let name = untrack(name);
        busy.set(true);
        spawn_local(async move {
            match api::delete_webhook(id).await {
                Ok(()) => {
                    toasts.succeed(format!("Webhook {} deleted", quoted(&name)));
                    // Leave the page, unless the user has already left it.
                    if busy.try_set(false).is_none() {
                        route.replace("/console/webhooks");
                    }
                }
                Err(error) => {
                    let _ = failure.try_set(Some(error));
                    let _ = busy.try_set(false);
                }
            }
        });
    });
    let alternative = (
        "Disable instead",
        Callback::new(move |()| set_enabled.run(false)),
    );
    let is_enabled = Signal::derive(move || loader.ready().is_some_and(|it| it.is_active));
    view! {
        <Confirm
            confirmation=dialogs.deleting
            title=Signal::derive(move || format!("Delete webhook {}?", quoted(&name())))
            message="Events will no longer be sent, pending deliveries will be canceled, and the delivery log will be deleted. This can't be undone."
            action="Delete webhook"
            alternative
            has_alternative=is_enabled
            run
        />
    }
}
