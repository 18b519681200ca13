//! Short messages, one at a time. Success messages disappear on their own; errors stay until dismissed.
//!
//! While a dialog is open, everything outside it is inert, so the messages move into it.

use std::{sync::Arc, time::Duration};

use leptos::{html, prelude::*};

use super::{alert::request_id, focus::rescue_focus};
use crate::api::CallError;

const SUCCESS: Duration = Duration::from_secs(6);
/// How long a message with an Undo button is shown: long enough to notice a mistake.
const UNDOABLE: Duration = Duration::from_secs(12);
/// Maximum number of errors that wait behind the latest one; older ones are dropped.
const MAX_WAITING: usize = 3;

type Undo = Arc<dyn Fn() + Send + Sync>;

#[derive(Clone)]
struct Toast {
    id: u32,
    text: String,
    request_id: Option<String>,
    is_error: bool,
    undo: Option<Undo>,
}

#[derive(Clone, Copy)]
pub struct Toasts {
    /// The messages. The last one is shown.
    all: RwSignal<Vec<Toast>>,
    next_id: StoredValue<u32>,
    container: NodeRef<html::Div>,
}

impl Toasts {
    pub fn provide() -> Self {
        let toasts = Self {
            all: RwSignal::new(Vec::new()),
            next_id: StoredValue::new(0),
            container: NodeRef::new(),
        };
        provide_context(toasts);
        toasts
    }

    pub fn succeed(self, text: impl Into<String>) {
        self.add(text.into(), None, None, Some(SUCCESS));
    }

    /// Reports a success that can be undone. `undo` works even after the user has left the page that reported it.
    pub fn succeed_with_undo(
        self,
        text: impl Into<String>,
        undo: impl Fn() + Send + Sync + 'static,
    ) {
        self.add(text.into(), None, Some(Arc::new(undo)), Some(UNDOABLE));
    }

    pub fn fail(self, error: &CallError) {
        let request_id = error.request_id().map(str::to_owned);
        self.add(error.message(), request_id, None, None);
    }

    /// Shows an error with a custom message.
    pub fn fail_with(self, text: impl Into<String>) {
        self.add(text.into(), None, None, None);
    }

    fn add(
        self,
        text: String,
        request_id: Option<String>,
        undo: Option<Undo>,
        duration: Option<Duration>,
    ) {
        let id = self.next_id.get_value();
        self.next_id.set_value(id.wrapping_add(1));
        // A live region must exist before its text changes, or the change is not announced.
        self.place();
        self.all.update(|all| {
            // Only errors are kept.
            all.retain(|it| it.is_error);
            all.push(Toast {
                id,
                text,
                request_id,
                is_error: duration.is_none(),
                undo,
            });
            all.drain(..all.len().saturating_sub(MAX_WAITING));
        });
        if let Some(duration) = duration {
            set_timeout(move || self.remove(id), duration);
        }
    }

    fn remove(self, id: u32) {
        let _ = self.all.try_update(|all| all.retain(|it| it.id != id));
    }

    /// Moves the messages into the topmost open dialog, or out of dialogs if none is open. Call whenever a dialog opens
    /// or closes.
    pub fn place(self) {
        let Some(container) = self.container.get_untracked() else {
            return;
        };
        let open = document().query_selector_all("dialog[open]").ok();
        let topmost = open.and_then(|it| it.item(it.length().checked_sub(1)?));
        let Some(parent) = topmost.or_else(|| document().body().map(Into::into)) else {
            return;
        };
        if container.parent_node().as_ref() != Some(&parent) {
            let _ = parent.append_child(&container);
        }
    }
}

#[component]
pub fn ToastsView(toasts: Toasts) -> impl IntoView {
    let dismiss = move |id| {
        toasts.remove(id);
        rescue_focus();
    };
    view! {
        <div class="toasts" role="status" aria-live="polite" node_ref=toasts.container>
            {move || {
                let all = toasts.all.get();
                let waiting = all.len().saturating_sub(1);
                all.into_iter()
                    .next_back()
                    .map(|Toast { id, text, request_id: id_to_quote, is_error, undo }| {
                        view! {
                            <div class="toast" class:error=is_error>
                                <p dir="auto">{text}</p>
                                {request_id(id_to_quote)}
                                <div class="toast-actions">
                                    {undo
                                        .map(|undo| {
                                            let run = move |_| {
                                                dismiss(id);
                                                undo();
                                            };
                                            view! { <button type="button" class="link" on:click=run>"Undo"</button> }
                                        })}
                                    <button type="button" class="link" on:click=move |_| dismiss(id)>"Dismiss"</button>
                                    {(waiting > 0).then(|| view! { <span class="small-text">{format!("{waiting} more")}</span> })}
                                </div>
                            </div>
                        }
                    })
            }}
        </div>
    }
}
