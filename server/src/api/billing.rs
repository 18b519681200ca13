//! `/billing`: the tenant's subscription, and webhooks from Stripe.

mod overview;

use poem::{Request, RequestBody, Result, http::StatusCode};
use poem_openapi::{
    ApiExtractor, ApiExtractorType, ExtractParamOptions, OpenApi,
    param::Header,
    registry::{MetaMediaType, MetaRequest, MetaSchema, MetaSchemaRef, Registry},
};
use quota_common::{
    ProblemCode,
    billing::{BillingState, CheckoutPage, PortalPage},
};

use super::{
    Tag,
    idempotency::IdempotencyGuard,
    json::{self, Created, Json, NoContent},
    problem::ApiError,
    request_context::RequestContext,
    tenant_rights::BillingTenant,
};
use crate::{
    billing::{Billing, BillingError, Buyer},
    repo::billing,
    state::AppState,
    stripe::{Envelope, verify},
};

/// The maximum size of a webhook. This is far above the usual size of webhooks from Stripe, and well below the memory
/// that a connection without valid credentials may use.
const WEBHOOK_MAX: usize = 64 * 1024;
const SIGNATURE: &str = "stripe-signature";

pub struct BillingApi {
    pub state: AppState,
}

/// A webhook with a valid signature.
pub struct SignedEvent {
    event: Envelope,
    body: String,
}

impl<'a> ApiExtractor<'a> for SignedEvent {
    const TYPES: &'static [ApiExtractorType] = &[ApiExtractorType::RequestObject];
    type ParamType = ();
    type ParamRawType = ();

    fn register(_: &mut Registry) {}

    fn request_meta() -> Option<MetaRequest> {
        let mut schema = MetaSchema::new("object");
        schema.description = Some("An event, as Stripe sends it.");
        Some(MetaRequest {
            description: None,
            content: vec![MetaMediaType {
                content_type: "application/json; charset=utf-8",
                schema: MetaSchemaRef::Inline(Box::new(schema)),
            }],
            required: true,
        })
    }

    async fn from_request(
        request: &'a Request,
        body: &mut RequestBody,
        _: ExtractParamOptions<()>,
    ) -> Result<Self> {
        let state = &RequestContext::of(request)?.state;
        let settings = state.config.stripe.as_ref().ok_or_else(billing_off)?;
        let header = request.headers().get(SIGNATURE);
        let header = header.and_then(|it| it.to_str().ok()).unwrap_or_default();
        let bytes = json::read(request, body, WEBHOOK_MAX).await?;
        let now = state.clock.now().secs();
        verify(&bytes, header, &settings.webhook_secrets, now).map_err(|error| {
            state.metrics.billing_signatures_bad.inc();
            ApiError::new(ProblemCode::Malformed, error.to_string())
        })?;
        let malformed = |error: String| ApiError::new(ProblemCode::Malformed, error);
        let event = Envelope::read(&bytes).map_err(|error| malformed(error.to_string()))?;
        let body = String::from_utf8(bytes).map_err(|error| malformed(error.to_string()))?;
        Ok(Self { event, body })
    }
}

fn billing_off() -> ApiError {
    ApiError::new(ProblemCode::BillingOff, "Billing is off on this server.")
}

impl From<BillingError> for ApiError {
    fn from(error: BillingError) -> Self {
        match error {
            BillingError::Db(error) => error.into(),
            BillingError::Subscribed => Self::new(
                ProblemCode::AlreadySubscribed,
                "Your organization already has a subscription. Change or cancel it in the customer portal.",
            ),
            BillingError::NoCustomer => Self::new(
                ProblemCode::NotSubscribed,
                "Your organization has never subscribed.",
            ),
            error @ (BillingError::Stripe(_)
            | BillingError::NoPrice
            | BillingError::UnknownStatus(_)
            | BillingError::OtherAccount(_)
            | BillingError::UnknownCustomer(_)
            | BillingError::NoPage
            | BillingError::NoMeter) => Self::unavailable(error),
        }
    }
}

impl BillingApi {
    fn billing(&self) -> Result<&Billing, ApiError> {
        self.state.billing.as_ref().ok_or_else(billing_off)
    }

    fn limit_pages(&self, caller: &BillingTenant) -> Result<(), ApiError> {
        let admitted = self.state.stripe_pages.admit(caller.tenant());
        admitted.map_err(|wait| {
            self.state.metrics.guard_rejections.inc();
            ApiError::too_many_pages(wait)
        })
    }

    fn page(&self, result: &str) -> String {
        format!("{}/console/billing{result}", self.state.config.public_url)
    }
}

#[OpenApi(prefix_path = "/billing", tag = "Tag::Billing")]
impl BillingApi {
    /// Get the subscription
    ///
    /// Returns the status of the tenant's subscription, its price, the usage on plans marked `paid`, and the operator's
    /// limits with their current use. Changes made in Stripe usually appear within seconds.
    #[oai(path = "/", method = "get", operation_id = "get_billing")]
    async fn get(&self, caller: BillingTenant) -> Result<Json<BillingState>, ApiError> {
        overview::billing_state(&self.state, &caller)
            .await
            .map(Json)
    }

    /// Start a subscription
    ///
    /// Returns a link to a Stripe Checkout page where the tenant can subscribe. If an earlier page is still open,
    /// returns a link to that page, so that a tenant cannot subscribe twice. Fails with 409 if the tenant already has a
    /// subscription.
    #[oai(path = "/checkout", method = "post", operation_id = "start_checkout")]
    async fn checkout(
        &self,
        caller: BillingTenant,
        /// Makes the request safe to retry: repeating it with the same `Idempotency-Key` within 24 hours returns the
        /// original response.
        #[oai(name = "Idempotency-Key")]
        idempotency_key: Header<Option<String>>,
    ) -> Result<Created<CheckoutPage>, ApiError> {
        let billing = self.billing()?;
        let idempotency = IdempotencyGuard::new("start_checkout", idempotency_key.0, &())?;
        self.limit_pages(&caller)?;
        // Handle one request at a time per tenant, so that a second click opens the same page as the first.
        let _turn = self.state.checkouts.turn(caller.tenant()).await?;
        let mut tx = self.state.db.tenant(caller.tenant()).await?;
        let replayed = idempotency.replay(&mut tx).await?;
        let (email, name) = billing::names(&mut tx, caller.user().0).await?;
        tx.commit().await?;
        if let Some(first) = replayed {
            return Ok(Created(first));
        }
        let buyer = Buyer {
            tenant: caller.tenant(),
            email: &email,
            name: &name,
            success_url: &self.page("?checkout=success"),
            cancel_url: &self.page("?checkout=canceled"),
        };
        let (session, invalidation) = billing.checkout(&buyer).await?;
        if let Some(invalidation) = &invalidation {
            self.state.invalidate(invalidation);
        }
        let page = CheckoutPage {
            url: session.url.unwrap_or_default(),
            expires_at: quota_common::Timestamp::from_unix_secs(
                u64::try_from(session.expires_at).unwrap_or(0),
            )
            .ok_or_else(|| {
                ApiError::internal("Stripe returned a Checkout Session without an expiry")
            })?,
        };
        let mut tx = self.state.db.tenant(caller.tenant()).await?;
        idempotency
            .keep(&mut tx, StatusCode::CREATED, &page)
            .await?;
        tx.commit().await?;
        tracing::info!(tenant = %caller.tenant(), user = %caller.user(), "checkout started");
        Ok(Created(page))
    }

    /// Open the customer portal
    ///
    /// Returns a link to the Stripe customer portal, where the tenant can change its payment method, cancel its
    /// subscription, and find its invoices.
    #[oai(
        path = "/portal",
        method = "post",
        operation_id = "open_billing_portal"
    )]
    async fn portal(&self, caller: BillingTenant) -> Result<Created<PortalPage>, ApiError> {
        let billing = self.billing()?;
        self.limit_pages(&caller)?;
        let url = billing.portal(caller.tenant(), &self.page("")).await?;
        Ok(Created(PortalPage { url }))
    }

    /// Receive a webhook from Stripe
    ///
    /// Called only by Stripe. The `Stripe-Signature` header must be valid. Events are stored immediately and processed
    /// after the response.
    #[oai(
        path = "/stripe/webhook",
        method = "post",
        operation_id = "receive_stripe_event"
    )]
    async fn receive(&self, event: SignedEvent) -> Result<NoContent, ApiError> {
        let billing = self.billing()?;
        if billing.receive(&event.event, &event.body).await? {
            self.state.metrics.billing_events.inc();
            self.state.billing_event.notify_one();
        }
        Ok(NoContent)
    }
}
