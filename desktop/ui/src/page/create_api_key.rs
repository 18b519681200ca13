//! Creates an API key and shows its secret.

use leptos::prelude::*;
use quota_common::{
    api_key::{CreateApiKey, CreatedApiKey},
    plan::Plan,
};

use super::{local_time, try_it::TryIt};
use crate::{
    api,
    component::{
        Async, CodeBlock, DialogForm, Field, FormState, Loader, Modal, NewSecret, SecretDialog,
        SelectField, focus_soon,
    },
    model::{
        form::{check_metadata, check_rate, metadata, optional_rate, optional_text},
        text,
    },
    route::route,
    session::{Session, session},
};

#[component]
pub fn CreateDialog(
    open: RwSignal<bool>,
    plans: Loader<Vec<Plan>>,
    /// Called after a key is created, and again when the dialog with its secret is closed.
    on_changed: Callback<()>,
) -> impl IntoView {
    let new = NewSecret::new();
    // This state is outside the part that is rendered again when plans are loaded. Only the response to the pending
    // call contains the new secret, so this response must not be lost.
    let form = FormState::new();
    view! {
        <Modal open panel=true title="Create API key" locked=form.busy>
            <Async
                loader=plans
                what="plans"
                inside=true
                show=move |plans| {
                    if plans.is_empty() {
                        view! {
                            <p>"Each key belongs to a plan. Create a plan first."</p>
                            <div class="actions end">
                                <button class="button" on:click=move |_| open.set(false)>"Cancel"</button>
                                <a class="button primary" href="/console/plans?new=1">"Create plan"</a>
                            </div>
                        }
                            .into_any()
                    } else {
                        view! { <CreateForm plans open form new on_changed/> }.into_any()
                    }
                }
            />
        </Modal>
        <NewKeyDialog new on_close=on_changed/>
    }
}

#[component]
fn CreateForm(
    plans: Vec<Plan>,
    open: RwSignal<bool>,
    form: FormState,
    new: NewSecret,
    on_changed: Callback<()>,
) -> impl IntoView {
    // The form may not exist yet when the dialog opens, because the plans are still being loaded. Therefore, the form
    // itself focuses its first field.
    form.reset();
    focus_soon("#key_name");
    let name = RwSignal::new(String::new());
    let session = session();
    // If the list of keys is filtered by plan, that plan is preselected.
    let filtered_plan = route().query.with_untracked(|query| query.get("plan_id"));
    // If there are several plans and the list is not filtered by one of them, no plan is preselected, so that pressing
    // Enter does not assign the wrong limits.
    let preselected = match &plans[..] {
        [only] => Some(only.id.to_string()),
        plans => filtered_plan.filter(|id| plans.iter().any(|plan| plan.id.to_string() == *id)),
    };
    let plan = RwSignal::new(preselected.unwrap_or_default());
    let rate = RwSignal::new(String::new());
    let expires = RwSignal::new(String::new());
    let external_id = RwSignal::new(String::new());
    let entries = RwSignal::new(String::new());
    let placeholder = (plans.len() > 1).then(|| (String::new(), "Choose a plan".to_owned()));
    let options = placeholder
        .into_iter()
        .chain(plans.into_iter().map(|plan| {
            let rate = text::number(plan.default_rpm.into());
            (plan.id.to_string(), format!("{} ({rate}/min)", plan.name))
        }))
        .collect::<Vec<_>>();
    let submit = move || {
        let Ok(plan_id) = plan.get_untracked().parse() else {
            return;
        };
        let body = CreateApiKey {
            name: name.get_untracked().into(),
            plan_id,
            expires_at: local_time::parse(&expires.get_untracked()),
            rpm_override: optional_rate(&rate.get_untracked())
                .unwrap_or_default()
                .map(Into::into),
            external_id: optional_text(&external_id.get_untracked()).map(Into::into),
            metadata: metadata(&entries.get_untracked())
                .ok()
                .filter(|it| !it.is_empty()),
        };
        form.send(api::create_api_key(body), move |key| {
            let _ = open.try_set(false);
            show_key(new, key, session);
            let _ = on_changed.try_run(());
        });
    };
    view! {
        <DialogForm form open action="Create key" locked=true submit>
            <Field form name="name" id="key_name" label="Name" value=name required=true hint="What uses this key, such as Mobile app"/>
            <SelectField form name="plan_id" id="key_plan" label="Plan" value=plan options required=true/>
            <div class="pair">
                <Field form name="rpm_override" id="key_rate" label="Rate override (optional)" value=rate numeric=true check=check_rate hint="Requests per minute. Defaults to the plan's rate."/>
                <Field form name="expires_at" id="key_expires" label="Expires (optional)" kind="datetime-local" value=expires hint=local_time::expiry_hint()/>
            </div>
            <Field form name="external_id" id="key_external_id" label="External ID (optional)" value=external_id hint="The key's ID in your own system, such as a customer ID."/>
            <Field form name="metadata" id="key_metadata" label="Metadata (optional)" value=entries multiline=true check=check_metadata placeholder="region=eu" hint="One name=value pair per line."/>
        </DialogForm>
    }
}

/// Shows a new secret, and stores it until the page is closed or reloaded, or the session ends. Works even after the
/// user has left the page, so that the secret in a late response is not lost.
pub fn show_key(new: NewSecret, created: CreatedApiKey, session: Session) {
    if let Some(secret) = &created.key {
        session.known_keys.update(|known| {
            known.retain(|(id, _)| *id != created.api_key.id);
            known.push((created.api_key.id, secret.clone()));
        });
    }
    new.show(created.api_key.name, created.key);
}

#[component]
pub fn NewKeyDialog(new: NewSecret, on_close: Callback<()>) -> impl IntoView {
    let secret: Signal<String> = new.secret.into();
    let curl = Signal::derive(move || text::curl(&api::origin(), &secret.get()));
    view! {
        <SecretDialog
            new
            title=Signal::derive(move || format!("Save your key for {}", text::quoted(&new.name.get())))
            noun="key"
            recovery="If you lose it, rotate the key."
            on_close
        >
            <h3>"Try it"</h3>
            <CodeBlock text=curl what="curl command"/>
            <TryIt secret/>
        </SecretDialog>
    }
}
