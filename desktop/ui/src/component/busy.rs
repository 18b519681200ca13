//! Buttons that wait for a response ignore clicks but keep focus. A disabled button would lose focus.

use leptos::prelude::*;
use wasm_bindgen::{JsCast, prelude::Closure};
use web_sys::{Element, Event};

/// Returns the `aria-disabled` attribute of a button, which is set while `busy` is true.
pub fn busy_attr(
    busy: RwSignal<bool>,
) -> impl Fn() -> Option<&'static str> + Clone + Send + 'static {
    move || busy.try_get().unwrap_or_default().then_some("true")
}

/// Ignores clicks on buttons with `aria-disabled`, including the click that a browser generates when the user presses
/// Enter in a form. Call once.
pub fn ignore_clicks_on_busy_buttons() {
    let stop = Closure::<dyn Fn(Event)>::new(|ev: Event| {
        let target = ev.target().and_then(|it| it.dyn_into::<Element>().ok());
        let disabled = target.and_then(|it| it.closest("[aria-disabled=true]").ok()?);
        if disabled.is_some() {
            ev.prevent_default();
            ev.stop_propagation();
        }
    });
    // In the capture phase, this listener runs before the button's own.
    let _ = window().add_event_listener_with_callback_and_bool(
        "click",
        stop.as_ref().unchecked_ref(),
        true,
    );
    stop.forget();
}
