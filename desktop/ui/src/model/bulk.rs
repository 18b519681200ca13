//! Descriptions of bulk actions on API keys.

use super::text::{count, enumerated, quoted};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BulkAction {
    Activate,
    Deactivate,
    Delete,
}

impl BulkAction {
    pub const ALL: [Self; 3] = [Self::Activate, Self::Deactivate, Self::Delete];

    pub const fn label(self) -> &'static str {
        match self {
            Self::Activate => "Activate",
            Self::Deactivate => "Deactivate",
            Self::Delete => "Delete",
        }
    }

    const fn past_participle(self) -> &'static str {
        match self {
            Self::Activate => "activated",
            Self::Deactivate => "deactivated",
            Self::Delete => "deleted",
        }
    }

    /// Returns the label of the confirm button.
    pub fn button(self, keys: usize) -> String {
        format!("{} {}", self.label(), count_keys(keys))
    }

    pub fn title(self, keys: usize) -> String {
        format!("{}?", self.button(keys))
    }

    /// Returns the text that the user must type to confirm the action. Returns `None` for an action that does not
    /// interrupt clients.
    pub fn phrase(self, keys: usize) -> Option<String> {
        (self != Self::Activate).then(|| self.button(keys).to_ascii_lowercase())
    }

    /// Describes the effect on clients. `recently_used` is the number of keys that were used in the last day.
    pub fn consequences(self, names: &[&str], recently_used: usize) -> String {
        let shown = names.len().min(4);
        let mut list: Vec<String> = names[..shown].iter().map(|name| quoted(name)).collect();
        if names.len() > shown {
            list.push(format!("{} more", names.len() - shown));
        }
        let list = enumerated(&list);
        let usage = match (names.len(), recently_used) {
            (1, 0) => "The key wasn't used in the last 24 hours.".to_owned(),
            (1, _) => "The key was used in the last 24 hours.".to_owned(),
            (_, 0) => "None of the keys were used in the last 24 hours.".to_owned(),
            (_, 1) => "1 of the keys was used in the last 24 hours.".to_owned(),
            (_, n) => format!("{n} of the keys were used in the last 24 hours."),
        };
        let keys = if names.len() == 1 {
            "this key"
        } else {
            "these keys"
        };
        match self {
            Self::Activate => {
                let they = if names.len() == 1 {
                    "it has"
                } else {
                    "they have"
                };
                format!(
                    "{list}: Within a second, requests with {keys} will be accepted again, unless {they} expired."
                )
            }
            Self::Deactivate => format!(
                "{list}: Within a second, requests with {keys} will be rejected (401). You can activate {keys} again later. {usage}"
            ),
            Self::Delete => format!(
                "{list}: Within a second, requests with {keys} will be rejected (401). This can't be undone. {usage}"
            ),
        }
    }

    /// Describes the result. If the action failed for some keys, includes the last error.
    pub fn outcome(self, done: usize, failed: usize, error: &str) -> String {
        let done = format!("{} {}", count_keys(done), self.past_participle());
        match failed {
            0 => done,
            n => format!("{done}, {n} failed: {error}"),
        }
    }
}

pub fn moved(done: usize, plan: &str, failed: usize, error: &str) -> String {
    let done = format!("{} moved to {}", count_keys(done), quoted(plan));
    match failed {
        0 => done,
        n => format!("{done}, {n} failed: {error}"),
    }
}

fn count_keys(keys: usize) -> String {
    count(keys as u64, "key", "keys")
}

/// Returns whether the user has typed the phrase. Ignores case, thousands separators, and extra spaces.
pub fn is_phrase(typed: &str, phrase: &str) -> bool {
    let words = |text: &str| {
        text.replace(',', "")
            .to_ascii_lowercase()
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
    fn disruptive_actions_need_a_typed_phrase() {
        assert_eq!(BulkAction::Activate.phrase(3), None);
        let phrase = BulkAction::Delete.phrase(3);
        assert_eq!(phrase.as_deref(), Some("delete 3 keys"));
        let one = BulkAction::Deactivate.phrase(1);
        assert_eq!(one.as_deref(), Some("deactivate 1 key"));
        assert!(is_phrase(" Delete  3 keys ", "delete 3 keys"));
        assert!(!is_phrase("delete 2 keys", "delete 3 keys"));
        assert!(!is_phrase("", "delete 3 keys"));
        let many = BulkAction::Delete.phrase(1000).expect("a phrase");
        assert_eq!(many, "delete 1,000 keys");
        assert!(is_phrase("delete 1000 keys", &many));
    }

    #[test]
    fn consequences_name_the_keys_and_their_recent_use() {
        let text = BulkAction::Delete.consequences(&["a", "b", "c", "d", "e", "f"], 2);
        assert!(
            text.starts_with(&quoted("a")) && text.contains(" and 2 more: "),
            "{text}"
        );
        assert!(text.ends_with("2 of the keys were used in the last 24 hours."));
        let text = BulkAction::Deactivate.consequences(&["a"], 0);
        assert!(
            text.starts_with(&format!("{}: ", quoted("a"))) && text.ends_with("last 24 hours."),
            "{text}"
        );
    }

    #[test]
    fn move_names_the_plan() {
        assert_eq!(
            moved(1, "Pro", 0, ""),
            format!("1 key moved to {}", quoted("Pro"))
        );
        let text = moved(2, "Pro", 1, "Not found.");
        assert!(text.ends_with(", 1 failed: Not found."), "{text}");
    }

    #[test]
    fn outcome_reports_failures() {
        assert_eq!(BulkAction::Activate.outcome(1, 0, ""), "1 key activated");
        assert_eq!(
            BulkAction::Delete.outcome(2, 1, "Not found."),
            "2 keys deleted, 1 failed: Not found."
        );
    }
}
