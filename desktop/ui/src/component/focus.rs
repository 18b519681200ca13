//! Where the focus goes when what had it is gone: never to nowhere, from where a keyboard begins all over.

use std::time::Duration;

use leptos::prelude::*;
use wasm_bindgen::JsCast;
use web_sys::{Element, HtmlElement};

/// Elements that are drawn anew bear the same value of this before and after.
const KEEP: &str = "data-keep";

/// The element that has the focus, but for the whole page.
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

/// After what is being drawn is there.
fn soon(then: impl FnOnce() + 'static) {
    set_timeout(then, Duration::ZERO);
}

/// Gives the focus to the first element that is like this.
pub fn focus_soon(selector: impl Into<String>) {
    let selector = selector.into();
    soon(move || {
        focus(&selector);
    });
}

/// Called before something is drawn anew: what had the focus has it afterwards as well, or the page's content.
pub fn keep_focus() {
    let Some(before) = focused() else { return };
    let keep = before.get_attribute(KEEP);
    soon(move || {
        if focused().is_some() {
            return;
        }
        let again = keep.is_some_and(|keep| focus(&format!("[{KEEP}=\"{keep}\"]")));
        if !again {
            focus("#content");
        }
    });
}

/// Gives the focus to the page's content, where nothing has it.
pub fn rescue_focus() {
    soon(|| {
        if focused().is_none() {
            focus("#content");
        }
    });
}
