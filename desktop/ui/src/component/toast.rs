//! Short messages: those of what went well go by themselves, those of what did not when they were read.

use leptos::{prelude::*, task::spawn_local};

use super::focus::rescue_focus;

const SHOWN_MS: u32 = 6000;
/// How many are shown at once: the last ones.
const MOST: usize = 3;

#[derive(Clone)]
struct Toast {
    id: u32,
    text: String,
    /// Stays until it is put away.
    stays: bool,
}

#[derive(Clone, Copy)]
pub struct Toasts {
    shown: RwSignal<Vec<Toast>>,
    next: StoredValue<u32>,
}

impl Toasts {
    pub fn provide() -> Self {
        let toasts = Self {
            shown: RwSignal::new(Vec::new()),
            next: StoredValue::new(0),
        };
        provide_context(toasts);
        toasts
    }

    pub fn say(self, text: impl Into<String>) {
        let id = self.add(text.into(), false);
        spawn_local(async move {
            gloo_timers::future::TimeoutFuture::new(SHOWN_MS).await;
            self.drop(id);
        });
    }

    /// Says what went wrong.
    pub fn fail(self, text: impl Into<String>) {
        self.add(text.into(), true);
    }

    fn add(self, text: String, stays: bool) -> u32 {
        let id = self.next.get_value();
        self.next.set_value(id.wrapping_add(1));
        self.shown.update(|shown| {
            shown.push(Toast { id, text, stays });
            shown.drain(..shown.len().saturating_sub(MOST));
        });
        id
    }

    fn drop(self, id: u32) {
        self.shown.update(|shown| shown.retain(|it| it.id != id));
    }
}

#[component]
pub fn ToastsView(toasts: Toasts) -> impl IntoView {
    view! {
        <div class="toasts" role="status" aria-live="polite">
            {move || {
                toasts
                    .shown
                    .get()
                    .into_iter()
                    .map(|Toast { id, text, stays }| {
                        view! {
                            <div class="toast">
                                <p dir="auto">{text}</p>
                                {stays
                                    .then(|| {
                                        view! {
                                            <button
                                                class="link"
                                                on:click=move |_| {
                                                    toasts.drop(id);
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
