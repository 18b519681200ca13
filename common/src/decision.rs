//! Decisions: the log of requests that were allowed and denied.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    id::{ApiKeyId, PlanId},
    page::in_address,
    time::Timestamp,
};

in_address!(
    /// What was decided.
    DecisionOutcome {
        Allowed = "allowed",
        Rejected = "rejected",
    }
);

/// A decision on a request with a known key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object), oai(example))]
pub struct Decision {
    pub id: Uuid,
    pub at: Timestamp,
    pub key_id: ApiKeyId,
    /// The key's current name. `null` if it was deleted.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub key_name: Option<String>,
    /// The key's plan at that time.
    pub plan_id: PlanId,
    /// Empty if the request named none.
    pub endpoint: String,
    pub outcome: DecisionOutcome,
    /// The policy that denied the request: `rpm`, `daily` or `monthly`; `reduced_capacity` if limits could not be checked.
    /// `null` if it was allowed.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub policy: Option<String>,
    /// Seconds after which the request could be retried. `null` if it was allowed, or can never be allowed.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub retry_after: Option<u32>,
    pub cost: u64,
    /// The response's `X-Request-Id`.
    pub request_id: String,
}

/// One page of decisions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object), oai(example))]
pub struct DecisionPage {
    /// In the order in which the server received their records, newest first.
    pub items: Vec<Decision>,
    /// Pass as `cursor` to fetch the next page. `null` on the last page. Opaque.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub next_cursor: Option<String>,
    /// Number of decisions in the log that match the filters. `null` with an `endpoint` whose requests are counted in
    /// `other`, and with a `request_id` that more than 50,000 requests share.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub total: Option<u64>,
    /// Pass as `last_event_id` to `GET /admin/decisions/stream` to receive what follows this page. Opaque.
    pub last_event_id: String,
}

/// The data of a `dropped` event: decisions that were not sent because there were too many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DroppedDecisions {
    /// Number of decisions that were skipped, whether they match the filters or not.
    pub count: u64,
}

#[cfg(feature = "openapi")]
mod examples {
    use poem_openapi::types::Example;

    use super::{Decision, DecisionOutcome, DecisionPage};
    use crate::id::example;

    impl Example for Decision {
        fn example() -> Self {
            Self {
                id: example::decision(),
                at: example::at(),
                key_id: example::api_key(),
                key_name: Some("Mobile app".into()),
                plan_id: example::plan(),
                endpoint: "GET /orders".into(),
                outcome: DecisionOutcome::Rejected,
                policy: Some("rpm".into()),
                retry_after: Some(2),
                cost: 1,
                request_id: example::decision().to_string(),
            }
        }
    }

    impl Example for DecisionPage {
        fn example() -> Self {
            Self {
                items: vec![Decision::example()],
                next_cursor: None,
                total: Some(1),
                last_event_id: "AwAAAAAAAAAB".into(),
            }
        }
    }
}
