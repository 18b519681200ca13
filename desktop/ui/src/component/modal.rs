//! Dialogs. The browser's `<dialog>` element traps focus, and restores it when the dialog closes.

use leptos::{
    ev::{KeyboardEvent, SubmitEvent},
    html,
    prelude::*,
    task::spawn_local,
};

use super::{
    alert::Alert,
    busy::busy_attr,
    field::Field,
    focus::{after_render, rescue_focus},
    form_state::FormState,
    toast::Toasts,
};
use crate::{
    api::{CallError, PendingCall},
    model::bulk::is_phrase,
    reactive::effect,
};

#[component]
pub fn Modal(
    open: RwSignal<bool>,
    #[prop(into)] title: Signal<String>,
    /// While this is set, neither Escape nor navigation closes the dialog, because the user could not see its content
    /// again.
    #[prop(optional, into)]
    locked: Signal<bool>,
    /// Called when the user presses Escape in a locked dialog.
    #[prop(optional)]
    on_escape: Option<Callback<()>>,
    #[prop(optional)] wide: bool,
    /// Whether to show the dialog as a full-height panel at the side of the page, as for forms that create or edit a
    /// resource.
    #[prop(optional)]
    panel: bool,
    /// Whether to omit the padding, and to show the title only to screen readers.
    #[prop(optional)]
    bare: bool,
    children: ChildrenFn,
) -> impl IntoView {
    let dialog = NodeRef::<html::Dialog>::new();
    let toasts = use_context::<Toasts>();
    let place_toasts = move || {
        if let Some(toasts) = toasts {
            toasts.place();
        }
    };
    effect(move || {
        let is_open = open.get();
        let Some(dialog) = dialog.get() else { return };
        if is_open && !dialog.open() {
            let _ = dialog.show_modal();
            place_toasts();
        } else if !is_open && dialog.open() {
            dialog.close();
            place_toasts();
            rescue_focus();
        }
    });
    // The dialog is removed without an event when the user leaves the page.
    on_cleanup(move || after_render(place_toasts));
    view! {
        <dialog
            node_ref=dialog
            class="modal"
            class:wide=wide
            class:bare=bare
            class:panel=panel
            aria-label=move || title.get()
            data-locked=move || locked.get().then_some("")
            // This event is asynchronous: the dialog may already be open again.
            on:close=move |_| {
                if dialog.get_untracked().is_none_or(|dialog| !dialog.open()) {
                    open.set(false);
                    place_toasts();
                }
            }
            on:cancel=move |ev: web_sys::Event| {
                if locked.get_untracked() {
                    ev.prevent_default();
                }
            }
            // If the user presses Escape twice, browsers close the dialog even if `cancel` was prevented. To prevent
            // this, the key press itself is handled.
            on:keydown=move |ev: KeyboardEvent| {
                if locked.get_untracked() && ev.key() == "Escape" {
                    ev.prevent_default();
                    if let Some(on_escape) = on_escape {
                        on_escape.run(());
                    }
                }
            }
        >
            <Show when=move || open.get()>
                <h2 class="modal-title">{title}</h2>
                {children()}
            </Show>
        </dialog>
    }
}

#[derive(Clone, Copy)]
pub struct Confirmation {
    pub open: RwSignal<bool>,
    /// Whether the action is in progress.
    pub busy: RwSignal<bool>,
    pub failure: RwSignal<Option<CallError>>,
}

impl Confirmation {
    pub fn new() -> Self {
        Self {
            open: RwSignal::new(false),
            busy: RwSignal::new(false),
            failure: RwSignal::new(None),
        }
    }

    pub fn ask(self) {
        self.failure.set(None);
        self.open.set(true);
    }

    /// Makes the call that the user has confirmed. On success, closes the dialog and calls `done`; on failure, shows
    /// the error.
    pub fn send<T: 'static>(self, call: PendingCall<T>, done: impl FnOnce(T) + 'static) {
        self.busy.set(true);
        spawn_local(async move {
            let result = call.await;
            let _ = self.busy.try_set(false);
            match result {
                Ok(response) => {
                    let _ = self.open.try_set(false);
                    done(response);
                }
                Err(error) => {
                    let _ = self.failure.try_set(Some(error));
                }
            }
        });
    }
}

/// Asks the user to confirm an action, and explains its consequences.
#[component]
pub fn Confirm(
    confirmation: Confirmation,
    #[prop(into)] title: Signal<String>,
    #[prop(into)] message: Signal<String>,
    /// The label of the confirm button.
    #[prop(into)]
    action: Signal<String>,
    /// Whether the action is destructive.
    #[prop(default = true.into())]
    danger: Signal<bool>,
    /// The text that the user must type to enable the button.
    #[prop(optional, into)]
    phrase: MaybeProp<String>,
    /// A less drastic action to offer instead, with its label.
    #[prop(optional)]
    alternative: Option<(&'static str, Callback<()>)>,
    /// Whether to offer the alternative.
    #[prop(optional, into)]
    has_alternative: Signal<bool>,
    run: Callback<()>,
) -> impl IntoView {
    let Confirmation {
        open,
        busy,
        failure,
    } = confirmation;
    let typed = RwSignal::new(String::new());
    let is_unconfirmed = move || {
        let phrase = phrase.get();
        phrase.is_some_and(|phrase| typed.with(|typed| !is_phrase(typed, &phrase)))
    };
    let submit = move |ev: SubmitEvent| {
        ev.prevent_default();
        if !is_unconfirmed() {
            run.run(());
        }
    };
    view! {
        <Modal open title>
            <form novalidate on:submit=submit>
                <p>{message}</p>
                <Alert error=failure/>
                {move || {
                    phrase
                        .get()
                        .map(|phrase| {
                            // This closure runs each time the dialog opens.
                            typed.set(String::new());
                            view! { <Field form=FormState::new() name="phrase" label=format!("Type \"{phrase}\" to confirm") value=typed/> }
                        })
                }}
                <div class="actions end">
                    <button type="button" class="button" autofocus on:click=move |_| open.set(false)>"Cancel"</button>
                    {move || {
                        alternative
                            .filter(|_| has_alternative.get())
                            .map(|(label, run)| {
                                view! { <button type="button" class="button" aria-disabled=busy_attr(busy) on:click=move |_| run.run(())>{label}</button> }
                            })
                    }}
                    <button class="button" class:danger=danger class:primary=move || !danger.get() disabled=is_unconfirmed aria-disabled=busy_attr(busy) data-busy=busy_attr(busy)>{action}</button>
                </div>
            </form>
        </Modal>
    }
}
