//! The status and the times of an API key or token.

use leptos::prelude::*;
use quota_common::{Timestamp, api_key::ApiKey};

use crate::{clock::now, component::RelativeTime};

pub fn key_status(key: &ApiKey) -> AnyView {
    let is_expired = key
        .expires_at
        .is_some_and(|at| at.inner().timestamp_millis() <= now());
    let (class, status) = match (key.is_active, is_expired) {
        (false, _) => ("badge", "Inactive"),
        (true, true) => ("badge off", "Expired"),
        (true, false) => ("badge on", "Active"),
    };
    view! { <span class=class>{status}</span> }.into_any()
}

/// A time that may be missing.
pub fn time_or(at: Option<Timestamp>, missing: &'static str) -> AnyView {
    match at {
        Some(at) => view! { <RelativeTime at/> }.into_any(),
        None => view! { <span class="muted">{missing}</span> }.into_any(),
    }
}
