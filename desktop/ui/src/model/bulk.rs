//! What is done to many API keys at once, in words.

use super::text::{count, named};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    Activate,
    Deactivate,
    Delete,
}

impl Deed {
    pub const ALL: [Self; 3] = [Self::Activate, Self::Deactivate, Self::Delete];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Activate => "Activate",
            Self::Deactivate => "Deactivate",
            Self::Delete => "Delete",
        }
    }

    const fn done(self) -> &'static str {
        match self {
            Self::Activate => "activated",
            Self::Deactivate => "deactivated",
            Self::Delete => "deleted",
        }
    }

    pub fn title(self, keys: usize) -> String {
        format!("{} {}?", self.name(), count_of(keys))
    }

    /// What is typed to confirm it; nothing for what breaks nothing.
    pub fn phrase(self, keys: usize) -> Option<String> {
        let phrase = format!("{} {}", self.name(), count_of(keys)).to_ascii_lowercase();
        (self != Self::Activate).then_some(phrase)
    }

    /// What it comes to for those who hold the keys, of which some were used in the last day.
    pub fn breaks(self, names: &[&str], in_use: usize) -> String {
        let shown = names.len().min(4);
        let mut list: Vec<String> = names[..shown].iter().map(|name| named(name)).collect();
        if names.len() > shown {
            list.push(format!("{} more", names.len() - shown));
        }
        let list = match &list[..] {
            [] => String::new(),
            [one] => one.clone(),
            [most @ .., last] => format!("{} and {last}", most.join(", ")),
        };
        let used = match in_use {
            0 => "None of them was used in the last day.".to_owned(),
            n => format!("{n} of them had requests in the last day."),
        };
        match self {
            Self::Activate => {
                format!(
                    "{list}: within a second their requests are let in again, as their plans say."
                )
            }
            Self::Deactivate => format!(
                "{list}: within a second every request with them is refused with 401. They can be switched on again. {used}"
            ),
            Self::Delete => format!(
                "{list}: within a second every request with them is refused with 401. Keys that are deleted do not come back. {used}"
            ),
        }
    }

    /// What has come of it, and why some could not be done.
    pub fn outcome(self, done: usize, failed: usize, why: &str) -> String {
        let told = format!(
            "{} {} {}.",
            count_of(done),
            if done == 1 { "is" } else { "are" },
            self.done()
        );
        match failed {
            0 => told,
            n => format!("{told} {n} could not be: {why}"),
        }
    }
}

fn count_of(keys: usize) -> String {
    count(keys as u64, "key", "keys")
}

/// Whether what was typed is what had to be, but for case and space around it.
pub fn is_phrase(typed: &str, phrase: &str) -> bool {
    let words = |text: &str| {
        text.to_ascii_lowercase()
            .split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    words(typed) == words(phrase)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_breaks_something_has_to_be_typed() {
        assert_eq!(Deed::Activate.phrase(3), None);
        assert_eq!(Deed::Delete.phrase(3).as_deref(), Some("delete 3 keys"));
        let one = Deed::Deactivate.phrase(1);
        assert_eq!(one.as_deref(), Some("deactivate 1 key"));
        assert!(is_phrase(" Delete  3 keys ", "delete 3 keys"));
        assert!(!is_phrase("delete 2 keys", "delete 3 keys"));
        assert!(!is_phrase("", "delete 3 keys"));
        // A thousand is written with a narrow space, which nobody types.
        let many = Deed::Delete.phrase(1000).expect("a phrase");
        assert!(is_phrase("delete 1 000 keys", &many));
    }

    #[test]
    fn what_will_break_names_keys_and_their_use() {
        let text = Deed::Delete.breaks(&["a", "b", "c", "d", "e", "f"], 2);
        assert!(
            text.starts_with("\u{2068}a\u{2069}, ") && text.contains(" and 2 more: "),
            "{text}"
        );
        assert!(text.ends_with("2 of them had requests in the last day."));
        let text = Deed::Deactivate.breaks(&["a"], 0);
        assert!(text.starts_with("\u{2068}a\u{2069}: "), "{text}");
    }

    #[test]
    fn what_failed_is_told() {
        assert_eq!(Deed::Activate.outcome(1, 0, ""), "1 key is activated.");
        assert_eq!(
            Deed::Delete.outcome(2, 1, "Not found."),
            "2 keys are deleted. 1 could not be: Not found."
        );
    }
}
