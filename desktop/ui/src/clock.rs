//! The current time, and a signal that changes as time passes.

use std::time::Duration;

use leptos::prelude::*;

/// Half the smallest unit that relative times show, so that no time on the page is off by more than that.
const TICK: Duration = Duration::from_secs(30);

/// Ticks for every relative time on the page.
#[derive(Clone, Copy)]
struct Ticks(RwSignal<u32>);

/// Starts the ticks. Call once, above everything that shows a relative time.
pub fn provide_ticks() {
    let ticks = RwSignal::new(0_u32);
    set_interval(move || ticks.update(|it| *it = it.wrapping_add(1)), TICK);
    provide_context(Ticks(ticks));
}

/// Makes the caller's effect or view run again on the next tick.
pub fn track_ticks() {
    expect_context::<Ticks>().0.track();
}

/// Milliseconds since 1970.
#[expect(
    clippy::cast_possible_truncation,
    reason = "whole milliseconds fit for thousands of years"
)]
pub fn now() -> i64 {
    js_sys::Date::now() as i64
}
