//! The current time, and the relative times on the page, which change as time passes.

use std::time::Duration;

use leptos::prelude::*;
use quota_common::Timestamp;
use wasm_bindgen::JsCast;
use web_sys::Element;

use crate::model::text::relative;

/// How often relative times are updated. They are shown in whole minutes, so two updates per minute keep them accurate
/// to half a minute.
const TICK: Duration = Duration::from_secs(30);

#[derive(Clone, Copy)]
struct Ticks(RwSignal<u32>);

/// Starts updating relative times. Call once, in an ancestor of all components that show relative times.
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

/// Updates every relative time on the page. A relative time is a `time` element whose title is the exact time.
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

/// Makes the calling effect or view run again on every tick.
pub fn track_ticks() {
    expect_context::<Ticks>().0.track();
}

/// Returns the current time in milliseconds since the Unix epoch.
#[expect(
    clippy::cast_possible_truncation,
    reason = "whole milliseconds fit for thousands of years"
)]
pub fn now() -> i64 {
    js_sys::Date::now() as i64
}
