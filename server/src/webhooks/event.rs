//! Events that are sent to webhooks, as JSON.

use chrono::DateTime;
use quota_common::{Timestamp, alert::QuotaAlert};
use serde::Serialize;
use uuid::Uuid;

use crate::clock::UnixNanos;

/// The usage of a quota has reached a threshold.
pub const THRESHOLD_REACHED: &str = "quota.threshold_reached";
/// A tenant is testing an endpoint.
pub const TEST: &str = "webhook.test";

/// An event and its body, which is the same for every endpoint.
#[derive(Debug, Clone)]
pub struct Event {
    pub id: String,
    pub kind: &'static str,
    pub payload: String,
}

/// The body of a request to an endpoint. Follows the recommendations of the Standard Webhooks specification.
#[derive(Serialize)]
struct Payload<'a, T> {
    r#type: &'a str,
    /// When the event happened, not when it is sent.
    timestamp: Timestamp,
    data: &'a T,
}

/// The data of a test event.
#[derive(Serialize)]
struct Test {
    message: &'static str,
}

impl Event {
    fn new<T: Serialize>(id: Uuid, kind: &'static str, at: Timestamp, data: &T) -> Self {
        let payload = Payload {
            r#type: kind,
            timestamp: at,
            data,
        };
        Self {
            // The ID must not contain a period, which separates the parts of the signed content.
            id: format!("msg_{}", id.simple()),
            kind,
            payload: serde_json::to_string(&payload).unwrap_or_default(),
        }
    }

    pub fn threshold_reached(alert: &QuotaAlert) -> Self {
        Self::new(alert.id.0, THRESHOLD_REACHED, alert.created_at, alert)
    }

    pub fn test(now: UnixNanos) -> Self {
        let nanos = i64::try_from(now.0).unwrap_or(i64::MAX);
        let now = DateTime::from_timestamp_nanos(nanos);
        let data = Test {
            message: "This is a test. No action is required.",
        };
        Self::new(Uuid::now_v7(), TEST, now.into(), &data)
    }
}
