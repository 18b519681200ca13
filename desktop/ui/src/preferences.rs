//! Preferences that are stored in this browser and never sent to the server.

use leptos::prelude::*;

#[derive(Clone, Copy)]
pub struct Preferences {
    /// `system`, `light`, or `dark`.
    pub theme: RwSignal<String>,
    /// Whether single-key shortcuts are on. Users of speech input must be able to turn these shortcuts off (WCAG
    /// 2.1.4).
    pub shortcuts: RwSignal<bool>,
}

pub fn preferences() -> Preferences {
    expect_context()
}

fn stored(name: &str) -> Option<String> {
    window().local_storage().ok()??.get_item(name).ok()?
}

fn store(name: &str, value: &str) {
    if let Ok(Some(storage)) = window().local_storage() {
        let _ = storage.set_item(name, value);
    }
}

/// Returns the ID of the tenant's newest quota alert that the user has seen in this browser.
pub fn seen_alert(tenant: &str) -> Option<String> {
    stored(&format!("seen-alert-{tenant}"))
}

pub fn set_seen_alert(tenant: &str, id: &str) {
    store(&format!("seen-alert-{tenant}"), id);
}

impl Preferences {
    pub fn provide() -> Self {
        let preferences = Self {
            theme: RwSignal::new(stored("theme").unwrap_or_else(|| "system".to_owned())),
            shortcuts: RwSignal::new(stored("shortcuts").as_deref() != Some("off")),
        };
        provide_context(preferences);
        preferences
    }

    pub fn set_theme(self, theme: &str) {
        self.theme.set(theme.to_owned());
        store("theme", theme);
        if let Some(root) = document().document_element() {
            let _ = root.set_attribute("data-theme", theme);
        }
    }

    pub fn set_shortcuts(self, on: bool) {
        self.shortcuts.set(on);
        store("shortcuts", if on { "on" } else { "off" });
    }
}
