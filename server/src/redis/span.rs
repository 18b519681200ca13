//! Spans of calls to Redis. The spans contain names of commands and scripts, but no keys and no arguments.

use redis::{Arg, Cmd};

use super::shared::{CallError, Script};
use crate::spans::{self, Span, SpanKind};

fn begin(operation: String) -> Option<Span> {
    let mut span = spans::child("call", SpanKind::Client)?;
    span.rename(operation.clone());
    span.set("db.system.name", "redis");
    span.set("db.operation.name", operation);
    Some(span)
}

/// Starts the span of a command, if a traced request is being served.
pub(super) fn of_command(cmd: &Cmd) -> Option<Span> {
    spans::current()?;
    let name = cmd.args_iter().next();
    begin(match name {
        Some(Arg::Simple(name)) => String::from_utf8_lossy(name).into_owned(),
        _ => String::new(),
    })
}

/// Starts the span of a script, if a traced request is being served.
pub(super) fn of_script(script: &Script) -> Option<Span> {
    spans::current()?;
    let mut span = begin("EVALSHA".to_owned())?;
    span.rename(format!("EVALSHA {}", script.name));
    span.set("db.stored_procedure.name", script.name);
    Some(span)
}

/// Ends a span with the call's result.
pub(super) fn end<T>(span: Option<Span>, result: &Result<T, CallError>) {
    if let (Some(mut span), Err(error)) = (span, result) {
        // The causes of the error are left out, because they may contain keys or values.
        span.fail(error.to_string());
    }
}
