//! Defers work until no mouse button is pressed.
//!
//! A message that appears while a button is pressed can move the element under the pointer. The browser then sends no
//! click, because the button is not released over the same element. Touches send the same events as a mouse.

use std::{
    cell::{Cell, RefCell},
    time::Duration,
};

use leptos::{ev, prelude::*};

thread_local! {
    static PRESSED: Cell<bool> = const { Cell::new(false) };
    static WAITING: RefCell<Vec<Box<dyn FnOnce()>>> = const { RefCell::new(Vec::new()) };
}

/// Call once, before [`after_press`].
pub fn watch_presses() {
    window_event_listener(ev::mousedown, |_| PRESSED.set(true));
    window_event_listener(ev::mouseup, |_| release());
    // A drag ends without a `mouseup` event.
    window_event_listener(ev::dragend, |_| release());
}

fn release() {
    PRESSED.set(false);
    // The click comes right after this event.
    set_timeout(
        || {
            for then in WAITING.take() {
                then();
            }
        },
        Duration::ZERO,
    );
}

/// Runs immediately or, while a mouse button is pressed, after the click that follows its release.
pub fn after_press(then: impl FnOnce() + 'static) {
    if PRESSED.get() {
        WAITING.with_borrow_mut(|waiting| waiting.push(Box::new(then)));
    } else {
        then();
    }
}
