//! How subscriptions, invoices and payments behave, including what happens as time passes.

use serde_json::{Value, json};

use crate::{
    objects,
    state::{AfterRetries, Card, Failure, State, Timer, months_after, number, text},
};

const HOUR: i64 = 3600;
const DAY: i64 = 24 * HOUR;

/// How long a draft invoice waits for late usage.
pub const INVOICE_GRACE: i64 = HOUR;

/// The pauses between the attempts to collect a payment.
const RETRIES: [i64; 3] = [3 * DAY, 5 * DAY, 7 * DAY];

impl State {
    pub fn card(&self, customer: &str) -> Card {
        self.cards.get(customer).copied().unwrap_or_default()
    }

    /// Handles a timer. Does nothing if the timer no longer applies to its object.
    pub fn fire(&mut self, timer: Timer) {
        let is = |object: Result<&Value, Failure>, statuses: &[&str]| {
            object.is_ok_and(|it| statuses.iter().any(|status| it["status"] == *status))
        };
        match timer {
            Timer::ExpireSession(id) => {
                if is(self.find("checkout.session", &id), &["open"]) {
                    self.expire_session(&id);
                }
            }
            Timer::ExpireIncomplete(id) => {
                if is(self.find("subscription", &id), &["incomplete"]) {
                    let invoice =
                        text(&self.find("subscription", &id).expect("found")["latest_invoice"]);
                    self.set("invoice", &invoice, &json!({"status": "void"}));
                    self.set_status(&id, "incomplete_expired");
                }
            }
            Timer::TrialWillEnd(id) => {
                if let Ok(subscription) = self.find("subscription", &id).cloned()
                    && subscription["status"] == "trialing"
                {
                    self.emit("customer.subscription.trial_will_end", &subscription);
                }
            }
            Timer::TrialEnd(id) => {
                if is(self.find("subscription", &id), &["trialing"]) {
                    self.end_trial(&id);
                }
            }
            Timer::PeriodEnd(id) => {
                let now = self.now();
                let ends_now =
                    |it: &Value| number(&it["items"]["data"][0]["current_period_end"]) == Some(now);
                if self.find("subscription", &id).is_ok_and(ends_now) {
                    self.renew(&id);
                }
            }
            Timer::CancelAt(id) => {
                let now = self.now();
                let due = |it: &Value| {
                    number(&it["cancel_at"]) == Some(now) && it["status"] != "canceled"
                };
                if self.find("subscription", &id).is_ok_and(due) {
                    self.cancel(&id, "cancellation_requested");
                }
            }
            Timer::Finalize(id) => {
                if is(self.find("invoice", &id), &["draft"]) {
                    self.finalize(&id);
                }
            }
            Timer::Retry(id) => {
                if is(self.find("invoice", &id), &["open"]) {
                    self.collect(&id);
                }
            }
        }
    }

    /// Starts a subscription to the prices.
    pub fn subscribe(
        &mut self,
        customer: &str,
        prices: &[String],
        params: &Value,
    ) -> Result<Value, Failure> {
        let now = self.now();
        let id = self.id("sub");
        let trial_days = number(&params["trial_period_days"]).unwrap_or(0);
        let end = if trial_days > 0 {
            now + trial_days * DAY
        } else {
            months_after(now, 1)
        };
        let mut items = Vec::new();
        for price in prices {
            let price = self.find("price", price)?.clone();
            let item = self.id("si");
            items.push(objects::item(&item, &id, (now, end), &price));
        }
        if items.is_empty() {
            return Err(Failure::missing("items"));
        }
        let mut subscription = objects::subscription(&id, now, customer, &items, params);
        if trial_days > 0 {
            subscription["status"] = "trialing".into();
            subscription["trial_start"] = now.into();
            subscription["trial_end"] = end.into();
            subscription["billing_cycle_anchor"] = end.into();
        }
        self.add("subscription", subscription.clone());
        self.emit("customer.subscription.created", &subscription);
        if trial_days > 0 {
            self.set_timer((end - 3 * DAY).max(now), Timer::TrialWillEnd(id.clone()));
            self.set_timer(end, Timer::TrialEnd(id.clone()));
        } else {
            self.set_timer(end, Timer::PeriodEnd(id.clone()));
            self.set_timer(now + 23 * HOUR, Timer::ExpireIncomplete(id.clone()));
        }
        let invoice = self.invoice(&id, "subscription_create", (now, now));
        self.finalize(&invoice);
        if trial_days == 0 && self.find("invoice", &invoice)?["status"] == "paid" {
            self.set_status(&id, "active");
        }
        Ok(self.find("subscription", &id)?.clone())
    }

    /// Drafts an invoice for a usage period. Returns the invoice's ID.
    fn invoice(&mut self, subscription: &str, reason: &str, period: (i64, i64)) -> String {
        let id = self.id("in");
        let of = self
            .find("subscription", subscription)
            .expect("a subscription")
            .clone();
        let invoice = objects::invoice(
            &id,
            self.now(),
            "https://invoice.stripe.example",
            &of,
            reason,
            period,
        );
        self.add("invoice", invoice.clone());
        self.set("subscription", subscription, &json!({"latest_invoice": id}));
        self.emit("invoice.created", &invoice);
        id
    }

    /// Charges the usage, finalizes the invoice and, unless its `auto_advance` is false, tries to collect it. If
    /// `failing_finalizations` is not 0, only records that the finalization failed.
    pub fn finalize(&mut self, id: &str) {
        if self.failing_finalizations > 0 {
            self.failing_finalizations -= 1;
            let error = json!({"type": "invalid_request_error", "message": "The customer's address is not recognized."});
            let invoice = self.set("invoice", id, &json!({"last_finalization_error": error}));
            self.emit("invoice.finalization_failed", &invoice);
            return;
        }
        let invoice = self.find("invoice", id).expect("an invoice").clone();
        let subscription = text(&invoice["parent"]["subscription_details"]["subscription"]);
        let subscription = self
            .find("subscription", &subscription)
            .expect("a subscription")
            .clone();
        let used = (
            number(&invoice["period_start"]).unwrap_or(0),
            number(&invoice["period_end"]).unwrap_or(0),
        );
        let is_trial = subscription["status"] == "trialing";
        let mut lines = Vec::new();
        let mut total = 0;
        for item in subscription["items"]["data"]
            .as_array()
            .into_iter()
            .flatten()
        {
            let price = &item["price"];
            let unit = number(&price["unit_amount"]).unwrap_or(0);
            let metered = price["recurring"]["usage_type"] == "metered";
            let quantity = if metered {
                self.charge_usage(&subscription, &price["recurring"]["meter"], used, id)
            } else {
                1
            };
            let amount = if is_trial { 0 } else { unit * quantity };
            total += amount;
            let period = if metered {
                used
            } else {
                (
                    number(&item["current_period_start"]).unwrap_or(0),
                    number(&item["current_period_end"]).unwrap_or(0),
                )
            };
            let line = objects::Line {
                id: self.id("il"),
                price,
                amount,
                quantity,
                period,
            };
            lines.push(objects::line(&line, id));
        }
        let now = self.now();
        let mut transitions = invoice["status_transitions"].clone();
        transitions["finalized_at"] = now.into();
        let url = format!("/v1/invoices/{id}/lines");
        let invoice = self.set(
            "invoice",
            id,
            &json!({
                "status": "open", "status_transitions": transitions, "effective_at": now, "total": total,
                "amount_due": total, "amount_remaining": total, "subtotal": total,
                "last_finalization_error": null, "lines": objects::list(&url, &lines, false),
            }),
        );
        self.emit("invoice.finalized", &invoice);
        if invoice["auto_advance"] != false {
            self.collect(id);
        }
    }

    /// Charges the usage of a period to an invoice, as far as the usage has arrived. Returns the total.
    fn charge_usage(
        &mut self,
        subscription: &Value,
        meter: &Value,
        period: (i64, i64),
        invoice: &str,
    ) -> i64 {
        let event_name = self.find("billing.meter", meter.as_str().unwrap_or_default());
        let event_name = event_name.map_or(String::new(), |meter| text(&meter["event_name"]));
        let mut total = 0;
        for usage in &mut self.usage {
            if usage.invoice.is_none()
                && usage.event_name == event_name
                && subscription["customer"] == usage.customer
                && (period.0..period.1).contains(&usage.at)
            {
                usage.invoice = Some(invoice.to_owned());
                total += usage.value;
            }
        }
        total
    }

    /// Tries to collect an open invoice.
    pub fn collect(&mut self, id: &str) {
        let invoice = self.find("invoice", id).expect("an invoice").clone();
        let card = self.card(invoice["customer"].as_str().unwrap_or_default());
        if invoice["total"] == 0 || card == Card::Good {
            self.mark_paid(id);
            return;
        }
        let attempts = number(&invoice["attempt_count"]).unwrap_or(0) + 1;
        let next = usize::try_from(attempts - 1)
            .ok()
            .and_then(|n| RETRIES.get(n));
        let next = next.map(|delay| self.now() + delay);
        let invoice = self.set(
            "invoice",
            id,
            &json!({"attempted": true, "attempt_count": attempts, "next_payment_attempt": next}),
        );
        self.emit("invoice.payment_failed", &invoice);
        if card == Card::RequiresAction {
            self.emit("invoice.payment_action_required", &invoice);
        }
        let subscription = text(&invoice["parent"]["subscription_details"]["subscription"]);
        if invoice["billing_reason"] == "subscription_create" {
            return;
        }
        match next {
            Some(at) => {
                self.set_timer(at, Timer::Retry(id.to_owned()));
                self.set_status(&subscription, "past_due");
            }
            None => match self.after_retries {
                AfterRetries::Cancel => self.cancel(&subscription, "payment_failed"),
                AfterRetries::Unpaid => self.set_status(&subscription, "unpaid"),
                AfterRetries::PastDue => {}
            },
        }
    }

    /// Records the payment of an invoice. If the invoice is the subscription's latest, and the subscription is past
    /// due, unpaid or incomplete, also activates the subscription.
    pub fn mark_paid(&mut self, id: &str) {
        let invoice = self.find("invoice", id).expect("an invoice").clone();
        let mut transitions = invoice["status_transitions"].clone();
        transitions["paid_at"] = self.now().into();
        let invoice = self.set(
            "invoice",
            id,
            &json!({
                "status": "paid", "status_transitions": transitions, "amount_paid": invoice["total"],
                "amount_remaining": 0, "next_payment_attempt": null, "attempted": true,
            }),
        );
        self.emit("invoice.paid", &invoice);
        self.emit("invoice.payment_succeeded", &invoice);
        let subscription = text(&invoice["parent"]["subscription_details"]["subscription"]);
        let of = self
            .find("subscription", &subscription)
            .expect("a subscription");
        let status = text(&of["status"]);
        let is_latest = of["latest_invoice"] == id;
        match status.as_str() {
            "past_due" | "unpaid" | "incomplete" if is_latest => {
                self.set_status(&subscription, "active");
            }
            _ => {}
        }
    }

    /// Sets the status of a subscription. Records an event if the status has changed.
    pub fn set_status(&mut self, id: &str, status: &str) {
        let subscription = self.find("subscription", id).expect("a subscription");
        if subscription["status"] == status {
            return;
        }
        let subscription = self.set("subscription", id, &json!({"status": status}));
        self.emit("customer.subscription.updated", &subscription);
    }

    pub fn cancel(&mut self, id: &str, reason: &str) {
        let now = self.now();
        let subscription = self.set(
            "subscription",
            id,
            &json!({
                "status": "canceled", "canceled_at": now, "ended_at": now,
                "cancellation_details": {"comment": null, "feedback": null, "reason": reason},
            }),
        );
        self.emit("customer.subscription.deleted", &subscription);
    }

    fn end_trial(&mut self, id: &str) {
        let subscription = self
            .find("subscription", id)
            .expect("a subscription")
            .clone();
        let behavior = &subscription["trial_settings"]["end_behavior"]["missing_payment_method"];
        if self.card(subscription["customer"].as_str().unwrap_or_default()) == Card::None {
            match behavior.as_str() {
                Some("pause") => {
                    let paused = self.set("subscription", id, &json!({"status": "paused"}));
                    self.emit("customer.subscription.paused", &paused);
                    return;
                }
                Some("cancel") => {
                    self.cancel(id, "payment_failed");
                    return;
                }
                _ => {}
            }
        }
        if subscription["cancel_at_period_end"] == true {
            self.cancel(id, "cancellation_requested");
            return;
        }
        self.start_period(id, "subscription_cycle");
        self.set_status(id, "active");
        let invoice = text(&self.find("subscription", id).expect("found")["latest_invoice"]);
        self.finalize(&invoice);
    }

    /// Resumes a subscription that was paused when its trial ended without a payment method, if the invoice can be
    /// paid. Fails if the subscription is not paused.
    pub fn resume(&mut self, id: &str) -> Result<Value, Failure> {
        if self.find("subscription", id)?["status"] != "paused" {
            return Err(Failure::invalid("This subscription is not paused."));
        }
        self.start_period(id, "subscription_update");
        let invoice = text(&self.find("subscription", id)?["latest_invoice"]);
        self.finalize(&invoice);
        if self.find("invoice", &invoice)?["status"] == "paid" {
            let resumed = self.set("subscription", id, &json!({"status": "active"}));
            self.emit("customer.subscription.resumed", &resumed);
        }
        Ok(self.find("subscription", id)?.clone())
    }

    /// Starts a billing period now, and drafts the invoice for the previous period.
    fn start_period(&mut self, id: &str, reason: &str) {
        let now = self.now();
        let end = months_after(now, 1);
        let subscription = self.find_mut("subscription", id).expect("a subscription");
        let began =
            number(&subscription["items"]["data"][0]["current_period_start"]).unwrap_or(now);
        for item in subscription["items"]["data"]
            .as_array_mut()
            .into_iter()
            .flatten()
        {
            item["current_period_start"] = now.into();
            item["current_period_end"] = end.into();
        }
        self.set_timer(end, Timer::PeriodEnd(id.to_owned()));
        self.invoice(id, reason, (began, now));
    }

    fn renew(&mut self, id: &str) {
        let subscription = self
            .find("subscription", id)
            .expect("a subscription")
            .clone();
        let status = text(&subscription["status"]);
        if !matches!(status.as_str(), "active" | "past_due" | "unpaid") {
            return;
        }
        if subscription["cancel_at_period_end"] == true {
            self.cancel(id, "cancellation_requested");
            return;
        }
        self.start_period(id, "subscription_cycle");
        let renewed = self.find("subscription", id).expect("found").clone();
        self.emit("customer.subscription.updated", &renewed);
        let invoice = text(&renewed["latest_invoice"]);
        if status == "unpaid" {
            // Stripe drafts invoices for an unpaid subscription, but does not try to collect them.
            self.set("invoice", &invoice, &json!({"auto_advance": false}));
        } else {
            let at = self.now() + INVOICE_GRACE;
            self.set_timer(at, Timer::Finalize(invoice));
        }
    }

    /// Completes a Checkout Session, as if a customer had paid on its page. Returns the session.
    pub fn complete_session(
        &mut self,
        id: &str,
        card: Card,
        delayed: bool,
    ) -> Result<Value, Failure> {
        let session = self.find("checkout.session", id)?.clone();
        if session["status"] != "open" {
            return Err(Failure::invalid("This Checkout Session is no longer open."));
        }
        if card != Card::Good && !delayed {
            let mut failure = Failure::new(402, "card_error", "Your card was declined.");
            failure.body["error"]["code"] = "card_declined".into();
            return Err(failure);
        }
        let customer = text(&session["customer"]);
        // Until it is settled, a delayed payment is like a payment that the customer has not confirmed.
        let first = if delayed { Card::RequiresAction } else { card };
        self.cards.insert(customer.clone(), first);
        let items = session["_line_items"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let prices: Vec<String> = items.iter().map(|item| text(&item["price"])).collect();
        let subscription = self.subscribe(&customer, &prices, &session["_subscription_data"])?;
        let session = self.set(
            "checkout.session",
            id,
            &json!({
                "status": "complete", "payment_status": if delayed { "unpaid" } else { "paid" },
                "subscription": subscription["id"], "invoice": subscription["latest_invoice"], "url": null,
            }),
        );
        self.emit("checkout.session.completed", &session);
        Ok(session)
    }

    /// Makes the delayed payment of a Checkout Session succeed or fail. Returns the session.
    pub fn settle_session(&mut self, id: &str, succeeds: bool) -> Result<Value, Failure> {
        let session = self.find("checkout.session", id)?.clone();
        let (customer, invoice) = (text(&session["customer"]), text(&session["invoice"]));
        if succeeds {
            self.cards.insert(customer, Card::Good);
            self.mark_paid(&invoice);
            let session = self.set("checkout.session", id, &json!({"payment_status": "paid"}));
            self.emit("checkout.session.async_payment_succeeded", &session);
        } else {
            self.emit("checkout.session.async_payment_failed", &session);
        }
        Ok(self.find("checkout.session", id)?.clone())
    }

    pub fn expire_session(&mut self, id: &str) {
        let session = self.set(
            "checkout.session",
            id,
            &json!({"status": "expired", "url": null}),
        );
        self.emit("checkout.session.expired", &session);
    }
}
