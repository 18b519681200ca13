//! The records of API keys and service tokens, found by their secrets.

use std::{
    any::Any,
    num::{NonZeroU32, NonZeroU64},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use chrono::{DateTime, Utc};
use quota_common::{
    ApiKeyId, PlanId, ServiceTokenId, TenantId,
    plan::{Billing, OnRedisFailure},
};

use crate::{
    cache::{Cached, Freshness, Loaded, Unconfirmed},
    clock::{Monotonic, Nanos, UnixNanos},
    invalidations::InvalidationSet,
    limiter::{KeyHandle, Limiter, Policies, RatePolicy, TenantQuota, Zone},
    repo::api_key::{FoundKey, KeyFacts},
    secret_text::{Hash, SecretText},
    spans,
    telemetry::metrics::Metrics,
};

use super::{
    index::KeyIndex,
    lookups::{LookupCaller, Lookups},
    shared::SharedKeys,
};

/// The minimum time between two recorded uses of a key or token.
const NOTE_EVERY: Nanos = Nanos::from_secs(1);

/// An API key with its limits, and a handle to the state of the limits.
#[derive(Debug)]
pub struct KeyRecord {
    pub tenant: TenantId,
    pub id: ApiKeyId,
    pub plan_id: PlanId,
    pub plan: String,
    /// The part of the secret that may be logged.
    pub prefix: String,
    pub is_active: bool,
    pub expires_at: Option<UnixNanos>,
    pub billing: Billing,
    /// When the tenant's access to paid plans ends. 0 if the tenant has no access.
    pub paid_access_until: UnixNanos,
    pub policies: Policies,
    pub handle: Arc<KeyHandle>,
    /// The quota that all keys of the tenant share while the tenant may not use paid plans. `None` if there is no such
    /// quota.
    tenant_quota: Option<TenantQuota>,
    /// Response headers that are the same for all requests with the key. Cached for the API layer.
    pub headers: Attachment,
    /// When a use of the key was last recorded.
    noted_at: AtomicU64,
}

/// A value that a higher layer computes once per record. All callers must use the same type.
#[derive(Debug, Default)]
pub struct Attachment(OnceLock<Box<dyn Any + Send + Sync>>);

impl Attachment {
    pub fn get_or_init<T: Any + Send + Sync>(&self, init: impl FnOnce() -> T) -> &T {
        let value = self.0.get_or_init(|| Box::new(init()));
        value.downcast_ref().expect("all callers use the same type")
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rejection {
    Unknown,
    Inactive,
    Expired,
    /// The key is valid, but its plan is `paid` and its tenant has no active subscription.
    PaymentRequired,
}

impl KeyRecord {
    /// Checks whether the key may be used. If `billing_on` is set, paid plans require a subscription. Calls `now` only
    /// if the key or access to paid plans expires.
    pub fn usable(&self, billing_on: bool, now: impl Fn() -> UnixNanos) -> Result<(), Rejection> {
        if !self.is_active {
            return Err(Rejection::Inactive);
        }
        if self.expires_at.is_some_and(|end| end <= now()) {
            return Err(Rejection::Expired);
        }
        let is_paid = billing_on && self.billing == Billing::Paid;
        if is_paid && !self.has_paid_access(now) {
            return Err(Rejection::PaymentRequired);
        }
        Ok(())
    }

    fn has_paid_access(&self, now: impl Fn() -> UnixNanos) -> bool {
        match self.paid_access_until {
            UnixNanos(0) => false,
            UnixNanos(u64::MAX) => true,
            end => now() < end,
        }
    }

    /// Returns the quota that the key shares with its tenant's other keys. Returns `None` if the tenant may use paid
    /// plans, which requires billing to be on. Calls `now` only if access to paid plans expires.
    #[inline]
    pub fn tenant_quota(
        &self,
        billing_on: bool,
        now: impl Fn() -> UnixNanos,
    ) -> Option<&TenantQuota> {
        let quota = self.tenant_quota.as_ref()?;
        (!billing_on || !self.has_paid_access(now)).then_some(quota)
    }
}

impl KeyRecord {
    /// Returns whether to record a use at `now`. Returns `true` at most once per second, so that busy keys do not cause
    /// more writes than other keys.
    pub fn is_worth_noting(&self, now: UnixNanos) -> bool {
        is_worth_noting(&self.noted_at, now)
    }
}

#[derive(Debug)]
pub struct ServiceRecord {
    pub tenant: TenantId,
    pub id: ServiceTokenId,
    /// When a use of the token was last recorded.
    noted_at: AtomicU64,
}

impl ServiceRecord {
    /// Returns whether to record a use at `now`. Returns `true` at most once per second.
    pub fn is_worth_noting(&self, now: UnixNanos) -> bool {
        is_worth_noting(&self.noted_at, now)
    }
}

fn is_worth_noting(noted_at: &AtomicU64, now: UnixNanos) -> bool {
    let worth = Nanos(now.0.abs_diff(noted_at.load(Ordering::Relaxed))) >= NOTE_EVERY;
    if worth {
        noted_at.store(now.0, Ordering::Relaxed);
    }
    worth
}

/// Finds API keys and service tokens by their secrets. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct KeyStore {
    keys: Cached<Hash, KeyRecord>,
    tokens: Cached<Hash, ServiceRecord>,
    lookups: Lookups,
    limiter: Limiter,
    shared: Option<SharedKeys>,
    index: Arc<KeyIndex>,
}

impl KeyStore {
    /// Creates the store. Without `shared`, keys that are not in memory are looked up directly in PostgreSQL.
    pub fn new(
        lookups: Lookups,
        limiter: Limiter,
        shared: Option<SharedKeys>,
        capacity: usize,
        grace: Duration,
        freshness: &Arc<Freshness>,
        metrics: &Arc<Metrics>,
    ) -> Self {
        Self {
            keys: Cached::new(capacity, grace, freshness.clone(), metrics.clone()),
            tokens: Cached::new(
                (capacity / 10).max(100),
                grace,
                freshness.clone(),
                metrics.clone(),
            ),
            lookups,
            limiter,
            shared,
            index: Arc::new(KeyIndex::new(capacity)),
        }
    }

    /// Returns the record of the key with this secret, even if the key is inactive. If the key is unknown, the lookup
    /// counts toward the limit of `caller`.
    pub async fn key(
        &self,
        text: &SecretText,
        now: Monotonic,
        caller: LookupCaller,
    ) -> Result<Option<Arc<KeyRecord>>, Unconfirmed> {
        let hash = text.hash();
        if let Some(known) = self.keys.peek_at(&hash, now) {
            return Ok(known);
        }
        // Boxed because it is large and rarely needed. Otherwise, every decision would reserve memory for it.
        Box::pin(self.load_key(hash, caller)).await
    }

    async fn load_key(
        &self,
        hash: Hash,
        caller: LookupCaller,
    ) -> Result<Option<Arc<KeyRecord>>, Unconfirmed> {
        let caller = (!self.keys.holds(&hash)).then_some(caller);
        let (lookups, limiter, shared) = (
            self.lookups.keys.clone(),
            self.limiter.clone(),
            self.shared.clone(),
        );
        let (index, cached) = (self.index.clone(), self.keys.clone());
        let span = spans::current();
        let record = move |facts: KeyFacts, as_of| {
            // Add the hash to the index before the record is cached.
            let owners = [facts.tenant_id, facts.plan_id, facts.id];
            index.add(hash, owners, |hash| cached.holds_or_loads(hash));
            record(facts, as_of, &limiter)
        };
        self.keys
            .get(hash, move || {
                let (lookups, record, shared) = (lookups.clone(), record.clone(), shared.clone());
                spans::within(span.clone(), async move {
                    let lookup = lookups.begin(caller)?;
                    if let Some(shared) = &shared
                        && let Some(found) = shared.get(&hash).await
                    {
                        let as_of = found.as_of;
                        let record = found.facts.map(|facts| record(facts, as_of));
                        return Ok(Loaded {
                            value: record.transpose()?,
                            current_at: Some(found.current_at),
                        });
                    }
                    let facts = lookup.find(hash).await?;
                    if let Some(shared) = &shared {
                        shared.put(&hash, facts.as_ref().map(|(facts, as_of)| (facts, *as_of)));
                    }
                    let record = facts.map(|(facts, as_of)| record(facts, as_of));
                    Ok(record.transpose()?.into())
                })
            })
            .await
    }

    pub async fn service_token(
        &self,
        text: &SecretText,
        now: Monotonic,
        caller: LookupCaller,
    ) -> Result<Option<Arc<ServiceRecord>>, Unconfirmed> {
        let hash = text.hash();
        if let Some(known) = self.tokens.peek_at(&hash, now) {
            return Ok(known);
        }
        Box::pin(self.load_service_token(hash, caller)).await
    }

    async fn load_service_token(
        &self,
        hash: Hash,
        caller: LookupCaller,
    ) -> Result<Option<Arc<ServiceRecord>>, Unconfirmed> {
        let caller = (!self.tokens.holds(&hash)).then_some(caller);
        let lookups = self.lookups.tokens.clone();
        let span = spans::current();
        self.tokens
            .get(hash, move || {
                let lookups = lookups.clone();
                spans::within(span.clone(), async move {
                    let owner = lookups.begin(caller)?.find(hash).await?;
                    Ok(owner.map(|(tenant, id)| ServiceRecord {
                        tenant,
                        id,
                        noted_at: AtomicU64::new(0),
                    }))
                })
            })
            .await
    }

    /// Removes records that changes have invalidated.
    pub fn revoke(&self, gone: &InvalidationSet) {
        if gone.any_key() {
            // Loads in progress are repeated, even if their key is not in the index yet.
            self.keys.forget_these(|| self.index.take(gone));
        }
        if gone.any_token() {
            self.tokens
                .forget(|_, token| gone.token(token.tenant.0, token.id.0));
        }
    }

    /// Converts a key that was found by its ID to a record. The record uses the same limiter state as requests.
    pub fn described(&self, found: FoundKey) -> Result<KeyRecord, Unconfirmed> {
        record(found.facts, found.as_of, &self.limiter)
    }

    /// Removes all records.
    pub fn forget_all(&self) {
        self.keys.forget(|_, _| true);
        self.tokens.forget(|_, _| true);
    }

    /// Removes a secret from the cache of unknown secrets. Call after creating a key or token with that secret.
    pub fn created(&self, text: &SecretText) {
        let hash = text.hash();
        self.keys.forget_absent(&hash);
        self.tokens.forget_absent(&hash);
    }
}

fn record(facts: KeyFacts, as_of: i64, limiter: &Limiter) -> Result<KeyRecord, Unconfirmed> {
    let (tenant, id) = (TenantId(facts.tenant_id), ApiKeyId(facts.id));
    let handle = limiter
        .handle(tenant, id)
        .map_err(|error| Unconfirmed::Failed(error.to_string().into()))?;
    let tenant_quota = limiter
        .tenant_quota(tenant)
        .map_err(|error| Unconfirmed::Failed(error.to_string().into()))?;
    let (rpm, burst) = rate(facts.default_rpm, facts.burst, facts.rpm_override);
    let zone = Zone::named(&facts.time_zone).unwrap_or_else(|_| {
        tracing::error!(zone = facts.time_zone, tenant = %tenant, "unknown time zone; using UTC instead");
        Zone::utc()
    });
    let quota = |limit: Option<i64>| {
        limit
            .and_then(|limit| u64::try_from(limit).ok())
            .and_then(NonZeroU64::new)
    };
    Ok(KeyRecord {
        tenant,
        id,
        plan_id: PlanId(facts.plan_id),
        plan: facts.plan_name,
        prefix: facts.prefix,
        is_active: facts.is_active,
        expires_at: facts.expires_at.map(nanos),
        billing: if facts.billing == "paid" {
            Billing::Paid
        } else {
            Billing::Free
        },
        paid_access_until: match (facts.has_paid_access, facts.paid_access_until) {
            (false, _) => UnixNanos(0),
            (true, None) => UnixNanos(u64::MAX),
            (true, Some(end)) => nanos(end),
        },
        policies: Policies::new(
            RatePolicy { rpm, burst },
            quota(facts.daily_quota),
            quota(facts.monthly_quota),
            zone,
            facts.strict,
        )
        .on_redis_failure(
            facts
                .on_redis_failure
                .as_deref()
                .and_then(OnRedisFailure::of),
        )
        // The version increases with every change.
        .with_version(u64::try_from(as_of).unwrap_or(0)),
        handle,
        tenant_quota,
        headers: Attachment::default(),
        noted_at: AtomicU64::new(0),
    })
}

/// Returns the rate and burst of a key. An override replaces the rate. If the plan's burst is equal to its rate, which
/// is the default, the override also replaces the burst.
fn rate(default_rpm: i32, burst: i32, rpm_override: Option<i32>) -> (NonZeroU32, NonZeroU32) {
    let positive = |n: i32| {
        u32::try_from(n)
            .ok()
            .and_then(NonZeroU32::new)
            .unwrap_or(NonZeroU32::MIN)
    };
    match rpm_override {
        None => (positive(default_rpm), positive(burst)),
        Some(own) if burst == default_rpm => (positive(own), positive(own)),
        Some(own) => (positive(own), positive(burst)),
    }
}

fn nanos(at: DateTime<Utc>) -> UnixNanos {
    UnixNanos(
        at.timestamp_nanos_opt()
            .and_then(|nanos| u64::try_from(nanos).ok())
            .unwrap_or(u64::MAX),
    )
}

#[cfg(test)]
mod tests;
