//! Delays work while a mouse button is pressed.
//!
//! A message that appears while a mouse button is pressed can move the element under the pointer. The mouse button is
//! then released over a different element, and the browser sends no click. Touches generate the same events as a mouse.

use std::{
    cell::{Cell, RefCell},
    time::Duration,
};

use leptos::{ev, prelude::*};

thread_local! {
    static PRESSED: Cell<bool> = const { Cell::new(false) };
    static WAITING: RefCell<Vec<Box<dyn FnOnce()>>> = const { RefCell::new(Vec::new()) };
}

/// Tracks whether a mouse button is pressed. Call once, before any call to [`after_press`].
pub fn watch_presses() {
    window_event_listener(ev::mousedown, |_| PRESSED.set(true));
    window_event_listener(ev::mouseup, |_| release());
    // A drag ends without a `mouseup` event.
    window_event_listener(ev::dragend, |_| release());
}

fn release() {
    PRESSED.set(false);
    // The timeout ends after the click, which immediately follows the release.
    set_timeout(
        || {
            for then in WAITING.take() {
                then();
            }
        },
        Duration::ZERO,
    );
}

/// Runs `then` immediately or, if a mouse button is pressed, after the button is released and the resulting click has
/// been handled.
pub fn after_press(then: impl FnOnce() + 'static) {
    if PRESSED.get() {
        WAITING.with_borrow_mut(|waiting| waiting.push(Box::new(then)));
    } else {
        then();
    }
}
