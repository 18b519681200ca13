//! The current page's URL. Links within the console change the page without loading a new document.

use leptos::{ev, prelude::*};
use wasm_bindgen::{JsCast, JsValue};
use web_sys::{Element, MouseEvent};

use crate::model::address::Query;

#[derive(Clone, Copy)]
pub struct Route {
    pub path: RwSignal<String>,
    pub query: RwSignal<Query>,
    /// How many times the user has gone to another page.
    pub visits: RwSignal<u32>,
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
            visits: RwSignal::new(0),
        };
        provide_context(route);
        let _ = window_event_listener(ev::popstate, move |_| {
            if is_locked() {
                route.restore();
            } else {
                route.visit();
            }
        });
        let _ = window_event_listener(ev::beforeunload, |ev| {
            if is_locked() {
                ev.prevent_default();
            }
        });
        let _ = window_event_listener(ev::click, move |click| {
            if let Some(to) = internal_link(&click) {
                click.prevent_default();
                route.go(&to);
            }
        });
        route
    }

    /// Goes to a page and adds it to the browser's history. Does nothing while a locked dialog is open.
    pub fn go(self, to: &str) {
        if is_locked() {
            return;
        }
        push(to);
        window().scroll_to_with_x_and_y(0.0, 0.0);
        self.visit();
    }

    /// Shows the page at the current URL after a navigation.
    fn visit(self) {
        let (path, _) = here();
        // Update `visits` first: the new page may add messages, which must not be removed with the old page's messages.
        if self.path.with_untracked(|it| *it != path) {
            self.visits
                .update(|visits| *visits = visits.wrapping_add(1));
        }
        self.update();
    }

    /// Goes to a page, which replaces the current page in the browser's history.
    pub fn replace(self, to: &str) {
        if let Ok(history) = window().history() {
            let _ = history.replace_state_with_url(&JsValue::NULL, "", Some(to));
        }
        self.update();
    }

    /// Reverts the URL after the user has gone back or forward while a locked dialog is open.
    fn restore(self) {
        let at = (self.path.get_untracked(), self.query.get_untracked());
        if at != here() {
            push(&format!("{}{}", at.0, at.1));
        }
    }

    /// Copies the current URL into the signals.
    fn update(self) {
        let (path, query) = here();
        // Effects run only after both signals are set, so they never load data for a mix of two pages. Setting only
        // changed signals avoids loading a page twice.
        if self.query.with_untracked(|it| *it != query) {
            self.query.set(query);
        }
        if self.path.with_untracked(|it| *it != path) {
            self.path.set(path);
        }
    }
}

/// Returns whether an open dialog prevents navigation.
fn is_locked() -> bool {
    let locked = document().query_selector("dialog[open][data-locked]");
    locked.is_ok_and(|it| it.is_some())
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

/// Returns the target of a plain click on a link within the console.
fn internal_link(click: &MouseEvent) -> Option<String> {
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
    let internal = to == "/console" || to.starts_with("/console/") || to.starts_with("/console?");
    (plain && internal && !link.has_attribute("target")).then_some(to)
}
