use leptos::prelude::*;
use quota_common::{Timestamp, api_key::ApiKey};

use crate::{
    clock::now,
    model::key::{self, status_badge},
};

pub fn key_status(key: &ApiKey) -> AnyView {
    view! { <span inner_html=status_badge(key, now()).to_string()></span> }.into_any()
}

pub fn time_or(at: Option<Timestamp>, missing: &'static str) -> AnyView {
    view! { <span inner_html=key::time_or(at, missing, now()).to_string()></span> }.into_any()
}
