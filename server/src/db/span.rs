//! Spans of transactions and their statements. The spans contain the SQL, but no parameters.

use diesel::{
    connection::{Instrumentation, InstrumentationEvent},
    result::Error as DieselError,
};
use diesel_async::{AsyncConnection as _, AsyncPgConnection};

use crate::spans::{self, Parent, Span, SpanKind};

/// The maximum length of a statement in a span, in bytes.
const MAX_STATEMENT: usize = 4096;
/// The text after which Diesel appends the parameters when it formats a statement.
const PARAMETERS: &str = " -- binds:";

fn describe(span: &mut Span) {
    span.set("db.system.name", "postgresql");
}

/// Starts the span of a transaction, if a traced request is being served.
pub(super) fn of_transaction() -> Option<Span> {
    let mut span = spans::child("transaction", SpanKind::Client)?;
    describe(&mut span);
    Some(span)
}

/// Records each statement of the transaction as a child of the transaction's span.
pub(super) fn trace_statements(conn: &mut AsyncPgConnection, transaction: &Span) {
    conn.set_instrumentation(Statements {
        transaction: transaction.as_parent().clone(),
        current: None,
    });
}

/// Must be called before a connection with traced statements is used for another transaction.
pub(super) fn stop_tracing(conn: &mut AsyncPgConnection) {
    conn.set_instrumentation(None::<Statements>);
}

struct Statements {
    transaction: Parent,
    current: Option<Span>,
}

impl Instrumentation for Statements {
    fn on_connection_event(&mut self, event: InstrumentationEvent<'_>) {
        match event {
            InstrumentationEvent::StartQuery { .. } => {
                let mut span = self.transaction.child("statement", SpanKind::Client);
                describe(&mut span);
                self.current = Some(span);
            }
            InstrumentationEvent::FinishQuery { query, error, .. } => {
                if let Some(span) = self.current.take() {
                    finish(span, &query.to_string(), error);
                }
            }
            _ => {}
        }
    }
}

fn finish(mut span: Span, text: &str, error: Option<&DieselError>) {
    let text = without_parameters(text);
    let operation = operation(text);
    span.rename(operation.clone());
    span.set("db.operation.name", operation);
    span.set("db.query.text", shorten(text).to_owned());
    if let Some(error) = error {
        // The message is left out, because it may contain values.
        let kind = match error {
            DieselError::DatabaseError(kind, _) => format!("{kind:?}"),
            _ => "Error".to_owned(),
        };
        span.set("error.type", kind.clone());
        span.fail(kind);
    }
}

fn without_parameters(text: &str) -> &str {
    text.split(PARAMETERS).next().unwrap_or_default()
}

/// Returns the first keyword of a statement.
fn operation(text: &str) -> String {
    let end = |c: char| !c.is_ascii_alphabetic();
    let word = text.trim_start().split(end).next().unwrap_or_default();
    word.to_ascii_uppercase()
}

fn shorten(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_STATEMENT)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statement_is_named_by_its_first_keyword() {
        assert_eq!(operation("BEGIN; SET LOCAL ROLE quota_system"), "BEGIN");
        assert_eq!(operation("\n  select 1"), "SELECT");
        assert_eq!(operation("COMMIT"), "COMMIT");
        assert_eq!(operation(""), "");
    }

    #[test]
    fn parameters_are_removed_and_long_statements_are_shortened() {
        let text = "SELECT $1 -- binds: [\"hunter2\"]";
        assert_eq!(without_parameters(text), "SELECT $1");
        assert_eq!(without_parameters("SELECT 1"), "SELECT 1");
        let long = "ä".repeat(MAX_STATEMENT);
        assert_eq!(shorten(&long).len(), MAX_STATEMENT);
        assert_eq!(shorten("short"), "short");
    }
}
