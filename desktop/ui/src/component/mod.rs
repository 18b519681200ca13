//! The parts that pages are made of.

mod field;
mod focus;
mod held;
mod icon;
mod list;
mod modal;
mod palette;
mod secret;
mod sort;
mod toast;

use leptos::prelude::*;

pub use field::{Field, SelectField};
pub use focus::focus_soon;
pub use held::{held, keep_clicks_from_held};
pub use icon::{Icon, Mark, Shape};
pub use list::{Load, Loader, Pager, Shown, load, load_page, open_when_asked};
pub use modal::{Confirm, Modal};
pub use palette::{Commands, CommandsView, PaletteButton};
pub use secret::{CodeBlock, CopyButton};
pub use sort::{SortHead, SortSelect};
pub use toast::{Toasts, ToastsView};

/// The head of a page, which also names the window.
#[component]
pub fn Head(
    #[prop(into)] title: Signal<String>,
    #[prop(optional, into)] about: String,
    #[prop(optional)] children: Option<Children>,
) -> impl IntoView {
    Effect::new(move |_| {
        document().set_title(&format!("{} · Quota", title.get()));
    });
    view! {
        <header class="head">
            <div>
                <h1 dir="auto">{title}</h1>
                {(!about.is_empty()).then(|| view! { <p class="quiet">{about}</p> })}
            </div>
            {children.map(|children| view! { <div class="actions">{children()}</div> })}
        </header>
    }
}

/// What stands where a list would, were there something in it.
#[component]
pub fn Empty(
    shape: Shape,
    #[prop(into)] title: String,
    #[prop(into)] about: String,
    /// It is all that the page says.
    #[prop(optional)]
    alone: bool,
    #[prop(optional)] children: Option<Children>,
) -> impl IntoView {
    let title = if alone {
        view! { <h1>{title}</h1> }.into_any()
    } else {
        view! { <h2>{title}</h2> }.into_any()
    };
    view! {
        <div class="empty">
            <Icon shape/>
            {title}
            <p class="quiet">{about}</p>
            {children.map(|children| children())}
        </div>
    }
}

/// A failure that no field is to blame for.
#[component]
pub fn Alert(#[prop(into)] text: Signal<Option<String>>) -> impl IntoView {
    view! {
        <div role="alert">
            {move || text.get().map(|text| view! { <p class="alert">{text}</p> })}
        </div>
    }
}

/// A time, told from now, with the exact one to point at.
#[component]
pub fn When(
    at: quota_common::Timestamp,
    /// The exact one is written too, in this computer's time zone.
    #[prop(optional)]
    spelled: bool,
) -> impl IntoView {
    let millis = at.inner().timestamp_millis();
    #[expect(
        clippy::cast_precision_loss,
        reason = "a time of our age is exact in a double"
    )]
    let exact = js_sys::Date::new(&(millis as f64).into())
        .to_locale_string("default", &wasm_bindgen::JsValue::UNDEFINED)
        .as_string()
        .unwrap_or_default();
    let minute = crate::app::session().minute;
    view! {
        <time datetime=at.to_string() title=exact.clone()>
            {move || {
                minute.track();
                crate::model::text::relative(millis, now())
            }}
        </time>
        {spelled.then(|| view! { <span class="exact">{exact}</span> })}
    }
}

/// Changes while time passes, for what tells times from now: one for all pages.
pub fn minute() -> RwSignal<u32> {
    let minute = RwSignal::new(0_u32);
    // Half of what is told least: no time shown is wrong for longer.
    set_interval(
        move || minute.update(|it| *it = it.wrapping_add(1)),
        std::time::Duration::from_secs(30),
    );
    minute
}

/// Milliseconds since 1970.
#[expect(
    clippy::cast_possible_truncation,
    reason = "whole milliseconds of our age fit"
)]
pub fn now() -> i64 {
    js_sys::Date::now() as i64
}
