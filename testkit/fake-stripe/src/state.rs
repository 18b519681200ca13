//! The state of the fake Stripe: objects, the clock, timers, and pending deliveries.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::{SystemTime, UNIX_EPOCH},
};

use chrono::{DateTime, Months};
use serde_json::{Value, json};

/// The Stripe API version of the objects.
pub const API_VERSION: &str = "2026-09-30.endive";

/// A customer's payment method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Card {
    /// No payment method.
    #[default]
    None,
    Good,
    /// Every payment is declined.
    Declines,
    /// Every payment requires the customer to confirm it with the bank, and the customer never does.
    RequiresAction,
}

/// What happens to a subscription when the last attempt to collect a payment has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AfterRetries {
    #[default]
    Cancel,
    Unpaid,
    PastDue,
}

/// An error response.
#[derive(Debug, Clone)]
pub struct Failure {
    pub status: u16,
    pub body: Value,
    /// Whether the same idempotency key returns this error again. Stripe does not keep the result of a request that it
    /// did not process.
    pub kept: bool,
}

impl Failure {
    pub fn new(status: u16, kind: &str, message: &str) -> Self {
        Self {
            status,
            body: json!({"error": {"type": kind, "message": message}}),
            kept: true,
        }
    }

    pub fn invalid(message: &str) -> Self {
        Self::new(400, "invalid_request_error", message)
    }

    /// Returns the error for a missing parameter. Stripe does not process such a request, so its idempotency key
    /// remains unused.
    pub fn missing(param: &str) -> Self {
        let mut failure = Self::invalid(&format!("Missing required param: {param}."));
        failure.body["error"]["code"] = "parameter_missing".into();
        failure.body["error"]["param"] = param.into();
        failure.kept = false;
        failure
    }

    /// Returns the error for a parameter that names an unknown object.
    pub fn no_such_param(param: &str, id: &str) -> Self {
        let mut failure = Self::no_such(param, id);
        failure.status = 400;
        failure.body["error"]["param"] = param.into();
        failure
    }

    pub fn no_such(kind: &str, id: &str) -> Self {
        let mut failure = Self::invalid(&format!("No such {kind}: '{id}'"));
        failure.status = 404;
        failure.body["error"]["code"] = "resource_missing".into();
        failure
    }
}

/// A change that happens at a later time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Timer {
    ExpireSession(String),
    ExpireIncomplete(String),
    TrialWillEnd(String),
    TrialEnd(String),
    PeriodEnd(String),
    CancelAt(String),
    Finalize(String),
    Retry(String),
}

/// One use of a meter.
#[derive(Debug, Clone)]
pub struct Usage {
    pub identifier: String,
    pub event_name: String,
    pub customer: String,
    pub value: i64,
    /// When the usage occurred.
    pub at: i64,
    /// When Stripe received the meter event.
    pub received: i64,
    /// The invoice that charges the usage.
    pub invoice: Option<String>,
}

#[derive(Debug, Default)]
pub struct State {
    /// The seconds that are added to the machine's time.
    offset: i64,
    /// The time of the timer that is being processed.
    frozen: Option<i64>,
    next_id: u64,
    /// The ID of the account. `None` for the default account.
    pub account: Option<String>,
    /// The objects of each kind, in order of creation.
    objects: BTreeMap<&'static str, Vec<Value>>,
    pub cards: HashMap<String, Card>,
    pub timers: Vec<(i64, u64, Timer)>,
    pub usage: Vec<Usage>,
    /// The secrets of each webhook endpoint, each with the time when it expires, or `None` if it does not expire. The
    /// newest secret is last.
    pub secrets: HashMap<String, Vec<(String, Option<i64>)>>,
    /// The IDs of events, each with the ID of the endpoint to which the event must be delivered.
    pub outbox: VecDeque<(String, String)>,
    pub after_retries: AfterRetries,
    /// How many of the next invoices cannot be finalized.
    pub failing_finalizations: u32,
    /// The idempotency key of the request that is being processed. The events that the request causes contain the key.
    pub request_key: Option<String>,
}

/// Returns the machine's time in seconds since the Unix epoch.
#[expect(
    clippy::disallowed_methods,
    reason = "a separate program, whose clock starts at the machine's time"
)]
pub fn machine_now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |it| i64::try_from(it.as_secs()).unwrap_or(i64::MAX))
}

impl State {
    pub fn now(&self) -> i64 {
        self.frozen.unwrap_or_else(|| machine_now() + self.offset)
    }

    pub fn id(&mut self, prefix: &str) -> String {
        self.next_id += 1;
        format!("{prefix}_fake{:08}", self.next_id)
    }

    /// Changes the account. IDs are unique across all of Stripe, so objects of the new account get different numbers.
    pub fn change_account(&mut self, id: &str) {
        self.account = Some(id.to_owned());
        self.next_id += 10_000_000;
    }

    /// Moves the clock forward. Everything that becomes due happens at the time at which it is due.
    pub fn advance(&mut self, seconds: i64) {
        let end = self.now() + seconds;
        self.run_timers(end);
        self.offset += seconds;
    }

    /// Moves the clock back, for objects that begin in the past.
    pub fn set_back(&mut self, seconds: i64) {
        self.offset -= seconds;
    }

    /// Processes everything that is due at `end` or earlier.
    pub fn run_timers(&mut self, end: i64) {
        loop {
            let due = self.timers.iter().enumerate();
            let due = due.filter(|(_, (at, ..))| *at <= end);
            let Some(next) = due.min_by_key(|(_, (at, n, _))| (*at, *n)).map(|(i, _)| i) else {
                break;
            };
            let (at, _, timer) = self.timers.remove(next);
            self.frozen = Some(at);
            self.fire(timer);
            self.frozen = None;
        }
    }

    pub fn set_timer(&mut self, at: i64, timer: Timer) {
        self.next_id += 1;
        self.timers.push((at, self.next_id, timer));
    }

    pub fn add(&mut self, kind: &'static str, object: Value) -> Value {
        self.objects.entry(kind).or_default().push(object.clone());
        object
    }

    pub fn all(&self, kind: &str) -> &[Value] {
        self.objects.get(kind).map_or(&[], Vec::as_slice)
    }

    pub fn find(&self, kind: &str, id: &str) -> Result<&Value, Failure> {
        let found = self.all(kind).iter().find(|object| object["id"] == id);
        found.ok_or_else(|| Failure::no_such(kind, id))
    }

    pub fn find_mut(&mut self, kind: &str, id: &str) -> Result<&mut Value, Failure> {
        let objects = self.objects.iter_mut().find(|(name, _)| **name == kind);
        let found = objects.and_then(|(_, all)| all.iter_mut().find(|object| object["id"] == id));
        found.ok_or_else(|| Failure::no_such(kind, id))
    }

    /// Changes fields of an object. Returns the object.
    pub fn set(&mut self, kind: &str, id: &str, fields: &Value) -> Value {
        let object = self.find_mut(kind, id).expect("the object exists");
        for (name, value) in fields.as_object().expect("fields") {
            object[name] = value.clone();
        }
        object.clone()
    }

    /// Records an event about an object, and queues it for every endpoint that subscribes to it.
    pub fn emit(&mut self, kind: &str, object: &Value) -> Value {
        let id = self.id("evt");
        let event = json!({
            "id": id, "object": "event", "api_version": API_VERSION, "created": self.now(),
            "data": {"object": object}, "livemode": false, "pending_webhooks": 1,
            "request": {"id": null, "idempotency_key": self.request_key}, "type": kind,
        });
        self.publish(kind, event)
    }

    /// Records a thin event, which only refers to its object.
    pub fn emit_thin(&mut self, kind: &str, related: &Value, data: &Value) -> Value {
        let id = self.id("evt");
        let created = DateTime::from_timestamp(self.now(), 0).expect("a valid time");
        let event = json!({
            "id": id, "object": "v2.core.event", "type": kind, "created": created.to_rfc3339(), "livemode": false,
            "context": null, "reason": null, "related_object": related, "data": data,
        });
        self.publish(kind, event)
    }

    fn publish(&mut self, kind: &str, event: Value) -> Value {
        let endpoints: Vec<String> = self
            .all("webhook_endpoint")
            .iter()
            .filter(|endpoint| endpoint["status"] == "enabled")
            .filter(|endpoint| {
                let names = endpoint["enabled_events"].as_array();
                names.is_some_and(|names| names.iter().any(|name| name == kind || name == "*"))
            })
            .map(|endpoint| text(&endpoint["id"]))
            .collect();
        for endpoint in endpoints {
            self.outbox.push_back((text(&event["id"]), endpoint));
        }
        self.add("event", event)
    }
}

/// Returns a value's string, or an empty string.
pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// Returns a value as an integer: form parameters are strings, and fields of objects are numbers.
pub fn number(value: &Value) -> Option<i64> {
    value
        .as_i64()
        .or_else(|| value.as_str().and_then(|text| text.parse().ok()))
}

/// Fails if one of these parameters is missing.
pub fn required(params: &Value, names: &[&str]) -> Result<(), Failure> {
    match names.iter().find(|name| params.get(**name).is_none()) {
        Some(missing) => Err(Failure::missing(missing)),
        None => Ok(()),
    }
}

/// Returns the same day and time a number of months later.
pub fn months_after(at: i64, months: u32) -> i64 {
    let at = DateTime::from_timestamp(at, 0).expect("a valid time");
    at.checked_add_months(Months::new(months))
        .expect("a valid time")
        .timestamp()
}
