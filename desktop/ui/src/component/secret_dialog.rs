//! Shows a new secret, which the server returns only once.

use leptos::{prelude::*, task::spawn_local};

use super::{copy::CodeBlock, modal::Modal};
use crate::{api, host};

/// A new secret, and the name of the key, token, or webhook that it belongs to.
#[derive(Clone, Copy)]
pub struct NewSecret {
    pub name: RwSignal<String>,
    pub secret: RwSignal<String>,
    open: RwSignal<bool>,
    saved: RwSignal<bool>,
    /// What the user tried to do before saving the secret.
    leaving: RwSignal<Option<Leaving>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Leaving {
    Close,
    /// Quitting the desktop app.
    Quit,
}

impl NewSecret {
    pub fn new() -> Self {
        Self {
            name: RwSignal::new(String::new()),
            secret: RwSignal::new(String::new()),
            open: RwSignal::new(false),
            saved: RwSignal::new(false),
            leaving: RwSignal::new(None),
        }
    }

    /// Opens the dialog. Does nothing if the user has left the page that owns the dialog.
    pub fn show(self, name: String, secret: Option<String>) {
        let _ = self.name.try_set(name);
        let _ = self.secret.try_set(secret.unwrap_or_default());
        let _ = self.saved.try_set(false);
        let _ = self.leaving.try_set(None);
        let _ = self.open.try_set(true);
    }
}

/// A dialog that cannot be closed until the user has copied the secret or confirmed saving it. Until then, Escape shows
/// a warning.
#[component]
pub fn SecretDialog(
    new: NewSecret,
    #[prop(into)] title: Signal<String>,
    /// `key`, `token`, or `secret`.
    noun: &'static str,
    /// A sentence that tells the user what to do if the secret is lost.
    recovery: &'static str,
    #[prop(optional)] on_close: Option<Callback<()>>,
    children: ChildrenFn,
) -> impl IntoView {
    let NewSecret {
        open,
        secret,
        saved,
        leaving,
        ..
    } = new;
    let close = move || {
        open.set(false);
        secret.set(String::new());
        if let Some(on_close) = on_close {
            on_close.run(());
        }
    };
    let on_escape = Callback::new(move |()| {
        if saved.get_untracked() {
            close();
        } else {
            leaving.set(Some(Leaving::Close));
        }
    });
    host::on_quit(move || leaving.set(Some(Leaving::Quit)));
    view! {
        <Modal open locked=true wide=true title on_escape>
            <p>{format!("You won't see this {noun} again. {recovery}")}</p>
            <CodeBlock id="secret" text=secret what=noun on_copied=Callback::new(move |()| saved.set(true))/>
            {children()}
            <div role="alert">
                {move || {
                    let how = leaving.get().filter(|_| !saved.get())?;
                    let (verb, action) = match how {
                        Leaving::Close => ("close", "Close without saving"),
                        Leaving::Quit => ("quit", "Quit without saving"),
                    };
                    let leave = move |_| match how {
                        Leaving::Close => close(),
                        Leaving::Quit => spawn_local(api::quit()),
                    };
                    Some(
                        view! {
                            <div class="alert warn">
                                <p>{format!("You haven't saved this {noun}. Copy it before you {verb}.")}</p>
                                <button type="button" class="button small" on:click=leave>{action}</button>
                            </div>
                        },
                    )
                }}
            </div>
            // The desktop app looks for this attribute before it quits.
            <div class="actions end saved" data-unsaved=move || (!saved.get()).then_some("")>
                <label class="check">
                    <input type="checkbox" name="saved" bind:checked=saved/>
                    <span>{format!("I've saved this {noun}")}</span>
                </label>
                <button
                    type="button"
                    class="button primary"
                    aria-disabled=move || (!saved.get()).then_some("true")
                    aria-describedby="secret-hint"
                    on:click=move |_| close()
                >
                    "Done"
                </button>
            </div>
            <p id="secret-hint" class="muted small-text end-note">
                {move || if saved.get() { String::new() } else { format!("Copy the {noun}, or confirm that you've saved it.") }}
            </p>
        </Modal>
    }
}
