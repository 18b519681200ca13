//! A stateful stand-in for Stripe, for tests and for trying out billing without an account.
//!
//! The fake has the endpoints that Quota uses, and returns complete objects of the API version that the `async-stripe`
//! crates pin. It supports idempotency keys, signed webhooks with redelivery, renewals, failed payments and their
//! retries, and usage that arrives late. Its clock can be moved forward. Requests can fail before or after they take
//! effect. The fake also serves its own Checkout page and customer portal.
//!
//! Every API request that is received over HTTP is validated against Stripe's own description of its parameters.
//!
//! The fake shares no code with Quota, so that a mistake in one is not repeated in the other.
#![recursion_limit = "512"]

mod api;
mod document;
mod engine;
mod form;
mod http;
mod meter;
mod objects;
mod page;
mod state;
mod webhook;

use std::{io, sync::Arc, time::Duration};

use hyper::Method;
use serde_json::Value;
use tokio::{net::TcpListener, task::JoinHandle};

use crate::{api::Call, http::Shared, state::State};
pub use crate::{
    engine::INVOICE_GRACE,
    http::{Fault, How, Received, SECRET_KEY, When},
    state::{API_VERSION, AfterRetries, Card, Failure, Usage, machine_now},
    webhook::{Delivery, Signature, sign},
};

/// A running fake Stripe. When dropped, the fake stops, and then panics if it has received a request that Stripe would
/// not accept.
pub struct FakeStripe {
    shared: Arc<Shared>,
    client: reqwest::Client,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for FakeStripe {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
        let invalid = self.take_invalid();
        if !std::thread::panicking() {
            assert!(
                invalid.is_empty(),
                "Stripe does not accept these requests: {invalid:#?}"
            );
        }
    }
}

impl FakeStripe {
    /// Starts a fake Stripe on a free port. Events are queued until [`deliver_all`](Self::deliver_all) sends them or
    /// [`take_queued`](Self::take_queued) removes them.
    pub async fn start() -> io::Result<Self> {
        Self::start_on("127.0.0.1:0").await
    }

    /// Starts a fake Stripe on an address.
    pub async fn start_on(address: &str) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let shared = Arc::new(Shared::new(format!("http://{}", listener.local_addr()?)));
        let client = reqwest::Client::builder()
            .timeout(Duration::from_secs(20))
            .no_proxy()
            .build()
            .map_err(io::Error::other)?;
        let tasks = vec![tokio::spawn(http::serve(listener, shared.clone()))];
        Ok(Self {
            shared,
            client,
            tasks,
        })
    }

    /// From now on, delivers events as soon as they happen.
    pub fn deliver_immediately(&mut self) {
        let (shared, client) = (self.shared.clone(), self.client.clone());
        self.tasks
            .push(tokio::spawn(webhook::deliver_queued(shared, client)));
    }

    /// Returns the base URL for clients, which is also the base of the fake's pages.
    pub fn url(&self) -> &str {
        &self.shared.base
    }

    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.shared.state.lock();
        let now = state.now();
        state.run_timers(now);
        act(&mut state)
    }

    /// Executes a request without HTTP, such as `("POST", "subscriptions/sub_1/resume", …)`.
    pub fn request(&self, method: &Method, path: &str, form: &str) -> Result<Value, Failure> {
        let segments: Vec<&str> = path.split('/').collect();
        let params = form::parse(form);
        let call = Call {
            method,
            path: &segments,
            params: &params,
            base: &self.shared.base,
        };
        self.with(|state| state.call(&call))
    }

    // Changes at Stripe ---------------------------------------------------------------------------

    /// Returns the fake's time in seconds since the Unix epoch.
    pub fn now(&self) -> i64 {
        self.with(|state| state.now())
    }

    /// Moves the clock forward, and runs everything that becomes due.
    pub fn advance(&self, time: Duration) {
        let seconds = i64::try_from(time.as_secs()).unwrap_or(0);
        self.with(|state| state.advance(seconds));
    }

    /// Moves the clock back. Call this before there are any objects.
    pub fn set_back(&self, time: Duration) {
        let seconds = i64::try_from(time.as_secs()).unwrap_or(0);
        self.with(|state| state.set_back(seconds));
    }

    /// Changes the fake's account ID to `id`. From then on, the IDs of new objects differ from those of other accounts.
    pub fn set_account(&self, id: &str) {
        self.with(|state| state.change_account(id));
    }

    /// Sets the payment method of a customer.
    pub fn set_card(&self, customer: &str, card: Card) {
        self.with(|state| state.cards.insert(customer.to_owned(), card));
    }

    /// Sets what happens to subscriptions when the last attempt to collect a payment has failed.
    pub fn after_retries(&self, outcome: AfterRetries) {
        self.with(|state| state.after_retries = outcome);
    }

    /// Makes the finalization of the next `count` invoices fail.
    pub fn fail_finalizations(&self, count: u32) {
        self.with(|state| state.failing_finalizations = count);
    }

    /// Completes a Checkout Session, as a customer with this card would. With `delayed`, the payment takes days:
    /// [`settle_checkout`](Self::settle_checkout) determines the outcome.
    pub fn pay_checkout(&self, session: &str, card: Card, delayed: bool) -> Result<Value, Failure> {
        self.with(|state| state.complete_session(session, card, delayed))
    }

    pub fn settle_checkout(&self, session: &str, succeeds: bool) -> Result<Value, Failure> {
        self.with(|state| state.settle_session(session, succeeds))
    }

    // Current state -------------------------------------------------------------------------------------

    /// Returns all objects of a kind, such as `customer` or `checkout.session`, oldest first.
    pub fn all(&self, kind: &str) -> Vec<Value> {
        self.with(|state| state.all(kind).to_vec())
    }

    /// Returns an object. Panics if the object does not exist.
    pub fn get(&self, kind: &str, id: &str) -> Value {
        self.with(|state| state.find(kind, id).cloned())
            .expect("the object exists")
    }

    /// Returns all usage, in order of arrival.
    pub fn usage(&self) -> Vec<Usage> {
        self.with(|state| state.usage.clone())
    }

    /// Returns all requests that have arrived.
    pub fn received(&self) -> Vec<Received> {
        self.shared.received.lock().clone()
    }

    /// Removes and returns what was wrong with requests, according to Stripe's description of its API.
    pub fn take_invalid(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.invalid.lock())
    }

    // Faults --------------------------------------------------------------------------------------------

    /// Applies `fault` to the next request to a path with this prefix.
    pub fn fail_next(&self, path: &str, fault: Fault) {
        self.shared.faults.lock().push((path.to_owned(), fault));
    }

    /// Sets a function that chooses a fault for each request, by method and path.
    pub fn choose_faults(&self, choose: impl FnMut(&str, &str) -> Option<Fault> + Send + 'static) {
        *self.shared.choose.lock() = Some(Box::new(choose));
    }

    /// Ends all faults.
    pub fn heal(&self) {
        self.shared.faults.lock().clear();
        *self.shared.choose.lock() = None;
    }

    // Webhooks ------------------------------------------------------------------------------------------

    /// Adds a webhook endpoint for all events. Returns its ID and secret.
    pub fn add_endpoint(&self, url: &str) -> (String, String) {
        let form = format!("url={url}&enabled_events[0]=*");
        let endpoint = self.request(&Method::POST, "webhook_endpoints", &form);
        let endpoint = endpoint.expect("a valid endpoint");
        (
            state::text(&endpoint["id"]),
            state::text(&endpoint["secret"]),
        )
    }

    /// Changes the URL of an endpoint.
    pub fn move_endpoint(&self, endpoint: &str, url: &str) {
        self.with(|state| {
            state.set(
                "webhook_endpoint",
                endpoint,
                &serde_json::json!({"url": url}),
            )
        });
    }

    /// Rotates the secret of an endpoint. For a day, webhooks are signed with both secrets. Returns the new secret.
    pub fn rotate_secret(&self, endpoint: &str) -> String {
        self.with(|state| state.rotate_secret(endpoint))
    }

    /// Removes the queued events. Returns the IDs of each event and its endpoint, oldest event first.
    pub fn take_queued(&self) -> Vec<(String, String)> {
        self.with(|state| state.outbox.drain(..).collect())
    }

    /// Delivers one event to an endpoint. Returns the status of the response, or 0 if there is none.
    pub async fn deliver(&self, event: &str, endpoint: &str, delivery: &Delivery) -> u16 {
        let (url, (body, signature)) = self.with(|state| {
            let url = state
                .find("webhook_endpoint", endpoint)
                .map(|it| state::text(&it["url"]));
            (
                url.expect("the endpoint exists"),
                state.signed(event, endpoint, delivery),
            )
        });
        webhook::send(&self.client, &url, body, signature).await
    }

    /// Returns the body and the signature of a delivery, without sending it.
    pub fn signed(
        &self,
        event: &str,
        endpoint: &str,
        delivery: &Delivery,
    ) -> (String, Option<String>) {
        self.with(|state| state.signed(event, endpoint, delivery))
    }

    /// Delivers each queued event once, in order. Returns the statuses of the responses.
    pub async fn deliver_all(&self) -> Vec<u16> {
        let mut statuses = Vec::new();
        for (event, endpoint) in self.take_queued() {
            statuses.push(self.deliver(&event, &endpoint, &Delivery::default()).await);
        }
        statuses
    }
}
