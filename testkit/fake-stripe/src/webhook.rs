//! Signing and delivering events.

use std::{fmt::Write as _, sync::Arc, time::Duration};

use aws_lc_rs::hmac;

use crate::{
    http::Shared,
    objects,
    state::{State, machine_now, text},
};

/// How a delivery is signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Signature {
    #[default]
    Valid,
    Missing,
    /// Signed with another secret.
    Wrong,
    /// Signed this many seconds ago.
    Stale(i64),
    /// Signed only with the previous secret.
    Previous,
}

/// How an event is delivered.
#[derive(Debug, Clone, Default)]
pub struct Delivery {
    pub signature: Signature,
    /// Whether to send the event under a new ID. Stripe sometimes sends an event twice with different IDs.
    pub under_new_id: bool,
    /// Whether to use the format for an endpoint with an API version from 2024.
    pub as_of_2024: bool,
    /// The event type to send instead of the actual type.
    pub kind: Option<String>,
}

impl State {
    /// Rotates the secret of an endpoint. For a day, deliveries are also signed with the previous secret. Returns the
    /// new secret.
    pub fn rotate_secret(&mut self, endpoint: &str) -> String {
        let secret = format!("whsec_{}", self.id("secret"));
        let until = self.now() + 86_400;
        let secrets = self.secrets.entry(endpoint.to_owned()).or_default();
        for (_, end) in secrets.iter_mut() {
            end.get_or_insert(until);
        }
        secrets.push((secret.clone(), None));
        secret
    }

    /// Returns the body and the signature header of a delivery.
    pub fn signed(
        &mut self,
        event: &str,
        endpoint: &str,
        delivery: &Delivery,
    ) -> (String, Option<String>) {
        let mut event = self.find("event", event).expect("an event").clone();
        let is_thin = event["object"] == "v2.core.event";
        if is_thin && let Some(fields) = event.as_object_mut() {
            // The receiver of a thin event has to request the data.
            fields.remove("data");
        }
        if delivery.under_new_id {
            event["id"] = self.id("evt").into();
        }
        if let Some(kind) = &delivery.kind {
            event["type"] = kind.as_str().into();
        }
        if !is_thin {
            event["data"]["object"] = crate::api::visible(&event["data"]["object"]);
        }
        if delivery.as_of_2024 {
            event["api_version"] = "2024-06-20".into();
            event["data"]["object"] = objects::as_of_2024(&event["data"]["object"]);
        }
        let body = event.to_string();
        // Webhooks are checked against the machine's time, from which the fake's own clock may differ.
        let now = machine_now();
        let fake_now = self.now();
        let secrets = self.secrets.get(endpoint).cloned().unwrap_or_default();
        let valid = secrets
            .iter()
            .filter(|(_, end)| end.is_none_or(|end| fake_now < end));
        let valid: Vec<&str> = valid.map(|(secret, _)| secret.as_str()).collect();
        let previous = secrets
            .iter()
            .rev()
            .nth(1)
            .map(|(secret, _)| secret.as_str());
        let header = match delivery.signature {
            Signature::Valid => Some(sign(now, &body, &valid)),
            Signature::Missing => None,
            Signature::Wrong => Some(sign(now, &body, &["whsec_wrong"])),
            Signature::Stale(age) => Some(sign(now - age, &body, &valid)),
            Signature::Previous => Some(sign(now, &body, &[previous.unwrap_or_default()])),
        };
        (body, header)
    }
}

/// Returns a signature header with one signature for each secret.
pub fn sign(at: i64, body: &str, secrets: &[&str]) -> String {
    let signatures = secrets.iter().map(|secret| {
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
        let tag = hmac::sign(&key, format!("{at}.{body}").as_bytes());
        let mut signature = ",v1=".to_owned();
        for byte in tag.as_ref() {
            let _ = write!(signature, "{byte:02x}");
        }
        signature
    });
    format!("t={at}{}", signatures.collect::<String>())
}

/// Sends a delivery. Returns the status, or 0 if there is no response.
pub async fn send(
    client: &reqwest::Client,
    url: &str,
    body: String,
    signature: Option<String>,
) -> u16 {
    let mut request = client
        .post(url)
        .body(body)
        .header("content-type", "application/json");
    if let Some(signature) = signature {
        request = request.header("stripe-signature", signature);
    }
    request
        .send()
        .await
        .map_or(0, |response| response.status().as_u16())
}

/// Delivers queued events until the [`FakeStripe`](crate::FakeStripe) is dropped. Each delivery is attempted up to
/// three times, with a new signature each time.
pub async fn deliver_queued(shared: Arc<Shared>, client: reqwest::Client) {
    loop {
        tokio::time::sleep(Duration::from_millis(10)).await;
        let next = {
            let mut state = shared.state.lock();
            let now = state.now();
            state.run_timers(now);
            state.outbox.pop_front()
        };
        let Some((event, endpoint)) = next else {
            continue;
        };
        let (shared, client) = (shared.clone(), client.clone());
        tokio::spawn(async move {
            for pause in [100, 1_000, 5_000] {
                let (url, (body, signature)) = {
                    let mut state = shared.state.lock();
                    let Ok(found) = state.find("webhook_endpoint", &endpoint) else {
                        return;
                    };
                    let url = text(&found["url"]);
                    (url, state.signed(&event, &endpoint, &Delivery::default()))
                };
                if (200..300).contains(&send(&client, &url, body, signature).await) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
        });
    }
}
