//! Commands that are available on every page, through the palette or a keyboard shortcut.

use super::{address::ConsolePage, role::Right};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Goes to this path in the console.
    Go(&'static str),
    /// Focuses the search field for API keys.
    Search,
    Theme(&'static str),
    /// Lists the keyboard shortcuts.
    Help,
    SignOut,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Command {
    pub name: &'static str,
    /// Keys to press one after the other. Empty if the command has no shortcut.
    pub keys: &'static str,
    pub action: Action,
}

impl Command {
    /// Returns the right that the command requires.
    pub fn right(&self) -> Right {
        match self.action {
            Action::Go(address) if address.ends_with("?new=1") => Right::Manage,
            Action::Go(address) => {
                let path = address.split('?').next().unwrap_or_default();
                ConsolePage::of(path).right().0
            }
            Action::Search => Right::Read,
            Action::Theme(_) | Action::Help | Action::SignOut => Right::Any,
        }
    }
}

const fn command(name: &'static str, keys: &'static str, action: Action) -> Command {
    Command { name, keys, action }
}

pub const COMMANDS: &[Command] = &[
    command("Go to Home", "gh", Action::Go("/console")),
    command("Go to Usage", "gu", Action::Go("/console/usage")),
    command("Go to Alerts", "gl", Action::Go("/console/alerts")),
    command("Go to Plans", "gp", Action::Go("/console/plans")),
    command("Go to API keys", "gk", Action::Go("/console/api-keys")),
    command(
        "Go to Service tokens",
        "gt",
        Action::Go("/console/service-tokens"),
    ),
    command("Go to Webhooks", "gw", Action::Go("/console/webhooks")),
    command("Go to Audit log", "ga", Action::Go("/console/audit")),
    command("Go to Billing", "gb", Action::Go("/console/billing")),
    command("Go to Settings", "gs", Action::Go("/console/settings")),
    command("Create plan", "np", Action::Go("/console/plans?new=1")),
    command(
        "Create API key",
        "nk",
        Action::Go("/console/api-keys?new=1"),
    ),
    command(
        "Create service token",
        "nt",
        Action::Go("/console/service-tokens?new=1"),
    ),
    command(
        "Create webhook",
        "nw",
        Action::Go("/console/webhooks?new=1"),
    ),
    command("Open live tail", "", Action::Go("/console/usage?live=1")),
    command("Search API keys", "/", Action::Search),
    command("Show keyboard shortcuts", "?", Action::Help),
    command("Use light theme", "", Action::Theme("light")),
    command("Use dark theme", "", Action::Theme("dark")),
    command("Use system theme", "", Action::Theme("system")),
    command("Sign out", "", Action::SignOut),
];

/// Returns the commands whose names contain all typed words. Ignores case only for ASCII letters: Unicode case tables
/// would make the download larger.
pub fn matching(typed: &str) -> impl Iterator<Item = &'static Command> + use<'_> {
    COMMANDS
        .iter()
        .filter(move |command| contains_words(command.name, typed))
}

pub fn contains_words(name: &str, typed: &str) -> bool {
    let (name, typed) = (name.to_ascii_lowercase(), typed.to_ascii_lowercase());
    typed.split_whitespace().all(|word| name.contains(word))
}

/// Remembers the first key of a shortcut until the second key is pressed.
#[derive(Debug, Default)]
pub struct Keys {
    first: Option<(char, i64)>,
}

impl Keys {
    /// The longest pause between two keys of a shortcut, in milliseconds.
    pub const MAX_PAUSE: i64 = 1500;

    /// Handles a key, such as `g` or `Shift`. Returns the command if the key completes a shortcut.
    pub fn press(&mut self, key: &str, now: i64) -> Option<&'static Command> {
        let mut chars = key.chars();
        // Ignore keys that do not type a character, such as the Shift before a `?`.
        let (Some(typed), None) = (chars.next(), chars.next()) else {
            return None;
        };
        let first = self
            .first
            .take()
            .filter(|(_, at)| now - at <= Self::MAX_PAUSE)
            .map(|(first, _)| first);
        let is =
            |keys: &str, first: Option<char>| keys.chars().eq(first.into_iter().chain([typed]));
        let found = COMMANDS
            .iter()
            .find(|command| is(command.keys, first))
            .or_else(|| COMMANDS.iter().find(|command| is(command.keys, None)));
        if found.is_none() {
            self.first = Some((typed, now));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_shortcut_is_a_prefix_of_another() {
        for (at, one) in COMMANDS.iter().enumerate() {
            for other in &COMMANDS[at + 1..] {
                let both = !one.keys.is_empty() && !other.keys.is_empty();
                assert!(!both || !one.keys.starts_with(other.keys), "{one:?}");
                assert!(!both || !other.keys.starts_with(one.keys), "{other:?}");
            }
            assert!(one.keys.chars().count() <= 2, "{one:?}");
        }
    }

    #[test]
    fn two_keys_in_quick_succession_are_a_shortcut() {
        let mut keys = Keys::default();
        let mut press = |key, at| keys.press(key, at).map(|command| command.action);
        assert_eq!(press("g", 0), None);
        let plans = Some(Action::Go("/console/plans"));
        assert_eq!(press("p", 900), plans, "in time");
        assert_eq!(press("p", 1000), None, "the first key was already used");
        assert_eq!(press("g", 2000), None);
        assert_eq!(press("p", 4000), None, "too late");
        assert_eq!(press("?", 4100), Some(Action::Help));
    }

    #[test]
    fn keys_without_a_character_are_ignored() {
        let mut keys = Keys::default();
        let mut press = |key, at| keys.press(key, at).map(|command| command.action);
        assert_eq!(press("n", 0), None);
        assert_eq!(press("Shift", 10), None);
        assert_eq!(press("", 20), None);
        let plan = Some(Action::Go("/console/plans?new=1"));
        assert_eq!(press("p", 30), plan);
        assert_eq!(press("ü", 40), None);
    }

    #[test]
    fn command_requires_the_right_of_its_page() {
        let named = |right| {
            let all = COMMANDS.iter().filter(|command| command.right() == right);
            all.map(|command| command.name).collect::<Vec<_>>()
        };
        assert_eq!(named(Right::Bill), ["Go to Billing"]);
        assert_eq!(
            named(Right::Manage),
            [
                "Create plan",
                "Create API key",
                "Create service token",
                "Create webhook",
            ]
        );
        assert_eq!(
            named(Right::Read),
            [
                "Go to Plans",
                "Go to API keys",
                "Go to Service tokens",
                "Go to Webhooks",
                "Go to Audit log",
                "Search API keys",
            ]
        );
    }

    #[test]
    fn commands_match_words_in_any_order() {
        let found = |typed| matching(typed).map(|it| it.name).collect::<Vec<_>>();
        assert_eq!(found("KEY create"), ["Create API key"]);
        assert_eq!(found(" theme  dark "), ["Use dark theme"]);
        assert_eq!(found("").len(), COMMANDS.len());
        assert!(found("xyz").is_empty());
    }
}
