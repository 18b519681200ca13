//! Fields of forms: a label, what is typed, a hint, and what is wrong with it.

use leptos::prelude::*;

#[component]
pub fn Field(
    /// Also what the field is called in the form.
    id: &'static str,
    #[prop(into)] label: String,
    value: RwSignal<String>,
    #[prop(default = "text")] kind: &'static str,
    #[prop(optional, into)] hint: String,
    #[prop(optional, into)] placeholder: String,
    #[prop(optional)] autocomplete: &'static str,
    #[prop(optional, into)] error: MaybeProp<String>,
    #[prop(optional)] required: bool,
    #[prop(optional)] numeric: bool,
) -> impl IntoView {
    let note = format!("{id}-note");
    let autocomplete = if autocomplete.is_empty() {
        "off"
    } else {
        autocomplete
    };
    view! {
        <div class="field" class:invalid=move || error.get().is_some()>
            <label for=id>{label}</label>
            <input
                id=id
                name=id
                type=kind
                dir=if kind == "text" && !numeric { "auto" } else { "ltr" }
                inputmode=numeric.then_some("numeric")
                placeholder=placeholder
                autocomplete=autocomplete
                required=required
                aria-describedby=note.clone()
                aria-invalid=move || error.get().is_some().then_some("true")
                bind:value=value
            />
            <p class="note" id=note aria-live="polite">
                {move || error.get().unwrap_or_else(|| hint.clone())}
            </p>
        </div>
    }
}

#[component]
pub fn SelectField(
    id: &'static str,
    #[prop(into)] label: String,
    value: RwSignal<String>,
    /// Values and what is shown for them.
    #[prop(into)]
    options: Signal<Vec<(String, String)>>,
    #[prop(optional, into)] hint: String,
    #[prop(optional, into)] error: MaybeProp<String>,
) -> impl IntoView {
    let note = format!("{id}-note");
    view! {
        <div class="field" class:invalid=move || error.get().is_some()>
            <label for=id>{label}</label>
            <select
                id=id
                name=id
                aria-describedby=note.clone()
                on:change=move |ev| value.set(event_target_value(&ev))
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
            <p class="note" id=note aria-live="polite">
                {move || error.get().unwrap_or_else(|| hint.clone())}
            </p>
        </div>
    }
}
