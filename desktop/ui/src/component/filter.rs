//! Filters in the page's URL. They apply without a submit button.

use leptos::{prelude::*, task::spawn_local};

use crate::route::{Route, route};

/// How long the user must stop typing before a search starts.
const DEBOUNCE_MS: u32 = 250;

/// Sets a filter in the URL and goes to the first page of the list.
pub fn set_filter(route: Route, name: &str, value: &str) {
    let mut query = route.query.get_untracked().with("cursor", "");
    if name == "target_type" {
        // Clear the action, because each resource type has its own actions.
        query = query.with("action", "");
    }
    let query = query.with(name, value);
    route.replace(&format!("{}{query}", route.path.get_untracked()));
}

/// A drop-down filter for the `name` query parameter.
pub fn select_filter(
    name: &'static str,
    id: &'static str,
    label: &'static str,
    options: Signal<Vec<(String, String)>>,
) -> AnyView {
    let route = route();
    view! {
        <div class="field">
            <label for=id>{label}</label>
            <select id=id on:change=move |ev| set_filter(route, name, &event_target_value(&ev))>
                {move || {
                    let current = route.query.with(|query| query.get(name)).unwrap_or_default();
                    options
                        .get()
                        .into_iter()
                        .map(|(value, text)| view! { <option value=value.clone() prop:selected=value == current>{text}</option> }.into_any())
                        .collect_view()
                }}
            </select>
        </div>
    }
    .into_any()
}

/// Returns options that do not depend on loaded data.
pub fn fixed_options(
    options: impl IntoIterator<Item = &'static (&'static str, &'static str)>,
) -> Signal<Vec<(String, String)>> {
    let options = options.into_iter();
    let options = options.map(|&(value, text)| (value.to_owned(), text.to_owned()));
    Signal::stored(options.collect())
}

/// A text or date filter. Text filters apply when the user stops typing.
pub fn input_filter(
    name: &'static str,
    label: &'static str,
    kind: &'static str,
    placeholder: &'static str,
) -> AnyView {
    let route = route();
    let latest = StoredValue::new(0_u32);
    let pause_ms = if kind == "search" { DEBOUNCE_MS } else { 0 };
    let change = move |ev| {
        let value = event_target_value(&ev);
        latest.update_value(|n| *n = n.wrapping_add(1));
        let own = latest.get_value();
        spawn_local(async move {
            gloo_timers::future::TimeoutFuture::new(pause_ms).await;
            if latest.try_get_value() == Some(own) {
                set_filter(route, name, &value);
            }
        });
    };
    view! {
        <div class="field">
            <label for=name>{label}</label>
            <input
                id=name
                type=kind
                dir=(kind == "search").then_some("auto")
                maxlength=(kind == "search").then_some("200")
                placeholder=placeholder
                prop:value=move || route.query.with(|query| query.get(name)).unwrap_or_default()
                on:input=change
            />
        </div>
    }
    .into_any()
}

/// The filters of a list. On phones, only `search` is visible at first. A button shows the other filters. `names` are
/// the query parameters of the other filters; the button's label contains the number of parameters that are set.
pub fn filter_bar(
    class: &'static str,
    names: &'static [&'static str],
    search: AnyView,
    others: AnyView,
) -> AnyView {
    let query = route().query;
    let open = RwSignal::new(false);
    let label = move || {
        let set = query.with(|query| names.iter().filter(|it| query.get(it).is_some()).count());
        match set {
            0 => "Filters".to_owned(),
            set => format!("Filters ({set})"),
        }
    };
    view! {
        <search class=class class:open=open>
            {search}
            <button
                type="button"
                class="button filter-toggle"
                aria-expanded=move || open.get().to_string()
                aria-controls="other-filters"
                on:click=move |_| open.update(|open| *open = !*open)
            >
                {label}
            </button>
            <div id="other-filters" class="other-filters">{others}</div>
        </search>
    }
    .into_any()
}
