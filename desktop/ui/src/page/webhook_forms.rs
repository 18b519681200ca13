//! The dialogs that edit a webhook, rotate its secret, and show a new secret.

use leptos::prelude::*;
use quota_common::{
    WebhookId,
    webhook::{RotateWebhookSecret, UpdateWebhook, Webhook},
};

use super::rotate_api_key::GRACE_PERIODS;
use crate::{
    api,
    clock::now,
    component::{
        CodeBlock, DialogForm, Field, FormState, Loader, Modal, NewSecret, RelativeTime,
        SecretDialog, SelectField, Toasts,
    },
    model::{
        form::changed,
        text::quoted,
        webhook::{Language, check_url, previous_secret_expiry},
    },
};

pub const URL_HINT: &str = "Events are sent here as POST requests. The host must resolve only to public IP addresses, unless the server's operator allows private networks.";

#[component]
pub fn EditDialog(loader: Loader<Webhook>, open: RwSignal<bool>) -> impl IntoView {
    view! {
        <Modal open panel=true title="Edit webhook">
            {untrack(move || loader.ready())
                .map(|webhook| view! { <EditForm webhook open loader/> })}
        </Modal>
    }
}

#[component]
fn EditForm(webhook: Webhook, open: RwSignal<bool>, loader: Loader<Webhook>) -> impl IntoView {
    let toasts = expect_context::<Toasts>();
    let form = FormState::new();
    let name = RwSignal::new(webhook.name.clone());
    let url = RwSignal::new(webhook.url.clone());
    let submit = move || {
        let body = UpdateWebhook {
            name: changed(&webhook.name, name.get_untracked()).map(Into::into),
            url: changed(&webhook.url, url.get_untracked().trim().to_owned()).map(Into::into),
            is_active: None,
        };
        if body == UpdateWebhook::default() {
            form.busy.set(false);
            return open.set(false);
        }
        form.send(api::update_webhook(webhook.id, body), move |it| {
            let _ = open.try_set(false);
            toasts.succeed(format!("Webhook {} updated", quoted(&it.name)));
            loader.reload();
        });
    };
    view! {
        <DialogForm form open action="Save changes" submit>
            <Field form name="name" id="webhook_name" label="Name" value=name required=true/>
            <Field form name="url" id="webhook_url" label="URL" kind="url" value=url required=true check=check_url hint=URL_HINT/>
            <p class="muted">"Pending deliveries are sent to the new URL. The signing secret doesn't change."</p>
        </DialogForm>
    }
}

#[component]
pub fn RotateDialog(
    id: WebhookId,
    loader: Loader<Webhook>,
    open: RwSignal<bool>,
    rotated: NewSecret,
) -> impl IntoView {
    let form = FormState::new();
    let name = move || loader.ready().map(|it| it.name).unwrap_or_default();
    view! {
        <Modal open locked=form.busy title=Signal::derive(move || format!("Rotate the signing secret for {}", quoted(&name())))>
            <RotateForm id loader open form rotated/>
        </Modal>
    }
}

#[component]
fn RotateForm(
    id: WebhookId,
    loader: Loader<Webhook>,
    open: RwSignal<bool>,
    form: FormState,
    rotated: NewSecret,
) -> impl IntoView {
    form.reset();
    let grace = RwSignal::new("86400".to_owned());
    let options = GRACE_PERIODS
        .map(|(value, label)| (value.to_owned(), label.to_owned()))
        .to_vec();
    let previous_expiry = move || previous_secret_expiry(&loader.ready()?, now());
    let submit = move || {
        let body = RotateWebhookSecret {
            grace_seconds: grace.get_untracked().parse::<u32>().ok().map(Into::into),
        };
        form.send(api::rotate_webhook_secret(id, body), move |it| {
            let _ = open.try_set(false);
            rotated.show(it.webhook.name, it.secret);
            loader.reload();
        });
    };
    view! {
        <DialogForm form open action="Rotate secret" locked=true submit>
            <p>"Creates a new signing secret. Until the current secret expires, requests are signed with both secrets, so you can switch without missing an event."</p>
            {move || {
                previous_expiry()
                    .map(|at| {
                        view! {
                            <p class="alert warn" role="alert">
                                "This secret was rotated recently. If you rotate it again, the previous secret is revoked immediately instead of expiring " <RelativeTime at/> "."
                            </p>
                        }
                    })
            }}
            <SelectField form name="grace_seconds" id="grace" label="Current secret" value=grace options hint="If the secret has leaked, revoke it now."/>
        </DialogForm>
    }
}

#[component]
pub fn NewSecretDialog(new: NewSecret, on_close: Callback<()>) -> impl IntoView {
    view! {
        <SecretDialog
            new
            title=Signal::derive(move || format!("Save the signing secret for {}", quoted(&new.name.get())))
            noun="secret"
            recovery="If you lose it, rotate the secret."
            on_close
        >
            <h3>"Verify requests"</h3>
            <p class="muted">"Anyone who knows your URL can send requests to it. Use this secret and a Standard Webhooks library to verify the signature of each request."</p>
            <Examples/>
        </SecretDialog>
    }
}

/// Shows code that verifies a signature, in the programming language that the user selects.
#[component]
fn Examples() -> impl IntoView {
    let selected = RwSignal::new(Language::Python);
    let text = Signal::derive(move || selected.get().example().to_owned());
    view! {
        <fieldset class="choice">
            <legend class="visually-hidden">"Language"</legend>
            {Language::ALL
                .into_iter()
                .map(|language| {
                    view! {
                        <button
                            type="button"
                            class="button small"
                            aria-pressed=move || (selected.get() == language).to_string()
                            on:click=move |_| selected.set(language)
                        >
                            {language.name()}
                        </button>
                    }
                })
                .collect_view()}
        </fieldset>
        <CodeBlock text what="example"/>
    }
}
