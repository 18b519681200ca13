//! Dialogs, by the browser's own `<dialog>`: it keeps the focus inside and gives it back.

use leptos::{html, prelude::*};

#[component]
pub fn Modal(
    open: RwSignal<bool>,
    #[prop(into)] title: Signal<String>,
    /// Stays open until something in it is done: Escape does not close it.
    #[prop(optional)]
    firm: bool,
    #[prop(optional)] wide: bool,
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
        }
    });
    view! {
        <dialog
            node_ref=dialog
            class="modal"
            class:wide=wide
            aria-label=move || title.get()
            on:close=move |_| open.set(false)
            on:cancel=move |ev: web_sys::Event| {
                if firm {
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
    busy: RwSignal<bool>,
    #[prop(into)] failure: Signal<Option<String>>,
    run: Callback<()>,
) -> impl IntoView {
    view! {
        <Modal open title>
            <p>{breaks}</p>
            <super::Alert text=failure/>
            <div class="actions end">
                <button class="button" autofocus on:click=move |_| open.set(false)>"Cancel"</button>
                <button class="button danger" disabled=busy on:click=move |_| run.run(())>
                    {action}
                </button>
            </div>
        </Modal>
    }
}
