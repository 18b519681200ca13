//! Form fields: a label, an input, and a hint or an error below the input.

use leptos::prelude::*;

use super::{
    form_state::{Check, FormState},
    press::after_press,
};

#[component]
pub fn Field(
    form: FormState,
    /// The field's name in the API.
    name: &'static str,
    /// The element's ID. Defaults to `name`.
    #[prop(optional)]
    id: Option<&'static str>,
    #[prop(into)] label: String,
    value: RwSignal<String>,
    #[prop(default = "text")] kind: &'static str,
    #[prop(optional, into)] hint: String,
    #[prop(optional, into)] placeholder: String,
    #[prop(default = "off")] autocomplete: &'static str,
    #[prop(optional)] required: bool,
    #[prop(optional)] numeric: bool,
    #[prop(optional)] multiline: bool,
    #[prop(optional)] check: Option<Check>,
    /// Values to suggest while the user types.
    #[prop(optional)]
    suggestions: Vec<String>,
) -> impl IntoView {
    form.register(name, value, required, check);
    let id = id.unwrap_or(name);
    let list = (!suggestions.is_empty()).then(|| format!("{id}-list"));
    let input = if multiline {
        view! {
            <textarea
                id=id
                name=id
                rows="3"
                dir="auto"
                placeholder=placeholder
                aria-describedby=note_id(id)
                aria-invalid=move || form.error(name).map(|_| "true")
                bind:value=value
                on:input=move |_| form.clear(name)
                on:blur=move |_| after_press(move || form.check(name))
            ></textarea>
        }
        .into_any()
    } else {
        view! {
            <input
                id=id
                name=id
                type=kind
                dir=if kind == "text" && !numeric { "auto" } else { "ltr" }
                inputmode=numeric.then_some("numeric")
                placeholder=placeholder
                autocomplete=autocomplete
                required=required
                list=list.clone()
                aria-describedby=note_id(id)
                aria-invalid=move || form.error(name).map(|_| "true")
                bind:value=value
                on:input=move |_| form.clear(name)
                on:blur=move |_| after_press(move || form.check(name))
            />
            {list
                .map(|list| {
                    let options = suggestions.into_iter().map(|it| view! { <option value=it></option> });
                    view! { <datalist id=list>{options.collect_view()}</datalist> }
                })}
        }
        .into_any()
    };
    labeled(form, name, id, label, hint, input)
}

fn note_id(id: &str) -> String {
    format!("{id}-note")
}

/// Adds a label above an input, and the field's error or hint below it.
fn labeled(
    form: FormState,
    name: &'static str,
    id: &'static str,
    label: String,
    hint: String,
    input: AnyView,
) -> AnyView {
    view! {
        <div class="field" class:invalid=move || form.error(name).is_some()>
            <label for=id>{label}</label>
            {input}
            <p class="note" id=note_id(id) aria-live="polite">
                {move || form.error(name).unwrap_or_else(|| hint.clone())}
            </p>
        </div>
    }
    .into_any()
}

#[component]
pub fn SelectField(
    form: FormState,
    /// The field's name in the API.
    name: &'static str,
    id: &'static str,
    #[prop(into)] label: String,
    value: RwSignal<String>,
    /// The options, each as a value and its label.
    #[prop(into)]
    options: Signal<Vec<(String, String)>>,
    #[prop(optional, into)] hint: String,
    #[prop(optional)] required: bool,
) -> impl IntoView {
    form.register(name, value, required, None);
    let input = view! {
        <select
            id=id
            name=id
            required=required
            aria-describedby=note_id(id)
            aria-invalid=move || form.error(name).map(|_| "true")
            on:change=move |ev| {
                value.set(event_target_value(&ev));
                form.clear(name);
            }
        >
            {move || {
                options
                    .get()
                    .into_iter()
                    .map(|(key, text)| {
                        let same = key.clone();
                        view! {
                            <option value=key prop:selected=move || value.get() == same>{text}</option>
                        }
                    })
                    .collect_view()
            }}
        </select>
    };
    labeled(form, name, id, label, hint, input.into_any())
}
