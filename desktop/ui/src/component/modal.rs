//! Dialogs, by the browser's own `<dialog>`: it keeps the focus inside and gives it back.

use leptos::{
    ev::{KeyboardEvent, SubmitEvent},
    html,
    prelude::*,
};

use super::{Field, focus::rescue_focus, held::held};
use crate::model::bulk::is_phrase;

#[component]
pub fn Modal(
    open: RwSignal<bool>,
    #[prop(into)] title: Signal<String>,
    /// Stays open until something in it is done: neither Escape nor another address closes it, because what would
    /// go with it does not come back.
    #[prop(optional, into)]
    firm: Signal<bool>,
    #[prop(optional)] wide: bool,
    /// Its title is heard and not seen.
    #[prop(optional)]
    bare: bool,
    children: ChildrenFn,
) -> impl IntoView {
    let dialog = NodeRef::<html::Dialog>::new();
    Effect::new(move |_| {
        let is_open = open.get();
        let Some(dialog) = dialog.get() else { return };
        if is_open && !dialog.open() {
            let _ = dialog.show_modal();
        } else if !is_open && dialog.open() {
            dialog.close();
            rescue_focus();
        }
    });
    view! {
        <dialog
            node_ref=dialog
            class="modal"
            class:wide=wide
            class:bare=bare
            aria-label=move || title.get()
            data-firm=move || firm.get().then_some("")
            // Told a moment later, when it may have been opened again.
            on:close=move |_| {
                if dialog.get_untracked().is_none_or(|dialog| !dialog.open()) {
                    open.set(false);
                }
            }
            on:cancel=move |ev: web_sys::Event| {
                if firm.get_untracked() {
                    ev.prevent_default();
                }
            }
            // A browser may give up asking and close at the second Escape, so it never gets to see one.
            on:keydown=move |ev: KeyboardEvent| {
                if firm.get_untracked() && ev.key() == "Escape" {
                    ev.prevent_default();
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

/// Asks before something is done that cannot be undone, and says what it will break.
#[component]
pub fn Confirm(
    open: RwSignal<bool>,
    #[prop(into)] title: Signal<String>,
    #[prop(into)] breaks: Signal<String>,
    /// What the button says.
    #[prop(into)]
    action: Signal<String>,
    /// What has to be typed first.
    #[prop(optional, into)]
    phrase: MaybeProp<String>,
    busy: RwSignal<bool>,
    #[prop(into)] failure: Signal<Option<String>>,
    run: Callback<()>,
) -> impl IntoView {
    let typed = RwSignal::new(String::new());
    Effect::new(move |_| {
        if open.get() {
            typed.set(String::new());
        }
    });
    let missing = move || {
        let phrase = phrase.get();
        phrase.is_some_and(|phrase| typed.with(|typed| !is_phrase(typed, &phrase)))
    };
    let submit = move |ev: SubmitEvent| {
        ev.prevent_default();
        if !missing() {
            run.run(());
        }
    };
    view! {
        <Modal open title>
            <form on:submit=submit>
                <p>{breaks}</p>
                <super::Alert text=failure/>
                {move || phrase.get().map(|phrase| view! { <Field id="phrase" label=format!("Type “{phrase}” to confirm") value=typed/> })}
                <div class="actions end">
                    <button type="button" class="button" autofocus on:click=move |_| open.set(false)>"Cancel"</button>
                    <button class="button danger" disabled=missing aria-disabled=held(busy)>{action}</button>
                </div>
            </form>
        </Modal>
    }
}
