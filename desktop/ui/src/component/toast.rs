//! Short messages that go by themselves.

use leptos::{prelude::*, task::spawn_local};

const SHOWN_MS: u32 = 6000;
/// How many are shown at once: the last ones.
const MOST: usize = 3;

#[derive(Clone, Copy)]
pub struct Toasts {
    shown: RwSignal<Vec<(u32, String)>>,
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
        let id = self.next.get_value();
        self.next.set_value(id.wrapping_add(1));
        self.shown.update(|shown| {
            shown.push((id, text.into()));
            shown.drain(..shown.len().saturating_sub(MOST));
        });
        spawn_local(async move {
            gloo_timers::future::TimeoutFuture::new(SHOWN_MS).await;
            self.shown.update(|shown| shown.retain(|(it, _)| *it != id));
        });
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
                    .map(|(_, text)| view! { <p class="toast" dir="auto">{text}</p> })
                    .collect_view()
            }}
        </div>
    }
}
