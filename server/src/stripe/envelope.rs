//! The metadata of an event from Stripe. Apart from IDs, the event's contents are not read: they may be outdated, and
//! their format depends on the API version of the webhook endpoint.

use serde_json::Value;

/// The maximum length of an ID. All IDs in Stripe are shorter.
const ID_MAX: usize = 255;

/// The parts of an event that Quota reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Envelope {
    pub id: String,
    pub kind: String,
    /// The ID of the object that the event is about.
    pub object: Option<String>,
    /// The customer to whom the object belongs.
    pub customer: Option<String>,
    pub api_version: Option<String>,
    pub livemode: bool,
}

/// The body is not an event, although its signature is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("The body is not a Stripe event: it has no ID or type.")]
pub struct NotAnEvent;

impl Envelope {
    /// Parses an event of any type and version. This includes thin events, which only refer to their object.
    pub fn read(body: &[u8]) -> Result<Self, NotAnEvent> {
        let event: Value = serde_json::from_slice(body).map_err(|_| NotAnEvent)?;
        let text = |value: &Value| {
            let text = value.as_str()?;
            let is_id = !text.is_empty() && text.len() <= ID_MAX && !text.contains('\0');
            is_id.then(|| text.to_owned())
        };
        let object = &event["data"]["object"];
        // If Stripe has expanded the customer, the field contains an object instead of an ID.
        let customer = text(&object["customer"]).or_else(|| text(&object["customer"]["id"]));
        let is_customer = object["object"] == "customer";
        Ok(Self {
            id: text(&event["id"]).ok_or(NotAnEvent)?,
            kind: text(&event["type"]).ok_or(NotAnEvent)?,
            object: text(&object["id"]).or_else(|| text(&event["related_object"]["id"])),
            customer: customer.or_else(|| text(&object["id"]).filter(|_| is_customer)),
            api_version: text(&event["api_version"]),
            livemode: event["livemode"] == true,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(event: &Value) -> Result<Envelope, NotAnEvent> {
        Envelope::read(event.to_string().as_bytes())
    }

    #[test]
    fn events_of_every_shape_are_read() {
        let mut event = json!({
            "id": "evt_1", "object": "event", "type": "customer.subscription.updated", "livemode": true,
            "api_version": "2026-09-30.endive", "data": {"object": {"id": "sub_1", "customer": "cus_1"}},
        });
        let expected = Envelope {
            id: "evt_1".into(),
            kind: "customer.subscription.updated".into(),
            object: Some("sub_1".into()),
            customer: Some("cus_1".into()),
            api_version: Some("2026-09-30.endive".into()),
            livemode: true,
        };
        assert_eq!(read(&event), Ok(expected.clone()));
        event["data"]["object"]["customer"] = json!({"id": "cus_1", "object": "customer"});
        assert_eq!(read(&event), Ok(expected));

        let customer = read(&json!({
            "id": "evt_2", "type": "customer.updated", "data": {"object": {"id": "cus_1", "object": "customer"}},
        }));
        assert_eq!(customer.unwrap().customer.as_deref(), Some("cus_1"));

        let thin = read(&json!({
            "id": "evt_3", "object": "v2.core.event", "type": "v1.customer.subscription.updated", "livemode": false,
            "related_object": {"id": "sub_1", "type": "subscription"},
        }))
        .unwrap();
        assert_eq!(
            (thin.object.as_deref(), thin.customer, thin.api_version),
            (Some("sub_1"), None, None)
        );

        let unknown = read(&json!({"id": "evt_4", "type": "something.new", "data": [1, 2]}));
        assert_eq!(unknown.unwrap().object, None);
    }

    #[test]
    fn body_without_id_or_type_is_not_an_event() {
        for body in [
            "",
            "[]",
            "null",
            "{}",
            "{\"id\":\"evt_1\"}",
            "{\"type\":\"x\",\"id\":7}",
            "\u{0}",
        ] {
            assert_eq!(Envelope::read(body.as_bytes()), Err(NotAnEvent), "{body}");
        }
        assert_eq!(Envelope::read(&[0xff, 0xfe]), Err(NotAnEvent));
        let nul = "{\"id\":\"a\\u0000\",\"type\":\"x\"}";
        assert_eq!(Envelope::read(nul.as_bytes()), Err(NotAnEvent));
    }
}
