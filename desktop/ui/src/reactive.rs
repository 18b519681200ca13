//! Effects and memos with boxed closures. Without boxing, the download would contain a copy of the reactive graph's
//! code for each closure.

use leptos::prelude::*;

/// Runs a closure after the current task, and again whenever a signal that the closure reads changes.
pub fn effect(run: impl Fn() + 'static) {
    boxed_effect(Box::new(run));
}

fn boxed_effect(run: Box<dyn Fn()>) {
    Effect::new(move |_| run());
}

/// Returns a memo that notifies its readers only when the string changes.
pub fn text_memo(of: impl Fn() -> String + Send + Sync + 'static) -> Memo<String> {
    boxed_text_memo(Box::new(of))
}

fn boxed_text_memo(of: Box<dyn Fn() -> String + Send + Sync>) -> Memo<String> {
    Memo::new(move |_| of())
}

/// Returns a memo that notifies its readers only when the condition changes.
pub fn flag_memo(of: impl Fn() -> bool + Send + Sync + 'static) -> Memo<bool> {
    boxed_flag_memo(Box::new(of))
}

fn boxed_flag_memo(of: Box<dyn Fn() -> bool + Send + Sync>) -> Memo<bool> {
    Memo::new(move |_| of())
}
