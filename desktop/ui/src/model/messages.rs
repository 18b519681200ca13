//! Short messages, shown one at a time.

/// An error that was shown for at least this many milliseconds counts as read.
const READ_MS: i64 = 3000;
/// The maximum number of messages, including the one on the page. Older messages are dropped.
const MAX_MESSAGES: usize = 3;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message<A> {
    pub id: u32,
    pub text: String,
    pub request_id: Option<String>,
    pub is_error: bool,
    /// An action that the message offers.
    pub action: Option<A>,
    /// The time when the message was added, in milliseconds since the Unix epoch.
    pub added_at: i64,
}

/// Messages, oldest first. The page shows the last message.
#[derive(Debug, Clone)]
pub struct Messages<A>(Vec<Message<A>>);

impl<A: Clone> Messages<A> {
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Shows a message, and removes earlier success messages. If the new message is a success message, also removes the
    /// errors that the user has had time to read.
    pub fn add(&mut self, message: Message<A>) {
        self.0.retain(|it| {
            it.is_error && (message.is_error || message.added_at - it.added_at < READ_MS)
        });
        self.0.push(message);
        self.0.drain(..self.0.len().saturating_sub(MAX_MESSAGES));
    }

    pub fn remove(&mut self, id: u32) {
        self.0.retain(|it| it.id != id);
    }

    /// Removes the messages of the page that the user has left. Messages with an action remain, because actions work on
    /// any page.
    pub fn leave_page(&mut self) {
        self.0.retain(|it| it.action.is_some());
    }

    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the message to show, and the number of messages behind it.
    pub fn shown(&self) -> Option<(Message<A>, usize)> {
        let (last, waiting) = self.0.split_last()?;
        Some((last.clone(), waiting.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(id: u32, is_error: bool, added_at: i64) -> Message<()> {
        Message {
            id,
            text: format!("Message {id}"),
            request_id: None,
            is_error,
            action: None,
            added_at,
        }
    }

    fn shown(messages: &Messages<()>) -> Option<(u32, usize)> {
        messages.shown().map(|(it, waiting)| (it.id, waiting))
    }

    #[test]
    fn latest_message_is_shown_and_errors_wait_behind_it() {
        let mut messages = Messages::new();
        assert_eq!(shown(&messages), None);
        messages.add(message(1, false, 0));
        messages.add(message(2, false, 10));
        assert_eq!(shown(&messages), Some((2, 0)));
        for id in 3..9 {
            messages.add(message(id, true, 10_000 * i64::from(id)));
        }
        assert_eq!(shown(&messages), Some((8, 2)));
        messages.remove(8);
        assert_eq!(shown(&messages), Some((7, 1)));
    }

    #[test]
    fn error_does_not_come_back_after_a_success() {
        let mut messages = Messages::new();
        messages.add(message(1, true, 0));
        messages.add(message(2, false, READ_MS));
        messages.remove(2);
        assert!(messages.is_empty());
        // An error that the user has not had time to read is shown again after the success message.
        messages.add(message(3, true, 10_000));
        messages.add(message(4, false, 10_500));
        assert_eq!(shown(&messages), Some((4, 1)));
        messages.remove(4);
        assert_eq!(shown(&messages), Some((3, 0)));
    }

    #[test]
    fn only_messages_with_an_action_are_kept_on_another_page() {
        let mut messages = Messages::new();
        messages.add(message(1, true, 0));
        messages.leave_page();
        assert!(messages.is_empty());
        messages.add(Message {
            action: Some(()),
            ..message(2, false, 0)
        });
        messages.leave_page();
        assert_eq!(shown(&messages), Some((2, 0)));
    }
}
