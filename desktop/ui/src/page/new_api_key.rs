//! Making an API key, and showing its text for the only time.

use leptos::{ev::SubmitEvent, prelude::*, task::spawn_local};
use quota_common::{
    api_key::{CreateApiKey, CreatedApiKey},
    plan::Plan,
};

use super::try_it::TryIt;
use crate::{
    api::{self, Failure},
    app::session,
    component::{Alert, CodeBlock, Field, Loader, Modal, SelectField, Shown, focus_soon, held},
    model::{form::optional_rate, text},
};

#[component]
pub fn CreateDialog(
    open: RwSignal<bool>,
    plans: Loader<Vec<Plan>>,
    changed: Callback<()>,
) -> impl IntoView {
    let made = RwSignal::new(None::<CreatedApiKey>);
    let showing = RwSignal::new(false);
    let busy = RwSignal::new(false);
    // Not of the form, which is drawn anew with the plans: the text in an answer under way comes once.
    let done = Callback::new(move |key: CreatedApiKey| {
        made.set(Some(key));
        showing.set(true);
        changed.run(());
    });
    view! {
        <Modal open title="New API key" firm=busy>
            <Shown
                loader=plans
                show=move |plans| {
                    if plans.is_empty() {
                        view! {
                            <p>"A key belongs to a plan, and there is none yet."</p>
                            <div class="actions end">
                                <button class="button" on:click=move |_| open.set(false)>"Cancel"</button>
                                <a class="button first" href="/console/plans?new=1">"Make a plan"</a>
                            </div>
                        }
                            .into_any()
                    } else {
                        view! { <CreateForm plans open busy done/> }.into_any()
                    }
                }
            />
        </Modal>
        <TextOnce made open=showing/>
    }
}

#[component]
fn CreateForm(
    plans: Vec<Plan>,
    open: RwSignal<bool>,
    busy: RwSignal<bool>,
    done: Callback<CreatedApiKey>,
) -> impl IntoView {
    // It may come only after the dialog has opened, when the plans are there.
    focus_soon("#key_name");
    let name = RwSignal::new(String::new());
    let plan = RwSignal::new(
        plans
            .first()
            .map(|it| it.id.to_string())
            .unwrap_or_default(),
    );
    let rpm = RwSignal::new(String::new());
    let expires = RwSignal::new(String::new());
    let failure = RwSignal::new(None::<Failure>);
    let rpm_wrong = RwSignal::new(None::<String>);
    let of = move |field: &'static str| Signal::derive(move || failure.get()?.of_field(field));
    let rest = Signal::derive(move || {
        let failure = failure.get()?;
        (!failure.names_fields()).then(|| failure.text())
    });
    let options = plans
        .into_iter()
        .map(|plan| {
            let text = format!(
                "{}, {} a minute",
                plan.name,
                text::number(plan.default_rpm.into())
            );
            (plan.id.to_string(), text)
        })
        .collect::<Vec<_>>();
    let submit = move |ev: SubmitEvent| {
        ev.prevent_default();
        failure.set(None);
        rpm_wrong.set(None);
        let rpm_override = match optional_rate(&rpm.get_untracked()) {
            Ok(rpm) => rpm,
            Err(wrong) => return rpm_wrong.set(Some(wrong.to_owned())),
        };
        let Ok(plan_id) = plan.get_untracked().parse() else {
            return;
        };
        let body = CreateApiKey {
            name: name.get_untracked().into(),
            plan_id,
            expires_at: local_time(&expires.get_untracked()),
            rpm_override: rpm_override.map(Into::into),
        };
        busy.set(true);
        spawn_local(async move {
            let answer = api::create_api_key(body).await;
            let _ = busy.try_set(false);
            match answer {
                Ok(made) => {
                    let _ = open.try_set(false);
                    let _ = done.try_run(made);
                }
                Err(refused) => {
                    let _ = failure.try_set(Some(refused));
                }
            }
        });
    };
    view! {
        <form on:submit=submit>
            <Alert text=rest/>
            <Field id="key_name" label="Name" value=name required=true hint="Who holds it, such as the mobile app." error=of("name")/>
            <SelectField id="key_plan" label="Plan" value=plan options error=of("plan_id")/>
            <div class="pair">
                <Field id="key_rpm" label="Own rate (optional)" value=rpm numeric=true hint="Requests a minute, in place of the plan's." error=Signal::derive(move || rpm_wrong.get().or_else(|| of("rpm_override").get()))/>
                <Field id="key_expires" label="Expires (optional)" kind="datetime-local" value=expires hint="From then on it is refused." error=of("expires_at")/>
            </div>
            <div class="actions end">
                <button type="button" class="button" aria-disabled=held(busy) on:click=move |_| open.set(false)>"Cancel"</button>
                <button class="button first" aria-disabled=held(busy)>"Make key"</button>
            </div>
        </form>
    }
}

/// What a field for a local time holds.
pub fn local_time(text: &str) -> Option<quota_common::Timestamp> {
    if text.is_empty() {
        return None;
    }
    let iso = js_sys::Date::new(&text.into())
        .to_iso_string()
        .as_string()?;
    iso.parse().ok()
}

/// A time as a field for a local time holds it.
pub fn in_field(at: quota_common::Timestamp) -> String {
    // To the minute, in the browser's own time zone.
    let date = js_sys::Date::new_0();
    #[expect(
        clippy::cast_precision_loss,
        reason = "a time of our age is exact in a double"
    )]
    date.set_time(at.inner().timestamp_millis() as f64);
    let local = date.get_time() - date.get_timezone_offset() * 60_000.0;
    date.set_time(local);
    let iso = date.to_iso_string().as_string().unwrap_or_default();
    iso.get(..16).unwrap_or_default().to_owned()
}

/// A key's text, for the only time: it goes when its holder says that it is stored.
#[component]
pub fn TextOnce(made: RwSignal<Option<CreatedApiKey>>, open: RwSignal<bool>) -> impl IntoView {
    let stored = RwSignal::new(false);
    let session = session();
    Effect::new(move |_| {
        if let Some(made) = made.get()
            && let Some(text) = made.key
        {
            stored.set(false);
            session.known_keys.update(|known| {
                known.retain(|(id, _)| *id != made.api_key.id);
                known.push((made.api_key.id, text));
            });
        }
    });
    let text = Signal::derive(move || made.get().and_then(|it| it.key).unwrap_or_default());
    let name = move || made.get().map(|it| it.api_key.name).unwrap_or_default();
    let curl = Signal::derive(move || text::curl(&api::origin(), &text.get()));
    view! {
        <Modal open firm=true wide=true title=Signal::derive(move || format!("The key of {}", text::named(&name())))>
            <p>"This is the only time it is shown. It is stored nowhere; a key that is lost is rotated."</p>
            <CodeBlock id="key-text" text what="the key"/>
            <h3>"Try it"</h3>
            <CodeBlock text=curl what="the curl line"/>
            <TryIt text/>
            <div class="actions end gate">
                <label class="check">
                    <input type="checkbox" name="stored" bind:checked=stored/>
                    <span>"I stored it"</span>
                </label>
                <button
                    class="button first"
                    disabled=move || !stored.get()
                    on:click=move |_| {
                        open.set(false);
                        made.set(None);
                    }
                >
                    "Done"
                </button>
            </div>
        </Modal>
    }
}
