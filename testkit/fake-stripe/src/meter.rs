//! Usage: meter events, and their totals.

use serde_json::{Value, json};

use crate::{
    objects,
    state::{Failure, State, Usage, number, required, text},
};

const DAY: i64 = 86_400;

impl State {
    /// Accepts a meter event. An unknown meter or an error in the payload does not fail the request, but is reported by
    /// a thin event.
    pub fn use_meter(&mut self, params: &Value) -> Result<Value, Failure> {
        required(params, &["event_name", "payload"])?;
        let now = self.now();
        let at = number(&params["timestamp"]).unwrap_or(now);
        if at < now - 35 * DAY {
            return Err(Failure::invalid(
                "The timestamp must be within the past 35 calendar days.",
            ));
        }
        if at > now + 300 {
            return Err(Failure::invalid(
                "The timestamp must be no more than 5 minutes in the future.",
            ));
        }
        let identifier = params
            .get("identifier")
            .map_or_else(|| self.id("mev"), text);
        // Identifiers are remembered for a day.
        let is_known = |usage: &Usage| usage.identifier == identifier && now - usage.received < DAY;
        if self.usage.iter().any(is_known) {
            let message = format!("An event already exists with identifier {identifier}.");
            return Err(Failure::invalid(&message));
        }
        let event_name = text(&params["event_name"]);
        let customer = text(&params["payload"]["stripe_customer_id"]);
        let value = number(&params["payload"]["value"]);
        let usage = Usage {
            identifier: identifier.clone(),
            event_name: event_name.clone(),
            customer: customer.clone(),
            value: value.unwrap_or(0),
            at,
            received: now,
            invoice: None,
        };
        let meter = self
            .all("billing.meter")
            .iter()
            .find(|it| it["event_name"] == event_name);
        let meter = meter.map(|it| text(&it["id"]));
        let error = match (&meter, value) {
            (None, _) => Some("no_meter"),
            (_, None) => Some("meter_event_invalid_value"),
            _ if self.find("customer", &customer).is_err() => {
                Some("meter_event_customer_not_found")
            }
            _ => None,
        };
        match (error, meter) {
            (None, _) => self.usage.push(usage),
            (Some(code), Some(meter)) => {
                let related = json!({"id": meter, "type": "billing.meter", "url": format!("/v1/billing/meters/{meter}")});
                let data = json!({"reason": {"error_count": 1, "error_types": [{
                    "code": code, "error_count": 1, "sample_errors": [{"request": {"identifier": identifier}}],
                }]}});
                self.emit_thin("v1.billing.meter.error_report_triggered", &related, &data);
            }
            (Some(_), None) => {
                let data = json!({"reason": {"error_types": [{"sample_errors": [{"request": {"identifier": identifier}}]}]}});
                self.emit_thin("v1.billing.meter.no_meter_found", &Value::Null, &data);
            }
        }
        Ok(json!({
            "object": "billing.meter_event", "created": now, "event_name": event_name, "identifier": identifier,
            "livemode": false, "payload": params["payload"], "timestamp": at,
        }))
    }

    /// Returns a customer's usage, in total or by hour or day.
    pub fn summaries(&self, id: &str, params: &Value) -> Result<Value, Failure> {
        required(params, &["customer", "start_time", "end_time"])?;
        let meter = self.find("billing.meter", id)?;
        let (start, end) = (number(&params["start_time"]), number(&params["end_time"]));
        let (Some(start), Some(end)) = (start, end) else {
            return Err(Failure::invalid("Invalid timestamp."));
        };
        let step = match params["value_grouping_window"].as_str() {
            Some("hour") => 3600,
            Some("day") => DAY,
            _ => (end - start).max(1),
        };
        let mut summaries = Vec::new();
        let mut from = start;
        while from < end {
            let to = (from + step).min(end);
            let used = self.usage.iter().filter(|usage| {
                meter["event_name"] == usage.event_name
                    && params["customer"] == usage.customer
                    && (from..to).contains(&usage.at)
            });
            let total: i64 = used.map(|usage| usage.value).sum();
            if total != 0 || step == end - start {
                summaries.push(json!({
                    "id": format!("mtrusg_{from}"), "object": "billing.meter_event_summary",
                    "aggregated_value": total, "end_time": to, "livemode": false, "meter": id, "start_time": from,
                }));
            }
            from = to;
        }
        Ok(objects::list(
            &format!("/v1/billing/meters/{id}/event_summaries"),
            &summaries,
            false,
        ))
    }
}
