//! Decisions: the log of allowed and denied requests.

use uuid::Uuid;

use crate::{
    id::{ApiKeyId, PlanId},
    time::Timestamp,
    wire::{response, text_enum},
};

text_enum! {
    /// The outcome of a decision.
    pub enum DecisionOutcome {
        Allowed = "allowed",
        Rejected = "rejected",
    }
}

response! {
    /// A decision to allow or deny a request with a known key.
    #[derive(Debug, Eq)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct Decision {
        pub id: Uuid,
        pub at: Timestamp,
        pub key_id: ApiKeyId,
        /// The key's current name. `null` if the key was deleted.
        pub key_name: Option<String>,
        /// The plan that the key was on when the decision was made.
        pub plan_id: PlanId,
        /// The endpoint that was called. Empty if the check did not specify an endpoint.
        pub endpoint: String,
        pub outcome: DecisionOutcome,
        /// The policy that denied the request: `rpm`, `daily`, `monthly` or `tenant_monthly`; `reduced_capacity` if
        /// limits could not be checked. `null` if the request was allowed.
        pub policy: Option<String>,
        /// Seconds to wait before retrying. `null` if the request was allowed or could never be allowed.
        pub retry_after: Option<u32>,
        pub cost: u64,
        /// The `X-Request-Id` of the response to the request.
        pub request_id: String,
    }
}

response! {
    /// One page of decisions.
    #[derive(Debug, Eq)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct DecisionPage {
        /// The decisions, most recently recorded first.
        pub items: Vec<Decision>,
        /// Pass as `cursor` to fetch the next page. `null` on the last page. Opaque.
        pub next_cursor: Option<String>,
        /// Number of decisions in the log that match the filters. `null` if this number is not known: if the endpoint
        /// in the filter is not counted separately, or if more than 50,000 requests have the request ID in the filter.
        pub total: Option<u64>,
        /// Pass as `last_event_id` to `GET /admin/decisions/stream` to receive the decisions recorded since this page
        /// was returned. Opaque.
        pub last_event_id: String,
    }
}

response! {
    /// The data of a `dropped` event, sent when there were too many decisions to send all of them.
    #[derive(Debug, Copy, Eq)]
    pub struct DroppedDecisions {
        /// Number of decisions that were skipped, whether or not they match the filters.
        pub count: u64,
    }
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
