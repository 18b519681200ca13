//! The endpoints, and the effect of each request on the state.

use hyper::Method;
use serde_json::{Value, json};

use crate::{
    objects,
    state::{Failure, State, Timer, number, required, text},
};

/// The objects that [`State::collection`] can create: the path, the type, and the required parameters.
const CREATED: [(&str, &str, &[&str]); 5] = [
    ("customers", "customer", &[]),
    ("products", "product", &["name"]),
    ("prices", "price", &["currency", "product", "recurring"]),
    (
        "meters",
        "billing.meter",
        &["default_aggregation", "display_name", "event_name"],
    ),
    (
        "webhook_endpoints",
        "webhook_endpoint",
        &["enabled_events", "url"],
    ),
];

/// A request that has passed authentication.
pub struct Call<'a> {
    pub method: &'a Method,
    /// The path without `/v1`.
    pub path: &'a [&'a str],
    /// The parameters in the form or in the query string.
    pub params: &'a Value,
    /// The base URL of the fake Stripe, for links to its pages.
    pub base: &'a str,
}

impl State {
    /// Executes a request.
    pub fn call(&mut self, call: &Call<'_>) -> Result<Value, Failure> {
        let is_get = call.method == Method::GET;
        let is_post = call.method == Method::POST;
        let params = call.params;
        match call.path {
            ["account"] if is_get => Ok(objects::account(self.account.as_deref())),
            ["checkout", "sessions"] if is_post => self.create_session(call),
            ["checkout", "sessions", id] if is_get => {
                Ok(visible(self.find("checkout.session", id)?))
            }
            ["checkout", "sessions", id, "expire"] if is_post => {
                if self.find("checkout.session", id)?["status"] != "open" {
                    return Err(Failure::invalid(
                        "Only open Checkout Sessions can be expired.",
                    ));
                }
                self.expire_session(id);
                Ok(visible(self.find("checkout.session", id)?))
            }
            ["billing_portal", "sessions"] if is_post => {
                required(params, &["customer"])?;
                self.active_customer(params)?;
                let id = self.id("bps");
                let session = objects::portal_session(&id, self.now(), call.base, params);
                Ok(self.add("billing_portal.session", session))
            }
            ["billing", "meter_events"] if is_post => self.use_meter(params),
            ["billing", "meters", id, "event_summaries"] if is_get => self.summaries(id, params),
            ["billing", rest @ ..] => self.collection(call, rest),
            ["customers", id] if call.method == Method::DELETE => self.delete_customer(id),
            ["subscriptions"] if is_get => {
                // A deleted customer's subscriptions can be listed too.
                if let Some(customer) = params["customer"].as_str()
                    && self.find("customer", customer).is_err()
                {
                    return Err(Failure::no_such_param("customer", customer));
                }
                self.collection(call, call.path)
            }
            ["subscriptions", id] if is_post => self.update_subscription(id, params),
            ["subscriptions", id] if call.method == Method::DELETE => {
                if self.find("subscription", id)?["status"] == "canceled" {
                    return Err(Failure::no_such("subscription", id));
                }
                self.cancel(id, "cancellation_requested");
                Ok(self.find("subscription", id)?.clone())
            }
            ["subscriptions", id, "resume"] if is_post => self.resume(id),
            ["subscriptions"] if is_post => {
                required(params, &["customer", "items"])?;
                let customer = text(&params["customer"]);
                self.find("customer", &customer)?;
                let items = params["items"].as_array().cloned().unwrap_or_default();
                let prices: Vec<String> = items.iter().map(|item| text(&item["price"])).collect();
                self.subscribe(&customer, &prices, params)
            }
            ["invoices", id, "pay"] if is_post => {
                if self.find("invoice", id)?["status"] != "open" {
                    return Err(Failure::invalid("Only open invoices can be paid."));
                }
                self.collect(id);
                Ok(self.find("invoice", id)?.clone())
            }
            ["invoices", id, "finalize"] if is_post => {
                if self.find("invoice", id)?["status"] != "draft" {
                    return Err(Failure::invalid("Only draft invoices can be finalized."));
                }
                self.finalize(id);
                Ok(self.find("invoice", id)?.clone())
            }
            path => self.collection(call, path),
        }
    }

    /// Checks that the customer in the parameters, if any, exists and has not been deleted.
    fn active_customer(&self, params: &Value) -> Result<(), Failure> {
        let Some(customer) = params["customer"].as_str() else {
            return Ok(());
        };
        match self.find("customer", customer) {
            Ok(found) if found["deleted"] != true => Ok(()),
            _ => Err(Failure::no_such_param("customer", customer)),
        }
    }

    /// Deletes a customer, which cancels its subscriptions.
    fn delete_customer(&mut self, id: &str) -> Result<Value, Failure> {
        self.find("customer", id)?;
        let subscriptions: Vec<String> = self
            .all("subscription")
            .iter()
            .filter(|it| it["customer"] == id && it["ended_at"].is_null())
            .map(|it| text(&it["id"]))
            .collect();
        for subscription in subscriptions {
            self.cancel(&subscription, "cancellation_requested");
        }
        let deleted = self.set("customer", id, &json!({"deleted": true, "metadata": {}}));
        self.emit("customer.deleted", &deleted);
        Ok(json!({"id": id, "object": "customer", "deleted": true}))
    }

    /// Creates, updates, retrieves or lists objects, if no special rules apply.
    fn collection(&mut self, call: &Call<'_>, path: &[&str]) -> Result<Value, Failure> {
        let (name, id) = match path {
            [name] => (*name, None),
            [name, id] => (*name, Some(*id)),
            _ => return Err(unknown(call)),
        };
        let read_only = [
            ("subscriptions", "subscription"),
            ("invoices", "invoice"),
            ("events", "event"),
        ];
        let created = CREATED.iter().find(|(path, ..)| *path == name);
        let listed = read_only.iter().find(|(path, _)| *path == name);
        let kind = match (created, listed) {
            (Some((_, kind, _)), _) | (_, Some((_, kind))) => *kind,
            _ => return Err(unknown(call)),
        };
        match (call.method, id, created) {
            (&Method::GET, Some(id), _) => self.retrieve(kind, id, call.params),
            (&Method::GET, None, _) => Ok(self.list(kind, call)),
            (&Method::POST, None, Some((_, _, needed))) => {
                required(call.params, needed)?;
                self.create(kind, call.params)
            }
            (&Method::POST, Some(id), Some(_)) => {
                self.find(kind, id)?;
                let fields = call.params.as_object().into_iter().flatten();
                let fields = fields.map(|(name, value)| match value.as_str() {
                    Some("true") => (name.clone(), true.into()),
                    Some("false") => (name.clone(), false.into()),
                    _ => (name.clone(), value.clone()),
                });
                let fields = Value::Object(fields.collect());
                Ok(self.set(kind, id, &fields))
            }
            _ => Err(unknown(call)),
        }
    }

    fn create(&mut self, kind: &'static str, params: &Value) -> Result<Value, Failure> {
        let now = self.now();
        match kind {
            "customer" => {
                let id = self.id("cus");
                let customer = self.add(kind, objects::customer(&id, now, params));
                self.emit("customer.created", &customer);
                Ok(customer)
            }
            "product" => {
                let id = params.get("id").map_or_else(|| self.id("prod"), text);
                if self.find(kind, &id).is_ok() {
                    return Err(exists("Product already exists."));
                }
                Ok(self.add(kind, objects::product(&id, now, params)))
            }
            "price" => {
                self.find("product", params["product"].as_str().unwrap_or_default())?;
                if params["recurring"]["usage_type"] == "metered" {
                    let meter = params["recurring"]["meter"].as_str();
                    // In 2025, Stripe removed metered prices without a meter.
                    self.find(
                        "billing.meter",
                        meter.ok_or_else(|| Failure::missing("recurring[meter]"))?,
                    )?;
                }
                let key = params.get("lookup_key");
                if key.is_some_and(|key| self.all(kind).iter().any(|it| it["lookup_key"] == *key)) {
                    return Err(exists("A price already uses that lookup key."));
                }
                let id = self.id("price");
                Ok(self.add(kind, objects::price(&id, now, params)))
            }
            "billing.meter" => {
                let name = &params["event_name"];
                let is_used = |it: &Value| it["event_name"] == *name && it["status"] == "active";
                if self.all(kind).iter().any(is_used) {
                    return Err(exists(
                        "An active meter with this event name already exists.",
                    ));
                }
                let id = self.id("mtr");
                Ok(self.add(kind, objects::meter(&id, now, params)))
            }
            _ => {
                let id = self.id("we");
                let secret = format!("whsec_{}", self.id("secret"));
                self.secrets
                    .insert(id.clone(), vec![(secret.clone(), None)]);
                let mut endpoint = self.add(kind, objects::webhook_endpoint(&id, now, params));
                // The secret is shown only once.
                endpoint["secret"] = secret.into();
                Ok(endpoint)
            }
        }
    }

    fn retrieve(&self, kind: &str, id: &str, params: &Value) -> Result<Value, Failure> {
        let object = self.find(kind, id)?;
        if object["deleted"] == true {
            return Ok(json!({"id": id, "object": kind, "deleted": true}));
        }
        Ok(self.expanded(object, &params["expand"], ""))
    }

    /// Returns the object. If `expand` requests it, the object contains the latest invoice instead of the invoice's ID.
    fn expanded(&self, object: &Value, expand: &Value, prefix: &str) -> Value {
        let mut object = object.clone();
        let wanted = format!("{prefix}latest_invoice");
        let is_wanted = |paths: &Vec<Value>| paths.iter().any(|path| *path == wanted);
        if expand.as_array().is_some_and(is_wanted)
            && let Ok(invoice) = self.find(
                "invoice",
                object["latest_invoice"].as_str().unwrap_or_default(),
            )
        {
            object["latest_invoice"] = invoice.clone();
        }
        object
    }

    /// Lists at most `limit` objects, newest first, after the object `starting_after`.
    fn list(&self, kind: &str, call: &Call<'_>) -> Value {
        let params = call.params;
        let limit = number(&params["limit"]).unwrap_or(10).clamp(1, 100);
        let limit = usize::try_from(limit).unwrap_or(10);
        let equals =
            |object: &Value, name: &str| params.get(name).is_none_or(|it| object[name] == *it);
        let matches = |object: &&Value| {
            // Thin events are not included in the list of events.
            if object["object"] == "v2.core.event" {
                return false;
            }
            let subscription = &object["parent"]["subscription_details"]["subscription"];
            let by_subscription = kind != "invoice"
                || params
                    .get("subscription")
                    .is_none_or(|it| it == subscription);
            let by_status = match (kind, params.get("status").and_then(Value::as_str)) {
                ("subscription", None) => object["status"] != "canceled",
                (_, None | Some("all")) => true,
                (_, Some(status)) => object["status"] == status,
            };
            let keys = params["lookup_keys"].as_array();
            let by_key = keys.is_none_or(|keys| keys.contains(&object["lookup_key"]));
            let active = params
                .get("active")
                .is_none_or(|it| (it == "true") == (object["active"] == true));
            by_subscription
                && by_status
                && by_key
                && active
                && equals(object, "customer")
                && equals(object, "product")
                && equals(object, "email")
                && equals(object, "type")
        };
        let mut found = self.all(kind).iter().rev().filter(matches).peekable();
        if let Some(after) = params.get("starting_after") {
            while found.next().is_some_and(|object| object["id"] != *after) {}
        }
        let page = found.by_ref().take(limit);
        let page = page
            .map(|object| self.expanded(object, &params["expand"], "data."))
            .collect::<Vec<_>>();
        let has_more = found.peek().is_some();
        objects::list(&format!("/v1/{}", call.path.join("/")), &page, has_more)
    }

    fn create_session(&mut self, call: &Call<'_>) -> Result<Value, Failure> {
        let params = call.params;
        required(params, &["mode", "line_items", "success_url"])?;
        for item in params["line_items"].as_array().into_iter().flatten() {
            let price = self.find("price", item["price"].as_str().unwrap_or_default())?;
            let metered = price["recurring"]["usage_type"] == "metered";
            if metered && item.get("quantity").is_some() {
                return Err(Failure::invalid(
                    "Quantity should not be specified for metered prices.",
                ));
            }
            if !metered && item.get("quantity").is_none() {
                return Err(Failure::missing("line_items[0][quantity]"));
            }
        }
        self.active_customer(params)?;
        let id = self.id("cs");
        let session = objects::session(&id, self.now(), call.base, params);
        self.set_timer(
            number(&session["expires_at"]).unwrap_or(0),
            Timer::ExpireSession(id),
        );
        Ok(visible(&self.add("checkout.session", session)))
    }

    fn update_subscription(&mut self, id: &str, params: &Value) -> Result<Value, Failure> {
        let subscription = self.find("subscription", id)?.clone();
        if subscription["status"] == "canceled" || subscription["status"] == "incomplete_expired" {
            return Err(Failure::invalid(
                "A canceled subscription can only update its cancellation_details.",
            ));
        }
        let period_end = number(&subscription["items"]["data"][0]["current_period_end"]);
        if let Some(at_period_end) = params.get("cancel_at_period_end") {
            let on = at_period_end == "true";
            let fields = json!({
                "cancel_at_period_end": on, "cancel_at": period_end.filter(|_| on),
                "canceled_at": on.then(|| self.now()),
            });
            self.set("subscription", id, &fields);
        }
        if let Some(at) = params.get("cancel_at") {
            let at = number(at);
            self.set("subscription", id, &json!({"cancel_at": at}));
            if let Some(at) = at {
                self.set_timer(at, Timer::CancelAt(id.to_owned()));
            }
        }
        for name in ["metadata", "pause_collection"] {
            if let Some(value) = params.get(name) {
                let value = if *value == "" {
                    Value::Null
                } else {
                    value.clone()
                };
                self.set("subscription", id, &json!({name: value}));
            }
        }
        let updated = self.find("subscription", id)?.clone();
        self.emit("customer.subscription.updated", &updated);
        Ok(updated)
    }
}

/// Returns the object without the internal data of the fake Stripe.
pub fn visible(object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(fields) = object.as_object_mut() {
        fields.retain(|name, _| !name.starts_with('_'));
    }
    object
}

fn exists(message: &str) -> Failure {
    let mut failure = Failure::invalid(message);
    failure.body["error"]["code"] = "resource_already_exists".into();
    failure
}

fn unknown(call: &Call<'_>) -> Failure {
    let path = call.path.join("/");
    let mut failure = Failure::invalid(&format!(
        "Unrecognized request URL ({}: /v1/{path}).",
        call.method
    ));
    failure.status = 404;
    failure.kept = false;
    failure
}
