//! Errors that do not belong to a form field.

use leptos::prelude::*;

use super::copy::CopyButton;
use crate::api::CallError;

#[component]
pub fn Alert(#[prop(into)] error: Signal<Option<CallError>>) -> impl IntoView {
    view! {
        <div role="alert">
            {move || {
                error
                    .get()
                    .map(|error| {
                        let id = error.request_id().map(str::to_owned);
                        view! {
                            <div class="alert">
                                <p>{error.message()}</p>
                                {request_id(id)}
                            </div>
                        }
                    })
            }}
        </div>
    }
}

/// Shows the request ID that users quote when they report an error, with a button to copy it.
pub fn request_id(id: Option<String>) -> AnyView {
    id.map(|id| {
        let text = id.clone();
        view! {
            <p class="request-id">
                "Request ID: " <code>{id}</code> " "
                <CopyButton text=Signal::derive(move || text.clone()) what="request ID"/>
            </p>
        }
    })
    .into_any()
}
