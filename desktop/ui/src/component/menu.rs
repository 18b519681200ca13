//! A button with a menu of actions. Follows the ARIA Authoring Practices: arrow keys move between items, and Escape
//! closes the menu.

use leptos::{ev::KeyboardEvent, html, prelude::*};
use wasm_bindgen::JsCast;
use web_sys::{FocusEvent, HtmlElement, Node};

use super::{
    focus::after_render,
    icon::{Icon, Shape},
};

#[derive(Clone)]
pub struct MenuItem {
    pub name: &'static str,
    pub action: MenuAction,
    /// Whether to show the item as destructive.
    pub danger: bool,
}

#[derive(Clone)]
pub enum MenuAction {
    /// Goes to this URL.
    Open(String),
    Run(Callback<()>),
}

impl MenuItem {
    pub fn open(name: &'static str, address: String) -> Self {
        Self {
            name,
            action: MenuAction::Open(address),
            danger: false,
        }
    }

    pub fn run(name: &'static str, run: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            name,
            action: MenuAction::Run(Callback::new(move |()| run())),
            danger: false,
        }
    }

    pub fn danger(name: &'static str, run: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            danger: true,
            ..Self::run(name, run)
        }
    }
}

/// Returns the index of the item to focus after a key press. `at` is the index of the focused item. Returns `None` for
/// keys that do not move the focus.
fn target(key: &str, at: usize, count: usize) -> Option<usize> {
    Some(match key {
        "ArrowDown" => (at + 1) % count,
        "ArrowUp" => (at + count - 1) % count,
        "Home" => 0,
        "End" => count - 1,
        _ => return None,
    })
}

#[component]
pub fn Menu(
    #[prop(into)] label: String,
    /// Identifies the button after the list that contains it has been rendered again.
    #[prop(into)]
    focus_key: String,
    items: Vec<MenuItem>,
) -> impl IntoView {
    let open = RwSignal::new(false);
    let button = NodeRef::<html::Button>::new();
    let list = NodeRef::<html::Div>::new();
    let focus_item = move |at: usize| {
        let items = list.get_untracked().and_then(|list| {
            let items = list.query_selector_all("[role=menuitem]").ok()?;
            items.item(u32::try_from(at).ok()?)
        });
        if let Some(item) = items.and_then(|it| it.dyn_into::<HtmlElement>().ok()) {
            let _ = item.focus();
        }
    };
    let close = move || {
        open.set(false);
        if let Some(button) = button.get_untracked() {
            let _ = button.focus();
        }
    };
    let show = move |at: usize| {
        open.set(true);
        after_render(move || focus_item(at));
    };
    let count = items.len();
    let on_button_key = move |ev: KeyboardEvent| match &*ev.key() {
        "ArrowDown" => {
            ev.prevent_default();
            show(0);
        }
        "ArrowUp" => {
            ev.prevent_default();
            show(count - 1);
        }
        _ => {}
    };
    let on_item_key = move |ev: &KeyboardEvent, at: usize| match &*ev.key() {
        "Escape" => {
            ev.prevent_default();
            ev.stop_propagation();
            close();
        }
        key => {
            if let Some(next) = target(key, at, count) {
                ev.prevent_default();
                focus_item(next);
            }
        }
    };
    // Close when the user leaves the menu with Tab or with a click outside it.
    let on_focus_out = move |ev: FocusEvent| {
        let to = ev
            .related_target()
            .and_then(|it| it.dyn_into::<Node>().ok());
        // This event also fires when the menu is removed with its page, so the elements may no longer exist.
        let is_inside = [
            list.try_get_untracked().flatten().map(Node::from),
            button.try_get_untracked().flatten().map(Node::from),
        ]
        .into_iter()
        .flatten()
        .any(|it| it.contains(to.as_ref()));
        if !is_inside {
            let _ = open.try_set(false);
        }
    };
    let items = StoredValue::new(items);
    view! {
        <span class="menu-anchor" on:focusout=on_focus_out>
            <button
                type="button"
                class="button small icon-only"
                node_ref=button
                aria-label=label.clone()
                aria-haspopup="menu"
                aria-expanded=move || open.get().to_string()
                data-focus-key=focus_key
                on:click=move |_| if open.get_untracked() { close() } else { show(0) }
                on:keydown=on_button_key
            >
                <Icon shape=Shape::More/>
            </button>
            {move || {
                open.get()
                    .then(|| {
                        let rows = items
                            .get_value()
                            .into_iter()
                            .enumerate()
                            .map(|(at, MenuItem { name, action, danger })| {
                                match action {
                                    MenuAction::Open(address) => {
                                        view! {
                                            <a role="menuitem" tabindex="-1" class:danger=danger href=address on:click=move |_| open.set(false) on:keydown=move |ev| on_item_key(&ev, at)>{name}</a>
                                        }
                                            .into_any()
                                    }
                                    MenuAction::Run(run) => {
                                        let on_click = move |_| {
                                            close();
                                            run.run(());
                                        };
                                        view! {
                                            <button type="button" role="menuitem" tabindex="-1" class:danger=danger on:click=on_click on:keydown=move |ev| on_item_key(&ev, at)>{name}</button>
                                        }
                                            .into_any()
                                    }
                                }
                            })
                            .collect_view();
                        view! { <div class="menu-list" role="menu" aria-label=label.clone() node_ref=list>{rows}</div> }
                    })
            }}
        </span>
    }
}
