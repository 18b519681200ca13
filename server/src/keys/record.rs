//! The records of API keys and service tokens, found by their secrets.

use std::{
    num::{NonZeroU32, NonZeroU64},
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use chrono::{DateTime, Utc};
use quota_common::{
    ApiKeyId, PlanId, ServiceTokenId, TenantId,
    plan::{Billing, OnRedisFailure},
};

use crate::{
    cache::{Cached, CachedRow, Changes, Freshness, Loaded, Owner, Unconfirmed},
    clock::{Monotonic, Nanos, UnixNanos},
    limiter::{KeyHandle, Limiter, Policies, RatePolicy, TenantQuota, Zone},
    repo::{
        api_key::{FoundKey, KeyFacts},
        paid_access::PaidAccess,
    },
    secret_text::{Hash, Prefix, SecretText},
    spans,
    telemetry::metrics::Metrics,
};

use super::{
    lookups::{LookupCaller, Lookups},
    plan::{Attachment, PlanRecord, PlanRecords},
    shared::SharedKeys,
};

/// The minimum time between two recorded uses of a service token.
const NOTE_EVERY: Nanos = Nanos::from_secs(1);

/// An API key with its limits, and a handle to the state of the limits.
///
/// This struct is small, because there is one for each cached key: everything that many keys have in common is in the
/// plan's record.
#[derive(Debug)]
pub struct KeyRecord {
    pub plan: Arc<PlanRecord>,
    pub policies: Policies,
    pub handle: Arc<KeyHandle>,
    /// `u64::MAX` if the key does not expire.
    expires_at: UnixNanos,
    /// The second in which a use of the key was last recorded.
    noted_in: AtomicU32,
    /// The part of the secret that may be logged.
    pub prefix: Prefix,
    is_active: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rejection {
    Unknown,
    Inactive,
    Expired,
    /// The key is valid, but its plan is `paid` and its tenant has no access to paid plans.
    PaymentRequired,
}

impl KeyRecord {
    pub fn id(&self) -> ApiKeyId {
        self.handle.key()
    }

    pub fn tenant(&self) -> TenantId {
        self.plan.tenant
    }

    /// Checks whether the key may be used. If `billing_on` is set, paid plans require a subscription. Calls `now` only
    /// if the key or access to paid plans expires.
    pub fn usable(&self, billing_on: bool, now: impl Fn() -> UnixNanos) -> Result<(), Rejection> {
        if !self.is_active {
            return Err(Rejection::Inactive);
        }
        if self.expires_at != UnixNanos(u64::MAX) && self.expires_at <= now() {
            return Err(Rejection::Expired);
        }
        let is_paid = billing_on && self.plan.billing == Billing::Paid;
        if is_paid && !self.plan.paid_access.is_current(now) {
            return Err(Rejection::PaymentRequired);
        }
        Ok(())
    }

    /// Returns the quota that the key shares with its tenant's other keys. Returns `None` if there is no such quota, or
    /// if billing is on and the tenant has access to paid plans. Calls `now` only if access to paid plans expires.
    #[inline]
    pub fn tenant_quota(
        &self,
        billing_on: bool,
        now: impl Fn() -> UnixNanos,
    ) -> Option<&TenantQuota> {
        let quota = self.plan.tenant_quota.as_ref()?;
        (!billing_on || !self.plan.paid_access.is_current(now)).then_some(quota)
    }

    /// Returns whether to record a use at `now`. Returns `true` only for the first use in a second, so that busy keys
    /// do not cause more writes than other keys. Concurrent calls may all return `true`.
    pub fn is_worth_noting(&self, now: UnixNanos) -> bool {
        #[expect(clippy::cast_possible_truncation, reason = "only equal seconds matter")]
        let second = now.secs() as u32;
        let is_worth = self.noted_in.load(Ordering::Relaxed) != second;
        if is_worth {
            self.noted_in.store(second, Ordering::Relaxed);
        }
        is_worth
    }
}

impl CachedRow for KeyRecord {
    #[inline]
    fn has_changed(&self, changes: &Changes, loaded_in: u64) -> bool {
        changes.any_after(loaded_in, self.tenant().0, self.plan.id.0, self.id().0)
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
    /// Returns whether to record a use at `now`. Returns `true` at most once per second, except to concurrent calls.
    pub fn is_worth_noting(&self, now: UnixNanos) -> bool {
        let noted_at = self.noted_at.load(Ordering::Relaxed);
        let is_worth = Nanos(now.0.abs_diff(noted_at)) >= NOTE_EVERY;
        if is_worth {
            self.noted_at.store(now.0, Ordering::Relaxed);
        }
        is_worth
    }
}

impl CachedRow for ServiceRecord {
    fn has_changed(&self, changes: &Changes, loaded_in: u64) -> bool {
        changes.has_changed_after(loaded_in, Owner::Tenant(self.tenant.0))
            || changes.has_changed_after(loaded_in, Owner::ServiceToken(self.id.0))
    }
}

/// The start of a hash, by which keys are cached. 128 bits are enough: no one can find a second secret with the same
/// start, or choose a key's secret.
type HashStart = [u8; 16];

fn start(hash: &Hash) -> HashStart {
    let mut start = [0; 16];
    start.copy_from_slice(&hash[..16]);
    start
}

/// Finds API keys and service tokens by the hashes of their secrets. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct KeyStore {
    keys: Cached<HashStart, KeyRecord>,
    plans: Arc<PlanRecords>,
    tokens: Cached<Hash, ServiceRecord>,
    lookups: Lookups,
    limiter: Limiter,
    shared: Option<SharedKeys>,
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
            plans: Arc::default(),
            tokens: Cached::new(
                (capacity / 10).max(100),
                grace,
                freshness.clone(),
                metrics.clone(),
            ),
            lookups,
            limiter,
            shared,
        }
    }

    /// Returns the record of the key whose secret has this hash, even if the key is inactive. If the key is not cached
    /// on this replica, the lookup counts toward the limit of `caller`.
    pub async fn key(
        &self,
        hash: Hash,
        now: Monotonic,
        caller: LookupCaller,
    ) -> Result<Option<Arc<KeyRecord>>, Unconfirmed> {
        if let Some(known) = self.keys.peek_at(&start(&hash), now) {
            return Ok(known);
        }
        // This future is boxed, because it is large and rarely needed. Otherwise, every decision would reserve memory
        // for it.
        Box::pin(self.load_key(hash, caller)).await
    }

    async fn load_key(
        &self,
        hash: Hash,
        caller: LookupCaller,
    ) -> Result<Option<Arc<KeyRecord>>, Unconfirmed> {
        let caller = (!self.keys.holds(&start(&hash))).then_some(caller);
        let (lookups, shared) = (self.lookups.keys.clone(), self.shared.clone());
        let (limiter, plans) = (self.limiter.clone(), self.plans.clone());
        let span = spans::current();
        let record = move |facts, as_of| record(facts, as_of, &limiter, &plans);
        self.keys
            .get(start(&hash), move || {
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

    /// Returns the record of the service token with this hash, if it is known without waiting. `Some(None)` means that
    /// no service token has this hash.
    pub fn known_service_token(
        &self,
        hash: &Hash,
        now: Monotonic,
    ) -> Option<Option<Arc<ServiceRecord>>> {
        self.tokens.peek_at(hash, now)
    }

    /// Works like [`known_service_token`](Self::known_service_token), but loads the record if necessary.
    pub async fn service_token(
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

    /// Converts a key that was found by its ID into a record. The record uses the same limiter state as requests with
    /// the key.
    pub fn described(&self, found: FoundKey) -> Result<KeyRecord, Unconfirmed> {
        record(found.facts, found.as_of, &self.limiter, &self.plans)
    }

    /// Frees the records of keys that have changed, so that the limiter can drop the state of keys that are no longer
    /// used.
    pub fn sweep(&self) {
        self.keys.sweep();
    }

    /// Removes all records, and forgets which secrets do not exist.
    pub fn forget_all(&self) {
        self.keys.forget_all();
        self.tokens.forget_all();
    }

    /// Removes a secret from the cache of secrets that do not exist. Call after creating a key or token with that
    /// secret.
    pub fn created(&self, text: &SecretText) {
        let hash = text.hash();
        self.keys.forget_absent(&start(&hash));
        self.tokens.forget_absent(&hash);
    }
}

fn record(
    facts: KeyFacts,
    as_of: i64,
    limiter: &Limiter,
    plans: &PlanRecords,
) -> Result<KeyRecord, Unconfirmed> {
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
    let policies = Policies::new(
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
    );
    let plan = plans.share(PlanRecord {
        tenant,
        id: PlanId(facts.plan_id),
        name: facts.plan_name,
        billing: if facts.billing == "paid" {
            Billing::Paid
        } else {
            Billing::Free
        },
        paid_access: PaidAccess::new(facts.has_paid_access, facts.paid_access_until),
        policies,
        tenant_quota,
        headers: Attachment::default(),
    });
    Ok(KeyRecord {
        // The version increases with every change. The plan's record may have been loaded earlier, with another key, so
        // each key uses the version that its own load returned.
        policies: plan
            .policies
            .clone()
            .with_version(u64::try_from(as_of).unwrap_or(0)),
        plan,
        handle,
        expires_at: facts.expires_at.map_or(UnixNanos(u64::MAX), nanos),
        noted_in: AtomicU32::new(0),
        prefix: Prefix::of(&facts.prefix),
        is_active: facts.is_active,
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
