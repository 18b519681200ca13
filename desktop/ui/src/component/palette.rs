//! The command palette, the keyboard shortcuts, and the help dialog that lists them.

use leptos::{
    ev::{self, KeyboardEvent},
    prelude::*,
    task::spawn_local,
};
use quota_common::{
    ApiKeyId, PlanId,
    call::{KeyFilter, PageOf},
    page::{MAX_LIMIT, PlanOrder},
};
use wasm_bindgen::JsCast;
use web_sys::Element;

use super::{
    focus::focus_soon,
    icon::{Icon, Shape},
    modal::Modal,
};
use crate::{
    api,
    clock::now,
    model::{
        address::Query,
        command::{Action, COMMANDS, Command, Keys, contains_words, matching},
        role::Right,
        text::quoted,
    },
    preferences::{Preferences, preferences},
    reactive::effect,
    route::{Route, route},
};

/// Maximum number of API keys in the palette. The same limit applies to plans.
const MAX_FOUND: u32 = 5;
/// How long the user must stop typing before the palette searches.
const DEBOUNCE_MS: u32 = 200;

#[derive(Clone, Copy)]
pub struct Commands {
    palette: RwSignal<bool>,
    help: RwSignal<bool>,
    sign_out: Callback<()>,
    /// Returns whether the user has a right. Commands for which the user lacks the right are hidden.
    has: Callback<Right, bool>,
    route: Route,
    preferences: Preferences,
}

fn is_mac() -> bool {
    let platform = window().navigator().platform();
    platform.is_ok_and(|platform| platform.starts_with("Mac") || platform.starts_with("iP"))
}

fn palette_shortcut() -> &'static str {
    if is_mac() { "⌘ K" } else { "Ctrl K" }
}

impl Commands {
    pub fn new(sign_out: Callback<()>, has: Callback<Right, bool>) -> Self {
        let commands = Self {
            palette: RwSignal::new(false),
            help: RwSignal::new(false),
            sign_out,
            has,
            route: route(),
            preferences: preferences(),
        };
        let keys = StoredValue::new(Keys::default());
        let listener = window_event_listener(ev::keydown, move |ev| commands.on_keydown(&ev, keys));
        on_cleanup(move || listener.remove());
        commands
    }

    fn on_keydown(self, ev: &KeyboardEvent, keys: StoredValue<Keys>) {
        // Ignores keys while a dialog is open, because the dialog handles its own keys, and while an input method
        // editor is composing text.
        let dialog = document().query_selector("dialog[open]").ok().flatten();
        if dialog.is_some() || ev.default_prevented() || ev.is_composing() {
            return;
        }
        let has_modifier = ev.ctrl_key() || ev.meta_key();
        if has_modifier && !ev.alt_key() && !ev.shift_key() && ev.key().eq_ignore_ascii_case("k") {
            ev.prevent_default();
            return self.palette.set(true);
        }
        if has_modifier
            || ev.alt_key()
            || is_in_field(ev)
            || !self.preferences.shortcuts.get_untracked()
        {
            return;
        }
        let command = keys.try_update_value(|keys| keys.press(&ev.key(), now()));
        if let Some(command) = command.flatten().filter(|it| self.allows(it)) {
            ev.prevent_default();
            self.run(command.action);
        }
    }

    fn allows(self, command: &Command) -> bool {
        untrack(|| self.has.run(command.right()))
    }

    fn run(self, action: Action) {
        let route = self.route;
        match action {
            Action::Go(to) => route.go(to),
            Action::Search => {
                if route.path.get_untracked() != "/console/api-keys" {
                    route.go("/console/api-keys");
                }
                focus_soon("#search");
            }
            Action::Theme(theme) => self.preferences.set_theme(theme),
            Action::Help => self.help.set(true),
            Action::SignOut => self.sign_out.run(()),
        }
    }
}

/// Returns whether the key was pressed in a text field.
fn is_in_field(ev: &KeyboardEvent) -> bool {
    const FIELDS: &str =
        "input:not([type=checkbox]):not([type=radio]), textarea, select, [contenteditable]";
    let target = ev.target().and_then(|it| it.dyn_into::<Element>().ok());
    target.is_some_and(|it| it.closest(FIELDS).ok().flatten().is_some())
}

#[component]
pub fn PaletteButton(commands: Commands) -> impl IntoView {
    view! {
        <button class="button palette-button" aria-keyshortcuts="Control+K Meta+K" on:click=move |_| commands.palette.set(true)>
            <Icon shape=Shape::Search/>
            <span>"Search or jump to…"</span>
            <kbd aria-hidden="true">{palette_shortcut()}</kbd>
        </button>
    }
}

#[derive(Clone, PartialEq)]
enum Choice {
    Command(&'static str, &'static str, Action),
    Key(ApiKeyId, String),
    Plan(PlanId, String),
    SearchFor(String),
}

impl Choice {
    fn text(&self) -> String {
        match self {
            Self::Command(name, ..) => (*name).to_owned(),
            Self::Key(_, name) | Self::Plan(_, name) => name.clone(),
            Self::SearchFor(text) => format!("Search API keys for {}", quoted(text)),
        }
    }
}

#[component]
pub fn CommandsView(commands: Commands) -> impl IntoView {
    view! {
        <Modal open=commands.palette title="Search or jump to…" bare=true>
            <Palette commands/>
        </Modal>
        <Modal open=commands.help title="Keyboard shortcuts">
            <Help commands/>
            <div class="actions end">
                <button class="button" autofocus on:click=move |_| commands.help.set(false)>"Close"</button>
            </div>
        </Modal>
    }
}

#[component]
fn Palette(commands: Commands) -> impl IntoView {
    let typed = RwSignal::new(String::new());
    let keys = RwSignal::new(Vec::<Choice>::new());
    let plans = RwSignal::new(Vec::<(PlanId, String)>::new());
    let can_read = untrack(|| commands.has.run(Right::Read));
    spawn_local(async move {
        if !can_read {
            return;
        }
        let page = PageOf {
            limit: Some(MAX_LIMIT),
            cursor: None,
        };
        // If this fails, the palette still lists commands and keys.
        if let Ok(page) = api::list_plans(Some(PlanOrder::Name), page).await {
            let names = page.items.into_iter().map(|plan| (plan.id, plan.name));
            let _ = plans.try_set(names.collect());
        }
    });
    let selected = RwSignal::new(0_usize);
    let choices = Signal::derive(move || {
        let text = typed.get();
        let text = text.trim();
        let mut choices: Vec<Choice> = matching(text)
            .filter(|command| commands.allows(command))
            .map(|it| Choice::Command(it.name, it.keys, it.action))
            .collect();
        choices.extend(keys.get());
        if !text.is_empty() && can_read {
            choices.extend(plans.with(|plans| {
                let found = plans.iter().filter(|(_, name)| contains_words(name, text));
                let found = found.take(MAX_FOUND as usize);
                found
                    .map(|(id, name)| Choice::Plan(*id, name.clone()))
                    .collect::<Vec<_>>()
            }));
            choices.push(Choice::SearchFor(text.to_owned()));
        }
        choices
    });
    let latest = StoredValue::new(0_u32);
    effect(move || {
        let text = typed.get();
        selected.set(0);
        latest.update_value(|latest| *latest = latest.wrapping_add(1));
        let own = latest.get_value();
        if text.trim().is_empty() || !can_read {
            return keys.set(Vec::new());
        }
        spawn_local(async move {
            gloo_timers::future::TimeoutFuture::new(DEBOUNCE_MS).await;
            if latest.try_get_value() != Some(own) {
                return;
            }
            let filter = KeyFilter {
                search: Some(text.trim().to_owned()),
                ..KeyFilter::default()
            };
            let page = PageOf {
                limit: Some(MAX_FOUND),
                cursor: None,
            };
            // If this fails, the palette still lists commands.
            let found = api::list_api_keys(filter, page).await;
            if latest.try_get_value() == Some(own) {
                let found = found.map(|page| page.items).unwrap_or_default();
                let found = found.into_iter().map(|key| Choice::Key(key.id, key.name));
                let _ = keys.try_set(found.collect());
            }
        });
    });
    let run = move |choice: Choice| {
        commands.palette.set(false);
        let route = commands.route;
        // Closing the palette restores focus. The action must run later, so that it can move focus elsewhere.
        set_timeout(
            move || match choice {
                Choice::Command(.., action) => commands.run(action),
                Choice::Key(id, _) => route.go(&format!("/console/api-keys/{id}")),
                Choice::Plan(id, _) => route.go(&format!("/console/api-keys?plan_id={id}")),
                Choice::SearchFor(text) => {
                    let query = Query::default().with("search", &text);
                    route.go(&format!("/console/api-keys{query}"));
                }
            },
            std::time::Duration::ZERO,
        );
    };
    let on_keydown = move |ev: KeyboardEvent| {
        let count = choices.with(Vec::len);
        let at = selected.get_untracked();
        match &*ev.key() {
            "ArrowDown" if count > 0 => selected.set((at + 1) % count),
            "ArrowUp" if count > 0 => selected.set((at + count - 1) % count),
            "Enter" if !ev.is_composing() => {
                if let Some(choice) = choices.with(|choices| choices.get(at).cloned()) {
                    run(choice);
                }
            }
            _ => return,
        }
        ev.prevent_default();
    };
    focus_soon(".palette-input");
    effect(move || {
        let choice = document().get_element_by_id(&format!("choice-{}", selected.get()));
        if let Some(choice) = choice {
            choice.scroll_into_view_with_bool(false);
        }
    });
    view! {
        <input
            class="palette-input"
            type="text"
            role="combobox"
            dir="auto"
            aria-label="Type a command or the name of an API key or plan"
            aria-expanded="true"
            aria-controls="palette"
            aria-activedescendant=move || format!("choice-{}", selected.get())
            autocomplete="off"
            maxlength="200"
            placeholder="Type a command or the name of an API key or plan"
            bind:value=typed
            on:keydown=on_keydown
        />
        <ul class="palette" id="palette" role="listbox" aria-label="Commands">
            {move || {
                choices
                    .get()
                    .into_iter()
                    .enumerate()
                    .map(|(at, choice)| {
                        let (text, keys) = (choice.text(), match &choice {
                            Choice::Command(_, keys, _) => *keys,
                            _ => "",
                        });
                        let kind = match &choice {
                            Choice::Key(..) => Some("API key"),
                            Choice::Plan(..) => Some("Plan"),
                            _ => None,
                        };
                        view! {
                            <li
                                id=format!("choice-{at}")
                                role="option"
                                aria-selected=move || (selected.get() == at).to_string()
                                on:mousemove=move |_| selected.set(at)
                                on:click=move |_| run(choice.clone())
                            >
                                <span class="clamp" dir="auto">{text}</span>
                                {kind.map(|kind| view! { <span class="badge">{kind}</span> })}
                                <Keycaps keys/>
                            </li>
                        }
                    })
                    .collect_view()
            }}
        </ul>
    }
}

/// Shows keys that the user presses one after the other.
#[component]
fn Keycaps(keys: &'static str) -> impl IntoView {
    view! {
        <span class="keycaps">{keys.chars().map(|key| view! { <kbd>{key.to_string()}</kbd> }).collect_view()}</span>
    }
}

#[component]
fn Help(commands: Commands) -> impl IntoView {
    let preferences = commands.preferences;
    view! {
        <table class="shortcuts">
            <caption class="visually-hidden">"Keyboard shortcuts"</caption>
            <tbody>
                <tr><th scope="row">"Search or jump to…"</th><td><kbd>{palette_shortcut()}</kbd></td></tr>
                {COMMANDS
                    .iter()
                    .filter(|command| !command.keys.is_empty() && commands.allows(command))
                    .map(|command| view! { <tr><th scope="row">{command.name}</th><td><Keycaps keys=command.keys/></td></tr> })
                    .collect_view()}
                <tr><th scope="row">"Close dialog"</th><td><kbd>"Esc"</kbd></td></tr>
            </tbody>
        </table>
        <label class="check">
            <input
                type="checkbox"
                name="shortcuts"
                prop:checked=move || preferences.shortcuts.get()
                on:change=move |ev| preferences.set_shortcuts(event_target_checked(&ev))
            />
            <span>"Single-key shortcuts"</span>
        </label>
        <p class="muted small-text">"Single-key shortcuts are off while you type in a field."</p>
    }
}
