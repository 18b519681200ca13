//! The current time, a signal that changes as time passes, and the relative times on the page.

use std::time::Duration;

use leptos::prelude::*;
use quota_common::Timestamp;
use wasm_bindgen::JsCast;
use web_sys::Element;

use crate::model::text::relative;

/// Half the smallest unit that relative times show, so that no time on the page is off by more than this.
const TICK: Duration = Duration::from_secs(30);

/// Ticks for every relative time on the page.
#[derive(Clone, Copy)]
struct Ticks(RwSignal<u32>);

/// Starts the ticks. Call once, above all components that show a relative time.
pub fn provide_ticks() {
    let ticks = RwSignal::new(0_u32);
    set_interval(
        move || {
            ticks.update(|it| *it = it.wrapping_add(1));
            update_times();
        },
        TICK,
    );
    provide_context(Ticks(ticks));
}

/// Updates every relative time on the page: each is a `time` element with its exact time as a title.
fn update_times() {
    let Ok(times) = document().query_selector_all("time[title][datetime]") else {
        return;
    };
    for at in 0..times.length() {
        let time = times.item(at).and_then(|it| it.dyn_into::<Element>().ok());
        let Some(time) = time else { continue };
        let exact = time.get_attribute("datetime");
        if let Some(exact) = exact.and_then(|it| it.parse::<Timestamp>().ok()) {
            let text = relative(exact.inner().timestamp_millis(), now());
            time.set_text_content(Some(&text));
        }
    }
}

/// Reruns the caller's effect or view on the next tick.
pub fn track_ticks() {
    expect_context::<Ticks>().0.track();
}

/// Returns the current time in milliseconds since 1970.
#[expect(
    clippy::cast_possible_truncation,
    reason = "whole milliseconds fit for thousands of years"
)]
pub fn now() -> i64 {
    js_sys::Date::now() as i64
}
