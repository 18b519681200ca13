//! Keeps keyboard focus in a sensible place when the focused element disappears.

use std::time::Duration;

use leptos::prelude::*;
use wasm_bindgen::JsCast;
use web_sys::{Element, HtmlElement};

/// The attribute that identifies an element across renderings.
const KEY: &str = "data-focus-key";

/// Returns the focused element. Returns `None` if the document's body has focus.
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

pub fn after_render(then: impl FnOnce() + 'static) {
    set_timeout(then, Duration::ZERO);
}

/// Focuses the first matching element after the current rendering.
pub fn focus_soon(selector: impl Into<String>) {
    let selector = selector.into();
    after_render(move || {
        focus(&selector);
    });
}

/// Restores focus after the current rendering: to the same element or, if that element no longer exists, to the page's
/// content. Call before rendering again.
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

/// Focuses the page's content if no element has focus.
pub fn rescue_focus() {
    after_render(|| {
        if focused().is_none() {
            focus("#content");
        }
    });
}
