//! Keyboard focus: it moves to a sensible element when the focused one disappears.

use std::time::Duration;

use leptos::prelude::*;
use wasm_bindgen::JsCast;
use web_sys::{Element, HtmlElement};

/// An attribute whose value identifies an element before and after it is rendered again.
const KEY: &str = "data-focus-key";

/// Returns the focused element, unless that is the document itself.
fn focused() -> Option<Element> {
    document()
        .active_element()
        .filter(|element| element.tag_name() != "BODY")
}

fn focus(selector: &str) -> bool {
    let found = document().query_selector(selector).ok().flatten();
    let Some(element) = found.and_then(|it| it.dyn_into::<HtmlElement>().ok()) else {
        return false;
    };
    element.focus().is_ok()
}

/// Runs after the current rendering.
pub fn after_render(then: impl FnOnce() + 'static) {
    set_timeout(then, Duration::ZERO);
}

/// Focuses the first element that matches, after the current rendering.
pub fn focus_soon(selector: impl Into<String>) {
    let selector = selector.into();
    after_render(move || {
        focus(&selector);
    });
}

/// Call before rendering again. Afterwards, the same element gets the focus, or the page's content if that element no
/// longer exists.
pub fn keep_focus() {
    let Some(before) = focused() else { return };
    let key = before.get_attribute(KEY);
    after_render(move || {
        if focused().is_some() {
            return;
        }
        let restored = key.is_some_and(|key| focus(&format!("[{KEY}=\"{key}\"]")));
        if !restored {
            focus("#content");
        }
    });
}

/// Focuses the page's content if nothing has the focus.
pub fn rescue_focus() {
    after_render(|| {
        if focused().is_none() {
            focus("#content");
        }
    });
}
