//! Authenticated callers. A handler whose first argument is one of these types runs only for requests with the
//! corresponding credential.
//!
//! For a [`SignedInTenant`], the request has a valid access token. For an [`AdmittedKey`], the request has a valid API
//! key, and the limiter has allowed the request. For a [`ServiceCaller`] or [`GatewayCaller`], the request has a valid
//! service token. Each type is a poem-openapi extractor that adds its security scheme to the OpenAPI document.

use std::{num::NonZeroU32, pin::pin, sync::Arc};

use poem::{Request, RequestBody, Result, http::Method};
use poem_openapi::{
    ApiExtractor, ApiExtractorType, ExtractParamOptions,
    registry::{MetaSecurityScheme, Registry},
};
use quota_common::{SessionId, TenantId, UserId, auth::Role};
use secrecy::SecretString;

use super::{
    browser::{self, SessionCookie},
    credentials::{api_key, bearer},
    fields::{Fields, Sent},
    idempotency,
    problem::ApiError,
    request_context::{RequestContext, origin},
};
use crate::{
    auth::session::{LiveSession, Origin},
    keys::{KeyRecord, Rejection, ServiceRecord},
    limiter::{Decision, Policy},
    secret_text::{Kind, hash_of},
    spans::{self, Span, SpanKind},
};

const fn blank(ty: &'static str, description: &'static str) -> MetaSecurityScheme {
    MetaSecurityScheme {
        ty,
        description: Some(description),
        name: None,
        key_in: None,
        scheme: None,
        bearer_format: None,
        flows: None,
        openid_connect_url: None,
    }
}

/// Implements an extractor for a caller type. The extractor adds the caller's security scheme to the OpenAPI document.
macro_rules! extract_by_credential {
    ($caller:ty, $name:literal, $scheme:expr) => {
        impl<'a> ApiExtractor<'a> for $caller {
            const TYPES: &'static [ApiExtractorType] = &[ApiExtractorType::SecurityScheme];
            type ParamType = ();
            type ParamRawType = ();

            fn register(registry: &mut Registry) {
                registry.create_security_scheme($name, $scheme);
            }

            fn security_schemes() -> Vec<&'static str> {
                vec![$name]
            }

            async fn from_request(
                request: &'a Request,
                _: &mut RequestBody,
                _: ExtractParamOptions<()>,
            ) -> Result<Self> {
                Ok(Self::admit(request).await?)
            }
        }
    };
}

/// A signed-in user who is acting for a tenant.
#[derive(Debug, Clone)]
pub struct SignedInTenant {
    pub session: Arc<LiveSession>,
    pub origin: Origin,
}

impl SignedInTenant {
    pub fn tenant(&self) -> TenantId {
        self.session.tenant
    }

    pub fn user(&self) -> UserId {
        self.session.user
    }

    pub fn session_id(&self) -> SessionId {
        self.session.id
    }

    pub fn role(&self) -> Role {
        self.session.role
    }

    /// Returns the request's access token, so that it can be checked again later.
    pub fn token(&self, request: &Request) -> Result<SecretString, ApiError> {
        let context = RequestContext::of(request)?;
        let token = bearer(request.headers())?
            .or_else(|| browser::cookie(&context.state, request, SessionCookie::Access))
            .ok_or_else(|| ApiError::internal("the caller was authenticated without a token"))?;
        Ok(SecretString::from(token))
    }

    async fn admit(request: &Request) -> Result<Self, ApiError> {
        let context = RequestContext::of(request)?;
        let state = &context.state;
        let headers = request.headers();
        let from_bearer = bearer(headers)?;
        let token = from_bearer
            .or_else(|| browser::cookie(state, request, SessionCookie::Access))
            .ok_or_else(|| {
                let detail = if browser::wants_cookies(headers) {
                    "No session cookie was sent. Sign in again."
                } else {
                    "Send an access token as Authorization: Bearer <token>."
                };
                ApiError::unauthorized(false, detail)
            })?;
        let session = state.sessions.of_access_token(token).await?;
        if from_bearer.is_none() {
            browser::may_change(state, request, session.id)?;
        }
        if request.method() == Method::POST {
            idempotency::check_field(headers)?;
        }
        context.is_tenant(session.tenant);
        Ok(Self {
            session,
            origin: origin(request),
        })
    }
}

extract_by_credential!(
    SignedInTenant,
    "AccessToken",
    MetaSecurityScheme {
        scheme: Some("bearer"),
        bearer_format: Some("JWT"),
        ..blank(
            "http",
            "Access token from `POST /auth/login`, `/auth/register` or `/auth/refresh`. Valid for 15 minutes."
        )
    }
);

/// Looks up the key, calls the limiter, and records the decision for `endpoint`, which may be empty. Returns the key's
/// record and the decision. If the key is not usable, returns the reason instead, without calling the limiter.
pub async fn decide(
    context: &RequestContext,
    text: &str,
    cost: NonZeroU32,
    tenant: Option<TenantId>,
    endpoint: &str,
) -> Result<Result<(Arc<KeyRecord>, Decision), RejectedKey>, ApiError> {
    let mut span = spans::child("decide", SpanKind::Internal);
    let result = {
        let decision = pin!(decide_in_span(context, text, cost, tenant, endpoint));
        spans::inside(span.as_ref().map(Span::as_parent), decision).await
    };
    if let Some(span) = &mut span {
        describe(span, cost, &result);
    }
    result
}

async fn decide_in_span(
    context: &RequestContext,
    text: &str,
    cost: NonZeroU32,
    tenant: Option<TenantId>,
    endpoint: &str,
) -> Result<Result<(Arc<KeyRecord>, Decision), RejectedKey>, ApiError> {
    let state = &context.state;
    let began = context.decision_begins();
    let refused = |rejection, record| {
        match rejection {
            Rejection::PaymentRequired => &state.metrics.payment_required,
            Rejection::Unknown | Rejection::Inactive | Rejection::Expired => {
                &state.metrics.keys_rejected
            }
        }
        .inc();
        Ok(Err(RejectedKey { rejection, record }))
    };
    let Some(hash) = hash_of(Kind::ApiKey, text.as_bytes()) else {
        state.metrics.keys_malformed.inc();
        return refused(Rejection::Unknown, None);
    };
    let Some(record) = state.keys.key(hash, began, context.source(tenant)).await? else {
        return refused(Rejection::Unknown, None);
    };
    if tenant.is_some_and(|tenant| tenant != record.tenant()) {
        return refused(Rejection::Unknown, None);
    }
    context.is_key(record.clone());
    if let Err(rejection) = record.usable(state.billing.is_some(), || state.clock.now()) {
        return refused(rejection, Some(record));
    }
    context.has_authenticated();
    // If no space can be reserved for the usage record, no decision is made and no tokens are consumed.
    let reservation = state
        .metering
        .reserve(record.tenant(), endpoint, context.id())
        .map_err(|_| ApiError::unrecordable())?;
    let (limiter, handle, policies) = (&state.limiter, &record.handle, &record.policies);
    let decided = match record.tenant_quota(state.billing.is_some(), || state.clock.now()) {
        None => pin!(limiter.admit(handle, policies, cost)).await,
        Some(quota) => pin!(limiter.admit_within(quota, handle, policies, cost)).await,
    };
    let decision = decided.inspect_err(|_| {
        state.metrics.limiter_errors.inc();
    })?;
    // The decision's time was read after the reservation. The shipper relies on this when it reports a time before which
    // all decisions are in the segments that it reads.
    let decided_at = decision.monotonic;
    if decision.is_allowed() {
        &state.metrics.allowed
    } else {
        &state.metrics.denied
    }
    .inc();
    state
        .metering
        .record(reservation, &record, &decision, cost.get(), decided_at)
        .await
        .map_err(ApiError::unavailable)?;
    // With metering, the time of last use is stored together with the usage.
    if !state.metering.is_on() && record.is_worth_noting(decision.at) {
        state.last_used.key(record.id(), decision.at);
    }
    let recorded_at = if state.metering.waits_for_disk() {
        state.clock.monotonic()
    } else {
        decided_at
    };
    context.set_decision_ended(recorded_at);
    state
        .metrics
        .decision_seconds
        .observe(recorded_at.saturating_since(began));
    Ok(Ok((record, decision)))
}

/// Describes a decision in its span. The outcomes have the same names as in `X-Quota-Decision`.
fn describe(
    span: &mut Span,
    cost: NonZeroU32,
    result: &Result<Result<(Arc<KeyRecord>, Decision), RejectedKey>, ApiError>,
) {
    span.set("quota.cost", i64::from(cost.get()));
    let outcome = match result {
        Ok(Ok((record, decision))) => {
            span.set("quota.plan_id", record.plan.id.to_string());
            span.set("quota.degraded", decision.degraded);
            if decision.is_allowed() {
                "allowed"
            } else {
                let violated: Vec<_> = decision.violated().iter().map(Policy::name).collect();
                span.set("quota.violated", violated.join(","));
                "limited"
            }
        }
        Ok(Err(RejectedKey { rejection, .. })) => match rejection {
            Rejection::PaymentRequired => "payment_required",
            Rejection::Unknown | Rejection::Inactive | Rejection::Expired => "unauthorized",
        },
        Err(error) => {
            span.fail(error.code.slug());
            "unavailable"
        }
    };
    span.set("quota.decision", outcome);
}

#[derive(Debug, Clone)]
pub struct RejectedKey {
    pub rejection: Rejection,
    /// The key's record. `None` if the key is unknown or belongs to another tenant.
    pub record: Option<Arc<KeyRecord>>,
}

/// A usable API key, and the limiter's decision on a request with it.
#[derive(Debug)]
pub struct DecidedKey {
    pub record: Arc<KeyRecord>,
    pub decision: Decision,
}

impl DecidedKey {
    /// Makes a decision on a request to `GET /v1/echo`, with a cost of 1, and records the decision.
    pub async fn of(
        context: &RequestContext,
        fields: &impl Fields,
        query: Option<&str>,
    ) -> Result<Self, ApiError> {
        let text = api_key(fields, query)?.ok_or_else(ApiError::key_missing)?;
        // Other checks are recorded for the endpoints of tenants' APIs. This is the only endpoint of Quota itself that
        // appears in usage.
        let endpoint = "GET /v1/echo";
        pin!(Self::decide(context, text, NonZeroU32::MIN, None, endpoint)).await
    }

    /// Calls [`decide`]. Returns a 401 or 402 error if the key is not usable.
    pub async fn decide(
        context: &RequestContext,
        text: &str,
        cost: NonZeroU32,
        tenant: Option<TenantId>,
        endpoint: &str,
    ) -> Result<Self, ApiError> {
        match pin!(decide(context, text, cost, tenant, endpoint)).await? {
            Ok((record, decision)) => Ok(Self { record, decision }),
            Err(RejectedKey {
                rejection: Rejection::PaymentRequired,
                ..
            }) => Err(ApiError::subscription_needed()),
            // Use the same detail for all other reasons, so that the response does not help attackers guess keys.
            Err(_) => Err(ApiError::unauthorized(
                true,
                "This API key is invalid, inactive or expired.",
            )),
        }
    }

    /// Returns a 429 error if the request was denied.
    pub fn require_admitted(self) -> Result<AdmittedKey, ApiError> {
        let Self { record, decision } = self;
        if decision.is_allowed() {
            Ok(AdmittedKey { record, decision })
        } else {
            Err(ApiError::denied(record, decision))
        }
    }
}

/// The API key of a request that has been allowed and has consumed tokens.
#[derive(Debug)]
pub struct AdmittedKey {
    pub record: Arc<KeyRecord>,
    pub decision: Decision,
}

impl AdmittedKey {
    /// Makes a decision on a request to `GET /v1/echo`, like [`DecidedKey::of`]. Returns an error if the request is not
    /// allowed.
    pub async fn admit(request: &Request) -> Result<Self, ApiError> {
        let query = request.uri().query();
        let context = RequestContext::of(request)?;
        let decided = pin!(DecidedKey::of(context, request.headers(), query));
        decided.await?.require_admitted()
    }
}

extract_by_credential!(
    AdmittedKey,
    "ApiKey",
    MetaSecurityScheme {
        name: Some("X-API-Key"),
        key_in: Some("header"),
        ..blank(
            "apiKey",
            "API key (`qk_…`). `Authorization: Bearer` also works."
        )
    }
);

async fn service_token(
    context: &RequestContext,
    token: &str,
) -> Result<Arc<ServiceRecord>, ApiError> {
    let state = &context.state;
    let refused = || ApiError::unauthorized(true, "This service token is invalid.");
    let hash = hash_of(Kind::ServiceToken, token.as_bytes()).ok_or_else(refused)?;
    let known = state
        .keys
        .known_service_token(&hash, context.decision_begins());
    let token = match known {
        Some(known) => known,
        None => {
            let load = state.keys.service_token(hash, context.source(None));
            // Boxed, because it is large and rarely needed.
            let loaded = Box::pin(load).await?;
            // The load may have waited, and with an earlier time, an outdated key record could seem valid.
            context.has_waited();
            loaded
        }
    };
    let token = token.ok_or_else(refused)?;
    context.has_authenticated();
    context.is_tenant(token.tenant);
    if token.is_worth_noting(context.arrived) {
        state.last_used.service_token(token.id, context.arrived);
    }
    Ok(token)
}

fn several_service_tokens() -> ApiError {
    ApiError::unauthorized(true, "The X-Service-Token header was sent more than once.")
}

/// A service that sends check requests. It sets all headers of these requests itself.
#[derive(Debug, Clone)]
pub struct ServiceCaller {
    pub token: Arc<ServiceRecord>,
}

impl ServiceCaller {
    pub async fn admit(request: &Request) -> Result<Self, ApiError> {
        Self::of(RequestContext::of(request)?, request.headers()).await
    }

    /// Reads the service token from `X-Service-Token`. If that is missing, reads it from `Authorization: Bearer`.
    pub async fn of(context: &RequestContext, fields: &impl Fields) -> Result<Self, ApiError> {
        let token = match Sent::of(fields, "x-service-token") {
            Sent::Once(token) => Some(token),
            Sent::Never => bearer(fields)?,
            Sent::Several => return Err(several_service_tokens()),
        };
        let token = token.ok_or_else(|| {
            ApiError::unauthorized(
                false,
                "Send a service token as Authorization: Bearer <token>.",
            )
        })?;
        let token = service_token(context, token).await?;
        Ok(Self { token })
    }
}

/// A gateway. It forwards headers that API consumers control.
///
/// Accepts a token only in `X-Service-Token`, which gateways overwrite; consumers control `Authorization`. Rejects
/// requests with more than one token, because the consumer could have sent one of them.
#[derive(Debug, Clone)]
pub struct GatewayCaller {
    pub token: Arc<ServiceRecord>,
}

impl GatewayCaller {
    pub async fn admit(request: &Request) -> Result<Self, ApiError> {
        Self::of(RequestContext::of(request)?, request.headers()).await
    }

    pub async fn of(context: &RequestContext, fields: &impl Fields) -> Result<Self, ApiError> {
        let token = match Sent::of(fields, "x-service-token") {
            Sent::Once(token) => service_token(context, token).await?,
            Sent::Never => {
                return Err(ApiError::unauthorized(
                    false,
                    "Send a service token as X-Service-Token.",
                ));
            }
            Sent::Several => return Err(several_service_tokens()),
        };
        Ok(Self { token })
    }
}

extract_by_credential!(
    GatewayCaller,
    "GatewayToken",
    MetaSecurityScheme {
        name: Some("X-Service-Token"),
        key_in: Some("header"),
        ..blank("apiKey", "The gateway's service token (`qs_…`).")
    }
);

extract_by_credential!(
    ServiceCaller,
    "ServiceToken",
    MetaSecurityScheme {
        scheme: Some("bearer"),
        ..blank(
            "http",
            "Service token (`qs_…`). `X-Service-Token` also works."
        )
    }
);
