use leptos::{prelude::*, task::spawn_local};

use super::{busy::busy_attr, toast::Toasts};
use crate::api::{self, PendingCall};

#[component]
pub fn ExportButton(
    /// Returns a file name and the file's content.
    export: Callback<(), PendingCall<(String, String)>>,
    /// Whether there is nothing to save yet.
    #[prop(optional, into)]
    disabled: Signal<bool>,
) -> impl IntoView {
    let toasts = expect_context::<Toasts>();
    let busy = RwSignal::new(false);
    let run = move |_| {
        busy.set(true);
        let file = export.run(());
        spawn_local(async move {
            let saved = match file.await {
                Ok((name, text)) => api::save_file(&name, &text).await,
                Err(error) => Err(error),
            };
            match saved {
                Ok(Some(path)) => toasts.succeed(format!("Saved to {path}")),
                // No toast is needed, because the browser shows the download itself.
                Ok(None) => {}
                Err(error) => toasts.fail(&error),
            }
            let _ = busy.try_set(false);
        });
    };
    view! {
        <button type="button" class="button" disabled=disabled aria-disabled=busy_attr(busy) data-busy=busy_attr(busy) on:click=run>
            "Export CSV"
        </button>
    }
}
