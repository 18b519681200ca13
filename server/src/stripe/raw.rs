//! Requests that the `async-stripe` crates in use do not support: reading the account, and reading the data of thin
//! events, which requires version 2 of the Stripe API.

use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;

use super::{
    error::{Result, StripeError},
    request::{API_VERSION, TIMEOUT},
};

const STRIPE: &str = "https://api.stripe.com";

#[derive(Debug, Clone)]
pub(super) struct RawClient {
    http: reqwest::Client,
    /// The base URL, without a trailing slash.
    base: String,
    key: SecretString,
}

/// Problems of one kind that Stripe has found in meter events after accepting them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeterError {
    /// The code of the problem, such as `meter_event_customer_not_found`.
    pub code: String,
    /// The number of meter events with this problem.
    pub count: u64,
    /// The identifiers of some of these meter events.
    pub identifiers: Vec<String>,
}

/// Parses the problems that an event reports.
fn meter_errors(event: &Value) -> Vec<MeterError> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let error = |it: &Value| MeterError {
        code: it["code"].as_str().unwrap_or("unknown").to_owned(),
        count: it["error_count"].as_u64().unwrap_or(1),
        identifiers: list(&it["sample_errors"])
            .iter()
            .filter_map(|it| Some(it["request"]["identifier"].as_str()?.to_owned()))
            .collect(),
    };
    list(&event["data"]["reason"]["error_types"])
        .iter()
        .map(error)
        .collect()
}

impl RawClient {
    pub(super) fn new(key: &SecretString, base: Option<&str>) -> Result<Self> {
        let http = reqwest::Client::builder().timeout(TIMEOUT).build();
        Ok(Self {
            http: http.map_err(|error| StripeError::Unknown(error.to_string()))?,
            base: base.unwrap_or(STRIPE).trim_end_matches('/').to_owned(),
            key: key.clone(),
        })
    }

    pub(super) async fn meter_errors(&self, event: &str) -> Result<Vec<MeterError>> {
        // The ID is used in a URL only if it consists of letters, digits and underscores, as all of Stripe's IDs do.
        if !event
            .bytes()
            .all(|it| it.is_ascii_alphanumeric() || it == b'_')
        {
            return Err(StripeError::Missing {
                param: None,
                message: "not an event ID".to_owned(),
            });
        }
        let event = self.get(&format!("v2/core/events/{event}")).await?;
        Ok(meter_errors(&event))
    }

    /// Returns the account's ID, or `None` if the key does not have permission to read it.
    pub(super) async fn account(&self) -> Result<Option<String>> {
        match self.get("v1/account").await {
            Ok(account) => match account["id"].as_str() {
                Some(id) => Ok(Some(id.to_owned())),
                None => Err(StripeError::Unknown("an account without an ID".to_owned())),
            },
            Err(StripeError::Rejected { status: 403, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn get(&self, path: &str) -> Result<Value> {
        let unknown = |error: reqwest::Error| StripeError::Unknown(error.to_string());
        let request = self.http.get(format!("{}/{path}", self.base));
        let request = request.bearer_auth(self.key.expose_secret());
        let request = request.header("Stripe-Version", API_VERSION.as_str());
        let response = request.send().await.map_err(unknown)?;
        let status = response.status().as_u16();
        let body = response.bytes().await.map_err(unknown)?;
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        let message = || {
            let message = body["error"]["message"].as_str();
            message.unwrap_or("no message").to_owned()
        };
        match status {
            200 => Ok(body),
            404 => Err(StripeError::Missing {
                param: None,
                message: message(),
            }),
            409 | 429 => Err(StripeError::Unknown(message())),
            500.. => Err(StripeError::Failed {
                status,
                message: message(),
            }),
            _ => Err(StripeError::Rejected {
                status,
                message: message(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn report_of_any_shape_is_read() {
        let event = json!({"id": "evt_1", "data": {"reason": {"error_count": 3, "error_types": [
            {"code": "meter_event_customer_not_found", "error_count": 3, "sample_errors": [
                {"error_message": "…", "request": {"identifier": "a-1-0"}}, {"request": {}},
            ]},
            {"sample_errors": null},
        ]}}});
        let read = meter_errors(&event);
        assert_eq!(
            read,
            [
                MeterError {
                    code: "meter_event_customer_not_found".into(),
                    count: 3,
                    identifiers: vec!["a-1-0".into()],
                },
                MeterError {
                    code: "unknown".into(),
                    count: 1,
                    identifiers: vec![],
                },
            ]
        );
        assert_eq!(meter_errors(&json!({"data": [1]})), []);
    }
}
