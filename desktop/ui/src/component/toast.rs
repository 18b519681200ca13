//! Short messages. Success messages disappear on their own; errors stay until dismissed.

use leptos::{prelude::*, task::spawn_local};

use super::{alert::request_id, focus::rescue_focus};
use crate::api::CallError;

const SUCCESS_MS: u32 = 6000;
/// How many toasts are visible at once; older ones are dropped.
const MAX_VISIBLE: usize = 3;

#[derive(Clone)]
struct Toast {
    id: u32,
    text: String,
    request_id: Option<String>,
    is_error: bool,
}

#[derive(Clone, Copy)]
pub struct Toasts {
    visible: RwSignal<Vec<Toast>>,
    next_id: StoredValue<u32>,
}

impl Toasts {
    pub fn provide() -> Self {
        let toasts = Self {
            visible: RwSignal::new(Vec::new()),
            next_id: StoredValue::new(0),
        };
        provide_context(toasts);
        toasts
    }

    pub fn succeed(self, text: impl Into<String>) {
        let id = self.add(text.into(), None, false);
        spawn_local(async move {
            gloo_timers::future::TimeoutFuture::new(SUCCESS_MS).await;
            self.remove(id);
        });
    }

    pub fn fail(self, error: &CallError) {
        let request_id = error.request_id().map(str::to_owned);
        self.add(error.message(), request_id, true);
    }

    /// Shows an error with a text of its own.
    pub fn fail_with(self, text: impl Into<String>) {
        self.add(text.into(), None, true);
    }

    fn add(self, text: String, request_id: Option<String>, is_error: bool) -> u32 {
        let id = self.next_id.get_value();
        self.next_id.set_value(id.wrapping_add(1));
        self.visible.update(|visible| {
            visible.push(Toast {
                id,
                text,
                request_id,
                is_error,
            });
            visible.drain(..visible.len().saturating_sub(MAX_VISIBLE));
        });
        id
    }

    fn remove(self, id: u32) {
        self.visible
            .update(|visible| visible.retain(|it| it.id != id));
    }
}

#[component]
pub fn ToastsView(toasts: Toasts) -> impl IntoView {
    view! {
        <div class="toasts" role="status" aria-live="polite">
            {move || {
                toasts
                    .visible
                    .get()
                    .into_iter()
                    .map(|Toast { id, text, request_id: id_to_quote, is_error }| {
                        view! {
                            <div class="toast">
                                <p dir="auto">{text}</p>
                                {request_id(id_to_quote)}
                                {is_error
                                    .then(|| {
                                        view! {
                                            <button
                                                class="link"
                                                on:click=move |_| {
                                                    toasts.remove(id);
                                                    rescue_focus();
                                                }
                                            >
                                                "Dismiss"
                                            </button>
                                        }
                                    })}
                            </div>
                        }
                    })
                    .collect_view()
            }}
        </div>
    }
}
