use leptos::task::spawn_local;

use super::toast::Toasts;
use crate::api;

/// Copies text and reports the result in a toast. Meant for menus, which close before they could show the result
/// themselves.
pub fn copy_and_report(text: String, what: &'static str, toasts: Toasts) {
    spawn_local(async move {
        if api::copy(&text).await {
            toasts.succeed(format!("{what} copied"));
        } else {
            toasts.fail_with(format!("Couldn't copy. {what}: {text}"));
        }
    });
}
