//! The state of a form: whether it is being submitted, and the errors of its fields.
//!
//! Fields register themselves. An invalid field shows an error when the user leaves the field or submits the form.
//! Editing the field clears the error. If the user leaves a field by pressing a mouse button, the error appears only
//! when the button is released. Otherwise, the error could move the element that the user is clicking.

use leptos::{ev::SubmitEvent, prelude::*, task::spawn_local};

use super::focus::focus_soon;
use crate::{
    api::{CallError, CallResult, PendingCall},
    model::text::capitalized,
};

pub type Check = fn(&str) -> Result<(), &'static str>;

struct Registered {
    name: &'static str,
    value: RwSignal<String>,
    required: bool,
    check: Option<Check>,
}

#[derive(Clone, Copy)]
pub struct FormState {
    pub busy: RwSignal<bool>,
    fields: StoredValue<Vec<Registered>>,
    /// Field names with their messages.
    errors: RwSignal<Vec<(String, String)>>,
    failure: RwSignal<Option<CallError>>,
}

impl FormState {
    pub fn new() -> Self {
        Self {
            busy: RwSignal::new(false),
            fields: StoredValue::new(Vec::new()),
            errors: RwSignal::new(Vec::new()),
            failure: RwSignal::new(None),
        }
    }

    /// Registers a field. `name` is the field's name in the API.
    pub fn register(
        self,
        name: &'static str,
        value: RwSignal<String>,
        required: bool,
        check: Option<Check>,
    ) {
        self.fields.update_value(|fields| {
            fields.retain(|it| it.name != name);
            fields.push(Registered {
                name,
                value,
                required,
                check,
            });
        });
    }

    /// Clears all errors. Call before showing the form again.
    pub fn reset(self) {
        self.errors.set(Vec::new());
        self.failure.set(None);
    }

    /// Returns a submit handler that calls `submit` if every field is valid.
    pub fn on_submit(self, submit: impl Fn() + 'static) -> impl Fn(SubmitEvent) + 'static {
        move |ev| {
            ev.prevent_default();
            if self.begin() {
                submit();
            }
        }
    }

    /// Waits for the response and ends the submission. Calls `done` with the response, or shows the error.
    pub fn send<T: 'static>(self, call: PendingCall<T>, done: impl FnOnce(T) + 'static) {
        spawn_local(async move {
            if let Some(response) = self.finish(call.await) {
                done(response);
            }
        });
    }

    /// Starts a submission. If any fields are invalid, shows their errors, focuses the first of these fields, and
    /// returns `false`.
    fn begin(self) -> bool {
        let errors: Vec<_> = self.fields.with_value(|fields| {
            fields
                .iter()
                .filter_map(|it| {
                    let text = it.value.get_untracked();
                    if it.required && text.trim().is_empty() {
                        return Some((it.name.to_owned(), "Required".to_owned()));
                    }
                    let error = (it.check?)(&text).err()?;
                    Some((it.name.to_owned(), error.to_owned()))
                })
                .collect()
        });
        let is_valid = errors.is_empty();
        self.failure.set(None);
        self.errors.set(errors);
        self.busy.set(is_valid);
        if !is_valid {
            focus_first_invalid();
        }
        is_valid
    }

    /// Ends a submission. Returns the value, or shows the error and returns `None`. Can be called even after the form
    /// has been closed.
    pub fn finish<T>(self, result: CallResult<T>) -> Option<T> {
        let _ = self.busy.try_set(false);
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.reject(error);
                None
            }
        }
    }

    fn reject(self, error: CallError) {
        let has_field = |name: &str| {
            self.fields
                .try_with_value(|fields| fields.iter().any(|it| it.name == name))
                .unwrap_or_default()
        };
        let errors: Vec<_> = match &error {
            CallError::Problem(problem) => problem
                .errors
                .iter()
                .filter(|it| has_field(&it.field))
                .map(|it| (it.field.clone(), capitalized(&it.message)))
                .collect(),
            _ => Vec::new(),
        };
        if errors.is_empty() {
            let _ = self.failure.try_set(Some(error));
        } else {
            let _ = self.errors.try_set(errors);
            focus_first_invalid();
        }
    }

    /// Returns the error of the last submission if the error does not belong to a field of this form.
    pub fn failure(self) -> Signal<Option<CallError>> {
        self.failure.into()
    }

    pub fn error(self, name: &'static str) -> Option<String> {
        self.errors.with(|errors| {
            let found = errors.iter().find(|(it, _)| it == name);
            found.map(|(_, message)| message.clone())
        })
    }

    /// Validates a field when it loses focus. Empty fields are validated only on submission.
    pub fn check(self, name: &str) {
        // A field also loses focus when its form is removed, so its signals may no longer exist.
        let error = self.fields.try_with_value(|fields| {
            let field = fields.iter().find(|it| it.name == name)?;
            let text = field.value.try_get_untracked()?;
            let error = (field.check?)(&text).err()?;
            (!text.trim().is_empty()).then_some(error)
        });
        if let Some(error) = error.flatten() {
            self.clear(name);
            self.errors
                .update(|errors| errors.push((name.to_owned(), error.to_owned())));
        }
    }

    pub fn clear(self, name: &str) {
        if self
            .errors
            .with_untracked(|errors| errors.iter().any(|(it, _)| it == name))
        {
            self.errors
                .update(|errors| errors.retain(|(it, _)| it != name));
        }
    }
}

fn focus_first_invalid() {
    focus_soon(".field.invalid :is(input, select, textarea)");
}
