//! What can be done from anywhere: found in the palette, and most of it by keys alone.

/// What a command does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// To this address of the console.
    Go(&'static str),
    /// To where API keys are searched.
    Search,
    Theme(&'static str),
    /// Shows the keys.
    Help,
    SignOut,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Command {
    pub name: &'static str,
    /// Characters to type one after the other; none: by the palette alone.
    pub keys: &'static str,
    pub action: Action,
}

const fn command(name: &'static str, keys: &'static str, action: Action) -> Command {
    Command { name, keys, action }
}

pub const COMMANDS: &[Command] = &[
    command("Go to home", "gh", Action::Go("/console")),
    command("Go to plans", "gp", Action::Go("/console/plans")),
    command("Go to API keys", "gk", Action::Go("/console/api-keys")),
    command(
        "Go to service tokens",
        "gt",
        Action::Go("/console/service-tokens"),
    ),
    command("Go to audit", "ga", Action::Go("/console/audit")),
    command("Go to settings", "gs", Action::Go("/console/settings")),
    command("Make a plan", "np", Action::Go("/console/plans?new=1")),
    command(
        "Make an API key",
        "nk",
        Action::Go("/console/api-keys?new=1"),
    ),
    command(
        "Make a service token",
        "nt",
        Action::Go("/console/service-tokens?new=1"),
    ),
    command("Search API keys", "/", Action::Search),
    command("Show keyboard shortcuts", "?", Action::Help),
    command("Use the light theme", "", Action::Theme("light")),
    command("Use the dark theme", "", Action::Theme("dark")),
    command("Use the system's theme", "", Action::Theme("system")),
    command("Sign out", "", Action::SignOut),
];

/// The commands whose names hold every word that is typed. They are plain English: the case of other letters would
/// be tables to load.
pub fn matching(typed: &str) -> impl Iterator<Item = &'static Command> {
    let typed = typed.to_ascii_lowercase();
    COMMANDS.iter().filter(move |command| {
        let name = command.name.to_ascii_lowercase();
        typed.split_whitespace().all(|word| name.contains(word))
    })
}

/// What has been typed of a shortcut so far.
#[derive(Debug, Default)]
pub struct Keys {
    first: Option<(char, i64)>,
}

impl Keys {
    /// A second key counts with the first within this time, in milliseconds.
    pub const PATIENCE: i64 = 1500;

    /// Takes a key by its name, such as `g` or `Shift`, and tells what is done.
    pub fn press(&mut self, key: &str, now: i64) -> Option<Action> {
        let mut chars = key.chars();
        // Keys with longer names are no characters; Shift comes before some that are.
        let (Some(typed), None) = (chars.next(), chars.next()) else {
            return None;
        };
        let first = self
            .first
            .take()
            .filter(|(_, at)| now - at <= Self::PATIENCE)
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
        found.map(|command| command.action)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_shortcut_begins_another() {
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
    fn two_keys_in_time_are_a_shortcut() {
        let mut keys = Keys::default();
        assert_eq!(keys.press("g", 0), None);
        assert_eq!(
            keys.press("p", 900),
            Some(Action::Go("/console/plans")),
            "in time"
        );
        assert_eq!(keys.press("p", 1000), None, "the first is used up");
        assert_eq!(keys.press("g", 2000), None);
        assert_eq!(keys.press("p", 4000), None, "too late");
        assert_eq!(keys.press("?", 4100), Some(Action::Help));
    }

    #[test]
    fn keys_that_are_no_characters_change_nothing() {
        let mut keys = Keys::default();
        assert_eq!(keys.press("n", 0), None);
        assert_eq!(keys.press("Shift", 10), None);
        assert_eq!(keys.press("", 20), None);
        let plan = Some(Action::Go("/console/plans?new=1"));
        assert_eq!(keys.press("p", 30), plan);
        assert_eq!(keys.press("ü", 40), None);
    }

    #[test]
    fn commands_are_found_by_words_in_any_order() {
        let found = |typed| matching(typed).map(|it| it.name).collect::<Vec<_>>();
        assert_eq!(found("KEY make"), ["Make an API key"]);
        assert_eq!(found(" theme  dark "), ["Use the dark theme"]);
        assert_eq!(found("").len(), COMMANDS.len());
        assert!(found("xyz").is_empty());
    }
}
