use std::time::Duration;

use leptos::prelude::*;
use quota_common::{
    Page, WebhookId,
    webhook::{CreateWebhook, Webhook},
};

use super::{
    create_button::{CreateButton, can_create},
    webhook::WebhookPage,
    webhook_forms::{NewSecretDialog, URL_HINT},
};
use crate::{
    api,
    clock::now,
    component::{
        Async, DialogForm, EmptyState, Field, FormState, Loader, Modal, NewSecret, PageHeader,
        Pager, Shape, StaleNote, load_page, open_from_query, refresh_regularly,
    },
    model::{
        address::ConsolePage,
        webhook::{check_url, event_types, webhook_table},
    },
    route::route,
};

/// The list of webhooks, or the page of one webhook.
#[component]
pub fn Webhooks() -> impl IntoView {
    match ConsolePage::of(&route().path.get_untracked()) {
        ConsolePage::Webhook(id) => view! { <WebhookPage id/> }.into_any(),
        _ => view! { <WebhookList/> }.into_any(),
    }
}

#[component]
fn WebhookList() -> impl IntoView {
    let route = route();
    let loader = load_page(api::list_webhooks);
    refresh_regularly(loader);
    let creating = RwSignal::new(false);
    open_from_query(creating, can_create());
    let form = FormState::new();
    let new = NewSecret::new();
    let created = RwSignal::new(None::<WebhookId>);
    let show = move |page: Page<Webhook>| {
        if page.items.is_empty() {
            return view! {
                <EmptyState shape=Shape::Webhook title="No webhooks yet" about="Get quota alerts in your own systems: Quota sends each event to your URL as a signed POST request.">
                    <CreateButton open=creating label="Create your first webhook"/>
                </EmptyState>
            }
                .into_any();
        }
        let shown = page.items.len();
        let table = webhook_table(&page.items, now()).to_string();
        view! {
            <div inner_html=table></div>
            <Pager total=page.total shown next=page.next_cursor/>
        }
        .into_any()
    };
    let open_page = Callback::new(move |()| {
        // An open secret dialog blocks navigation, so the page is opened only after the dialog has closed.
        set_timeout(
            move || {
                if let Some(id) = created.try_get_untracked().flatten() {
                    route.go(&format!("/console/webhooks/{id}"));
                }
            },
            Duration::ZERO,
        );
    });
    view! {
        <PageHeader title="Webhooks" about="Endpoints that receive your organization's events.">
            <CreateButton open=creating label="Create webhook"/>
        </PageHeader>
        <StaleNote loader/>
        <Async loader what="webhooks" show/>
        <section class="card" aria-labelledby="event-types">
            <h2 id="event-types">"Events"</h2>
            <div inner_html=event_types().to_string()></div>
        </section>
        <Modal open=creating panel=true title="Create webhook" locked=form.busy>
            <CreateForm open=creating form new created loader/>
        </Modal>
        <NewSecretDialog new on_close=open_page/>
    }
}

#[component]
fn CreateForm(
    open: RwSignal<bool>,
    form: FormState,
    new: NewSecret,
    created: RwSignal<Option<WebhookId>>,
    loader: Loader<Page<Webhook>>,
) -> impl IntoView {
    form.reset();
    let name = RwSignal::new(String::new());
    let url = RwSignal::new(String::new());
    let submit = move || {
        let body = CreateWebhook {
            name: name.get_untracked().into(),
            url: url.get_untracked().trim().into(),
        };
        form.send(api::create_webhook(body), move |it| {
            let _ = open.try_set(false);
            let _ = created.try_set(Some(it.webhook.id));
            new.show(it.webhook.name, it.secret);
            loader.reload();
        });
    };
    view! {
        <DialogForm form open action="Create webhook" locked=true submit>
            <Field form name="name" id="webhook_name" label="Name" value=name required=true hint="What receives the events, such as a chat channel"/>
            <Field form name="url" id="webhook_url" label="URL" kind="url" value=url required=true check=check_url placeholder="https://hooks.example.com/quota" hint=URL_HINT/>
        </DialogForm>
    }
}
