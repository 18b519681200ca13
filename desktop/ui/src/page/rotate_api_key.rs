use leptos::{prelude::*, task::spawn_local};
use quota_common::{
    ApiKeyId, ProblemCode,
    api_key::{ApiKey, RotateApiKey},
};

use super::create_api_key::show_key;
use crate::{
    api,
    clock::now,
    component::{DialogForm, FormState, Loader, Modal, NewSecret, RelativeTime, SelectField},
    model::text,
    session::session,
};

/// The choices for how long the old secret stays valid: each value in seconds, with its label.
pub const GRACE_PERIODS: [(&str, &str); 5] = [
    ("0", "Revoke now"),
    ("3600", "Keep for 1 hour"),
    ("86400", "Keep for 24 hours"),
    ("604800", "Keep for 7 days"),
    ("2592000", "Keep for 30 days"),
];

#[component]
pub fn RotateDialog(
    id: ApiKeyId,
    loader: Loader<ApiKey>,
    open: RwSignal<bool>,
    rotated: NewSecret,
) -> impl IntoView {
    let form = FormState::new();
    let name = move || loader.ready().map(|key| key.name).unwrap_or_default();
    view! {
        <Modal open locked=form.busy title=Signal::derive(move || format!("Rotate key {}", text::quoted(&name())))>
            <RotateForm id loader open form rotated/>
        </Modal>
    }
}

#[component]
fn RotateForm(
    id: ApiKeyId,
    loader: Loader<ApiKey>,
    open: RwSignal<bool>,
    form: FormState,
    rotated: NewSecret,
) -> impl IntoView {
    form.reset();
    let session = session();
    let grace = RwSignal::new("86400".to_owned());
    let options = GRACE_PERIODS
        .map(|(value, label)| (value.to_owned(), label.to_owned()))
        .to_vec();
    // A key has at most one previous secret.
    let previous_expiry = move || {
        let expires_at = loader.ready()?.previous_expires_at;
        expires_at.filter(|at| at.inner().timestamp_millis() > now())
    };
    let submit = move || {
        let body = RotateApiKey {
            grace_seconds: grace.get_untracked().parse::<u32>().ok().map(Into::into),
            // Allow the call to revoke the previous secret only if the dialog shows the warning about this secret.
            replace_previous: untrack(previous_expiry).map(|_| true),
        };
        spawn_local(async move {
            let result = api::rotate_api_key(id, body).await;
            if matches!(&result, Err(error) if error.is(ProblemCode::PreviousKeyActive)) {
                // The key has been rotated since the page loaded it. Reload the key, so that the user sees the warning
                // before trying again.
                let _ = form.busy.try_set(false);
                loader.reload();
                return;
            }
            if let Some(key) = form.finish(result) {
                let _ = open.try_set(false);
                show_key(rotated, key, session);
            }
        });
    };
    view! {
        <DialogForm form open action="Rotate key" locked=true submit>
            <p>"Creates a new secret for this key. The key's name, plan and other settings don't change."</p>
            {move || {
                previous_expiry()
                    .map(|at| {
                        view! {
                            <p class="alert warn" role="alert">
                                "This key was rotated recently. If you rotate it again, the previous secret is revoked immediately instead of expiring " <RelativeTime at/> "."
                            </p>
                        }
                    })
            }}
            <SelectField form name="grace_seconds" id="grace" label="Current secret" value=grace options/>
        </DialogForm>
    }
}
