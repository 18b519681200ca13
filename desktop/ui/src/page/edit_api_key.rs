use leptos::prelude::*;
use quota_common::{
    api_key::{ApiKey, UpdateApiKey},
    plan::Plan,
};

use super::local_time;
use crate::{
    api,
    component::{DialogForm, Field, FormState, Loader, Modal, SelectField, Toasts},
    model::{
        form::{self, changed, check_metadata, check_rate, optional_rate, optional_text},
        text::{number, quoted},
    },
};

#[component]
pub fn EditDialog(
    loader: Loader<ApiKey>,
    plans: Loader<Vec<Plan>>,
    open: RwSignal<bool>,
    on_saved: Callback<()>,
) -> impl IntoView {
    view! {
        <Modal open panel=true title="Edit key">
            {untrack(move || loader.ready())
                .map(|key| view! { <EditForm key plans open loader on_saved/> })}
        </Modal>
    }
}

#[component]
fn EditForm(
    key: ApiKey,
    plans: Loader<Vec<Plan>>,
    open: RwSignal<bool>,
    loader: Loader<ApiKey>,
    on_saved: Callback<()>,
) -> impl IntoView {
    let toasts = expect_context::<Toasts>();
    let state = FormState::new();
    let name = RwSignal::new(key.name.clone());
    let plan = RwSignal::new(key.plan_id.to_string());
    let rate = RwSignal::new(
        key.rpm_override
            .map(|it| number(it.into()))
            .unwrap_or_default(),
    );
    let previous_expiry =
        StoredValue::new(key.expires_at.map(local_time::format).unwrap_or_default());
    let expires = RwSignal::new(previous_expiry.get_value());
    let external_id = RwSignal::new(key.external_id.clone().unwrap_or_default());
    let previous_metadata = StoredValue::new(form::metadata_text(&key.metadata));
    let metadata = RwSignal::new(previous_metadata.get_value());
    let plan_id = key.plan_id;
    let options = Signal::derive(move || {
        let plans = plans.ready().unwrap_or_default();
        // Until the plans are loaded, the only option is the key's current plan.
        let own = (!plans.iter().any(|plan| plan.id == plan_id))
            .then(|| (plan_id.to_string(), "…".to_owned()));
        own.into_iter()
            .chain(
                plans
                    .into_iter()
                    .map(|plan| (plan.id.to_string(), plan.name)),
            )
            .collect::<Vec<_>>()
    });
    let submit = move || {
        let rpm_override = optional_rate(&rate.get_untracked()).unwrap_or_default();
        let expiry = expires.get_untracked();
        let body = UpdateApiKey {
            name: changed(&key.name, name.get_untracked()).map(Into::into),
            plan_id: plan
                .get_untracked()
                .parse()
                .ok()
                .and_then(|plan| changed(&plan_id, plan)),
            rpm_override: changed(&key.rpm_override, rpm_override).map(|rpm| rpm.map(Into::into)),
            // The input is less precise than the stored time, so the time is sent only if the user changed it.
            expires_at: (expiry != previous_expiry.get_value()).then(|| local_time::parse(&expiry)),
            external_id: changed(
                &key.external_id,
                optional_text(&external_id.get_untracked()),
            )
            .map(|it| it.map(Into::into)),
            metadata: changed(&previous_metadata.get_value(), metadata.get_untracked())
                .and_then(|text| form::metadata(&text).ok()),
            ..UpdateApiKey::default()
        };
        if body == UpdateApiKey::default() {
            return open.set(false);
        }
        state.send(api::update_api_key(key.id, body), move |key| {
            let _ = open.try_set(false);
            toasts.succeed(format!("Key {} updated", quoted(&key.name)));
            loader.reload();
            let _ = on_saved.try_run(());
        });
    };
    view! {
        <DialogForm form=state open action="Save changes" submit>
            <Field form=state name="name" id="edit_name" label="Name" value=name required=true/>
            <SelectField form=state name="plan_id" id="edit_plan" label="Plan" value=plan options/>
            <div class="pair">
                <Field form=state name="rpm_override" id="edit_rate" label="Rate override (optional)" value=rate numeric=true check=check_rate hint="Requests per minute. Defaults to the plan's rate."/>
                <Field form=state name="expires_at" id="edit_expires" label="Expires (optional)" kind="datetime-local" value=expires hint=local_time::expiry_hint()/>
            </div>
            <Field form=state name="external_id" id="edit_external_id" label="External ID (optional)" value=external_id hint="The key's ID in your own system, such as a customer ID."/>
            <Field form=state name="metadata" id="edit_metadata" label="Metadata (optional)" value=metadata multiline=true check=check_metadata placeholder="region=eu" hint="One name=value pair per line."/>
        </DialogForm>
    }
}
