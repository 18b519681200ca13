//! Forms and their submit buttons.

use leptos::prelude::*;

use super::{alert::Alert, busy::busy_attr, form_state::FormState};

/// A form on a page: an error, the fields, and a button to submit.
#[component]
pub fn PageForm(
    form: FormState,
    /// The label of the submit button.
    action: &'static str,
    /// Called on submission if every field is valid.
    submit: impl Fn() + 'static,
    children: Children,
) -> impl IntoView {
    view! {
        <form novalidate on:submit=form.on_submit(submit)>
            <Alert error=form.failure()/>
            {children()}
            <div class="actions">
                <SubmitButton form action/>
            </div>
        </form>
    }
}

/// A form in a dialog: an error, the fields, and buttons to submit and to close.
#[component]
pub fn DialogForm(
    form: FormState,
    open: RwSignal<bool>,
    action: &'static str,
    /// Whether the dialog must stay open until the response arrives, because the response contains a secret.
    #[prop(optional)]
    locked: bool,
    /// Called only if every field is valid.
    submit: impl Fn() + 'static,
    children: Children,
) -> impl IntoView {
    dialog_form(form, open, action, locked, Box::new(submit), children())
}

fn dialog_form(
    form: FormState,
    open: RwSignal<bool>,
    action: &'static str,
    locked: bool,
    submit: Box<dyn Fn()>,
    fields: AnyView,
) -> AnyView {
    let waiting = busy_attr(form.busy);
    view! {
        <form novalidate on:submit=form.on_submit(submit)>
            <Alert error=form.failure()/>
            {fields}
            <div class="actions end">
                <button
                    type="button"
                    class="button"
                    aria-disabled=move || waiting().filter(|_| locked)
                    on:click=move |_| open.set(false)
                >
                    "Cancel"
                </button>
                <SubmitButton form action/>
            </div>
        </form>
    }
    .into_any()
}

#[component]
fn SubmitButton(form: FormState, action: &'static str) -> impl IntoView {
    view! {
        <button class="button primary" aria-disabled=busy_attr(form.busy) data-busy=busy_attr(form.busy)>
            {action}
        </button>
    }
}
