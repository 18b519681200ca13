//! Copying without a button next to the text.

use leptos::task::spawn_local;

use super::toast::Toasts;
use crate::api;

/// Copies a text for a menu, which closes before it can show the result.
pub fn copy_and_report(text: String, what: &'static str, toasts: Toasts) {
    spawn_local(async move {
        if api::copy(&text).await {
            toasts.succeed(format!("{what} copied"));
        } else {
            toasts.fail_with(format!("Couldn't copy: {text}"));
        }
    });
}
