//! Times, relative to now.

use leptos::prelude::*;
use quota_common::Timestamp;

use crate::{clock::now, model::key::time_markup};

/// A relative time. Its exact time is its tooltip. The clock keeps it current while the page is open.
#[component]
pub fn RelativeTime(at: Timestamp) -> impl IntoView {
    view! { <span inner_html=time_markup(at, now()).to_string()></span> }
}
