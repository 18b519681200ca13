//! Short messages, shown one at a time. Success messages disappear on their own. Errors remain until the user dismisses
//! them or goes to another page. A success message also removes errors that the user has had time to read.
//!
//! An open dialog makes everything outside it inert, so the messages move into the dialog.

use std::{sync::Arc, time::Duration};

use leptos::{html, prelude::*};

use super::{alert::request_id, focus::rescue_focus};
use crate::{
    api::CallError,
    clock::now,
    model::messages::{Message, Messages},
    route::route,
};

const SUCCESS: Duration = Duration::from_secs(6);
/// How long to show a message with an action: long enough to read the message and decide.
const WITH_ACTION: Duration = Duration::from_secs(12);

/// A button's label, and what the button does.
type Action = (&'static str, Arc<dyn Fn() + Send + Sync>);

#[derive(Clone, Copy)]
pub struct Toasts {
    all: RwSignal<Messages<Action>>,
    next_id: StoredValue<u32>,
    container: NodeRef<html::Div>,
}

impl Toasts {
    pub fn provide() -> Self {
        let toasts = Self {
            all: RwSignal::new(Messages::new()),
            next_id: StoredValue::new(0),
            container: NodeRef::new(),
        };
        provide_context(toasts);
        toasts
    }

    pub fn succeed(self, text: impl Into<String>) {
        self.add(text.into(), None, None, Some(SUCCESS));
    }

    /// Shows a success message with an *Undo* button, which works even after the user has left the page.
    pub fn succeed_with_undo(
        self,
        text: impl Into<String>,
        undo: impl Fn() + Send + Sync + 'static,
    ) {
        let undo: Action = ("Undo", Arc::new(undo));
        self.add(text.into(), None, Some(undo), Some(WITH_ACTION));
    }

    /// Shows a message about an event, with a button that leads to the details.
    pub fn announce(
        self,
        text: impl Into<String>,
        label: &'static str,
        open: impl Fn() + Send + Sync + 'static,
    ) {
        let open: Action = (label, Arc::new(open));
        self.add(text.into(), None, Some(open), Some(WITH_ACTION));
    }

    pub fn fail(self, error: &CallError) {
        let request_id = error.request_id().map(str::to_owned);
        self.add(error.message(), request_id, None, None);
    }

    /// Shows an error that is not a [`CallError`].
    pub fn fail_with(self, text: impl Into<String>) {
        self.add(text.into(), None, None, None);
    }

    fn add(
        self,
        text: String,
        request_id: Option<String>,
        action: Option<Action>,
        duration: Option<Duration>,
    ) {
        let id = self.next_id.get_value();
        self.next_id.set_value(id.wrapping_add(1));
        // Screen readers announce a change only if the live region already exists, so the region is placed before the
        // message is added.
        self.place();
        let message = Message {
            id,
            text,
            request_id,
            is_error: duration.is_none(),
            action,
            added_at: now(),
        };
        self.all.update(|all| all.add(message));
        if let Some(duration) = duration {
            set_timeout(move || self.remove(id), duration);
        }
    }

    fn remove(self, id: u32) {
        let _ = self.all.try_update(|all| all.remove(id));
    }

    /// Removes all messages. Call when the session ends.
    pub fn clear(self) {
        self.all.set(Messages::new());
    }

    /// Moves the messages into the topmost open dialog, or into the page body if no dialog is open. Call whenever a
    /// dialog opens or closes.
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
    let visits = route().visits;
    Effect::new(move |previous: Option<()>| {
        visits.track();
        if previous.is_some() && !toasts.all.with_untracked(Messages::is_empty) {
            toasts.all.update(Messages::leave_page);
        }
    });
    let dismiss = move |id| {
        toasts.remove(id);
        rescue_focus();
    };
    view! {
        <div class="toasts" role="status" aria-live="polite" node_ref=toasts.container>
            {move || {
                toasts
                    .all
                    .with(Messages::shown)
                    .map(|(Message { id, text, request_id: id_to_quote, is_error, action, .. }, waiting)| {
                        view! {
                            <div class="toast" class:error=is_error>
                                <p dir="auto">{text}</p>
                                {request_id(id_to_quote)}
                                <div class="toast-actions">
                                    {action
                                        .map(|(label, act)| {
                                            let run = move |_| {
                                                dismiss(id);
                                                act();
                                            };
                                            view! { <button type="button" class="link" on:click=run>{label}</button> }
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
