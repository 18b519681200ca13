//! Where the window is: links within the console change the page, not the document.

use leptos::{ev, prelude::*};
use wasm_bindgen::{JsCast, JsValue};
use web_sys::{Element, MouseEvent};

use crate::model::address::Query;

#[derive(Clone, Copy)]
pub struct Route {
    pub path: RwSignal<String>,
    pub query: RwSignal<Query>,
}

pub fn route() -> Route {
    expect_context()
}

impl Route {
    pub fn provide() -> Self {
        let (path, query) = here();
        let route = Self {
            path: RwSignal::new(path),
            query: RwSignal::new(query),
        };
        provide_context(route);
        let _ = window_event_listener(ev::popstate, move |_| {
            if is_held() {
                route.stay();
            } else {
                route.arrived();
            }
        });
        let _ = window_event_listener(ev::beforeunload, |ev| {
            if is_held() {
                ev.prevent_default();
            }
        });
        let _ = window_event_listener(ev::click, move |click| {
            if let Some(to) = own_link(&click) {
                click.prevent_default();
                route.go(&to);
            }
        });
        route
    }

    /// To another page, from which one can go back; nowhere while a dialog holds this one.
    pub fn go(self, to: &str) {
        if is_held() {
            return;
        }
        push(to);
        window().scroll_to_with_x_and_y(0.0, 0.0);
        self.arrived();
    }

    /// The same, in place of this page.
    pub fn replace(self, to: &str) {
        if let Ok(history) = window().history() {
            let _ = history.replace_state_with_url(&JsValue::NULL, "", Some(to));
        }
        self.arrived();
    }

    /// Takes back where the history went.
    fn stay(self) {
        let at = (self.path.get_untracked(), self.query.get_untracked());
        if at != here() {
            push(&format!("{}{}", at.0, at.1));
        }
    }

    fn arrived(self) {
        let (path, query) = here();
        // Effects run after both, so that nothing is loaded for a page that is half the one before. What stays the
        // same is not told: a page is not loaded twice.
        if self.query.with_untracked(|it| *it != query) {
            self.query.set(query);
        }
        if self.path.with_untracked(|it| *it != path) {
            self.path.set(path);
        }
    }
}

/// Whether a dialog is open that stays until something in it is done.
fn is_held() -> bool {
    let firm = document().query_selector("dialog[open][data-firm]");
    firm.is_ok_and(|it| it.is_some())
}

fn push(to: &str) {
    if let Ok(history) = window().history() {
        let _ = history.push_state_with_url(&JsValue::NULL, "", Some(to));
    }
}

fn here() -> (String, Query) {
    let location = window().location();
    (
        location.pathname().unwrap_or_default(),
        Query::read(&location.search().unwrap_or_default()),
    )
}

/// The address of a link within the console that is plainly clicked.
fn own_link(click: &MouseEvent) -> Option<String> {
    let plain = click.button() == 0
        && !(click.default_prevented()
            || click.meta_key()
            || click.ctrl_key()
            || click.shift_key()
            || click.alt_key());
    let link = click
        .target()?
        .dyn_into::<Element>()
        .ok()?
        .closest("a[href]")
        .ok()??;
    let to = link.get_attribute("href")?;
    let ours = to == "/console" || to.starts_with("/console/") || to.starts_with("/console?");
    (plain && ours && !link.has_attribute("target")).then_some(to)
}
