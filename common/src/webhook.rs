//! Webhooks: the endpoints that receive a tenant's events, and the deliveries to them.

use crate::{
    field::{GraceSeconds, Name, WebhookUrl},
    id::{WebhookDeliveryId, WebhookId},
    time::Timestamp,
    wire::{Omittable, request, response, text_enum, update},
};

response! {
    /// An endpoint to which Quota sends events. Its signing secret is returned only once, on creation or rotation.
    #[derive(Debug, Eq)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct Webhook {
        pub id: WebhookId,
        pub name: String,
        /// The URL that receives events as POST requests.
        pub url: String,
        /// Whether events are sent. `false` if you or Quota disabled the webhook; if Quota disabled it,
        /// `disabled_reason` says why.
        pub is_active: bool,
        /// Why Quota disabled the webhook. `null` if Quota did not disable it.
        pub disabled_reason: Option<String>,
        /// When deliveries started to fail. `null` if the last attempt succeeded, or if there has been no attempt since
        /// the webhook was created, its URL was changed, or it was enabled.
        pub failing_since: Option<Timestamp>,
        /// When the previous secret expires. Until then, deliveries are also signed with the previous secret. `null` if
        /// there is no previous secret.
        pub previous_secret_expires_at: Option<Timestamp>,
        pub created_at: Timestamp,
        pub updated_at: Timestamp,
    }
}

request! {
    /// Request body for creating a webhook.
    #[derive(Debug)]
    pub struct CreateWebhook {
        /// 1 to 200 characters.
        #[garde(dive)]
        pub name: Name,
        /// An `https://` URL whose host has only public IP addresses. If the operator allows private networks, hosts in
        /// these networks can also be used, and their URLs can start with `http://`. At most 2,000 characters.
        #[garde(dive)]
        pub url: WebhookUrl,
    }
}

update! {
    /// Request body for updating a webhook. Omitted fields are unchanged.
    pub struct UpdateWebhook {
        /// 1 to 200 characters.
        #[garde(dive)]
        pub name: Option<Name>,
        /// An `https://` URL whose host has only public IP addresses. If the operator allows private networks, hosts in
        /// these networks can also be used, and their URLs can start with `http://`. At most 2,000 characters.
        #[garde(dive)]
        pub url: Option<WebhookUrl>,
        /// `false` disables the webhook: pending deliveries are canceled (status `failed`) and can be redelivered
        /// later. `true` enables the webhook and clears `disabled_reason`.
        #[garde(skip)]
        pub is_active: Option<bool>,
    }
}

request! {
    /// Request body for rotating a webhook's signing secret.
    #[derive(Debug, Default)]
    pub struct RotateWebhookSecret {
        /// Seconds for which deliveries are signed with both the previous and the new secret, 0 to 2,592,000 (30 days).
        /// Use 0 if the secret was leaked. Default: 86,400 (24 hours).
        #[garde(dive)]
        pub grace_seconds: Option<GraceSeconds>,
    }
}

response! {
    /// A webhook that has just been created, or whose secret has just been rotated, with its signing secret.
    #[derive(Eq)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct CreatedWebhook {
        /// The signing secret: `whsec_` and 32 random bytes in Base64. The secret is returned only once: a replay with
        /// the same `Idempotency-Key` omits the secret.
        pub secret: Omittable<String>,
        pub webhook: Webhook,
    }
}

impl std::fmt::Debug for CreatedWebhook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CreatedWebhook")
            .field("webhook", &self.webhook)
            .finish_non_exhaustive()
    }
}

text_enum! {
    /// The status of a delivery. `pending`: the event has not been sent yet, or an attempt failed and will be retried.
    /// `delivered`: the endpoint accepted the event with a 2xx status. `failed`: the delivery failed and will not be
    /// retried.
    pub enum WebhookDeliveryStatus {
        /// The event has not been sent yet, or an attempt failed and will be retried.
        Pending = "pending",
        /// The endpoint accepted the event with a 2xx status.
        Delivered = "delivered",
        /// The delivery failed and will not be retried.
        Failed = "failed",
    }
}

response! {
    /// The delivery of an event to a webhook.
    #[derive(Debug)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct WebhookDelivery {
        pub id: WebhookDeliveryId,
        pub webhook_id: WebhookId,
        /// The event's ID, which is sent in the `webhook-id` header. It is the same for all attempts and all webhooks.
        pub event_id: String,
        /// The event's type, such as `quota.threshold_reached`.
        pub event_type: String,
        pub status: WebhookDeliveryStatus,
        /// The number of attempts since the delivery was created or last redelivered.
        pub attempts: u32,
        /// The status code of the response to the last attempt. `null` if no response was received.
        pub response_status: Option<u32>,
        /// Why the last attempt failed, or why the delivery was canceled or not attempted. Otherwise `null`.
        pub error: Option<String>,
        pub last_attempt_at: Option<Timestamp>,
        /// When the next attempt is due. During an attempt, this is when the attempt will be repeated if the server
        /// stops before the attempt ends. `null` if the event will not be sent again.
        pub next_attempt_at: Option<Timestamp>,
        /// The request body that is sent to the webhook's URL.
        pub payload: serde_json::Value,
        pub created_at: Timestamp,
    }
}

#[cfg(feature = "openapi")]
mod examples {
    use poem_openapi::types::Example;

    use super::{
        CreateWebhook, CreatedWebhook, RotateWebhookSecret, UpdateWebhook, Webhook,
        WebhookDelivery, WebhookDeliveryStatus,
    };
    use crate::id::example;

    const URL: &str = "https://hooks.example.com/quota";
    /// 32 zero bytes. No server generates this secret.
    const SECRET: &str = "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";

    impl Example for Webhook {
        fn example() -> Self {
            Self {
                id: example::webhook(),
                name: "Alerts".into(),
                url: URL.into(),
                is_active: true,
                disabled_reason: None,
                failing_since: None,
                previous_secret_expires_at: None,
                created_at: example::at(),
                updated_at: example::at(),
            }
        }
    }

    impl Example for CreateWebhook {
        fn example() -> Self {
            Self {
                name: "Alerts".into(),
                url: URL.into(),
            }
        }
    }

    impl Example for UpdateWebhook {
        fn example() -> Self {
            Self {
                is_active: Some(true),
                ..Self::default()
            }
        }
    }

    impl Example for RotateWebhookSecret {
        fn example() -> Self {
            Self {
                grace_seconds: Some(3600.into()),
            }
        }
    }

    impl Example for CreatedWebhook {
        fn example() -> Self {
            Self {
                secret: Some(SECRET.into()),
                webhook: Webhook::example(),
            }
        }
    }

    impl Example for WebhookDelivery {
        fn example() -> Self {
            Self {
                id: example::webhook_delivery(),
                webhook_id: example::webhook(),
                event_id: format!("msg_{}", example::quota_alert().0.simple()),
                event_type: "quota.threshold_reached".into(),
                status: WebhookDeliveryStatus::Pending,
                attempts: 2,
                response_status: Some(503),
                error: Some("The endpoint responded with status 503.".into()),
                last_attempt_at: Some(example::at()),
                next_attempt_at: Some(example::at()),
                payload: serde_json::json!({
                    "type": "quota.threshold_reached",
                    "timestamp": example::at(),
                    "data": crate::alert::QuotaAlert::example(),
                }),
                created_at: example::at(),
            }
        }
    }
}
