//! Times, relative to now.

use leptos::prelude::*;
use quota_common::Timestamp;

use crate::{
    clock::{now, track_ticks},
    model::text::{date_time, relative},
};

/// A relative time that stays current while the page is open. The exact time is its tooltip.
#[component]
pub fn RelativeTime(
    at: Timestamp,
    /// Also shows the exact time.
    #[prop(optional)]
    with_exact: bool,
) -> impl IntoView {
    let millis = at.inner().timestamp_millis();
    let exact = date_time(millis);
    view! {
        <time datetime=at.to_string() title=exact.clone()>
            {move || {
                track_ticks();
                relative(millis, now())
            }}
        </time>
        {with_exact.then(|| view! { <span class="exact">{exact}</span> })}
    }
}
