use leptos::prelude::*;
use quota_common::Timestamp;

use crate::{clock::now, model::key::time_markup};

/// A relative time with the exact time as a tooltip. Updated while the page is open.
#[component]
pub fn RelativeTime(at: Timestamp) -> impl IntoView {
    view! { <span inner_html=time_markup(at, now()).to_string()></span> }
}
