//! Buttons that wait for an answer: they do nothing meanwhile, and keep the focus, which a browser takes from those
//! that are disabled.

use leptos::prelude::*;
use wasm_bindgen::{JsCast, prelude::Closure};
use web_sys::{Element, Event};

/// `aria-disabled` of such a button.
pub fn held(busy: RwSignal<bool>) -> impl Fn() -> Option<&'static str> + Clone + Send + 'static {
    move || busy.try_get().unwrap_or_default().then_some("true")
}

/// Keeps clicks from buttons that wait; Enter in a form is a click on its button as well. Once, for the whole page.
pub fn keep_clicks_from_held() {
    let keep = Closure::<dyn Fn(Event)>::new(|ev: Event| {
        let target = ev.target().and_then(|it| it.dyn_into::<Element>().ok());
        let held = target.and_then(|it| it.closest("[aria-disabled=true]").ok()?);
        if held.is_some() {
            ev.prevent_default();
            ev.stop_propagation();
        }
    });
    // Before it gets to the button.
    let _ = window().add_event_listener_with_callback_and_bool(
        "click",
        keep.as_ref().unchecked_ref(),
        true,
    );
    keep.forget();
}
