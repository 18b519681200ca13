//! What is known of a key or token, by the hash of its text.

use std::{
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
    clock::UnixNanos,
    limiter::{KeyCell, Limiter, Policies, RatePolicy, Zone},
    repo::api_key::{FoundKey, KeyFacts},
    revocations::Gone,
    secret_text::{Hash, SecretText},
    telemetry::metrics::Metrics,
};

use super::{
    index::KeyIndex,
    lookups::{Lookups, Source},
    shared::SharedKeys,
};

/// Nanoseconds between two notes of a key's use.
const NOTE_EVERY: u64 = 1_000_000_000;

/// An API key, with its limits and the cell that keeps them.
#[derive(Debug)]
pub struct KeyRecord {
    pub tenant: TenantId,
    pub id: ApiKeyId,
    pub plan_id: PlanId,
    pub plan: String,
    /// What may be logged of the text.
    pub prefix: String,
    pub is_active: bool,
    pub expires_at: Option<UnixNanos>,
    pub billing: Billing,
    pub policies: Policies,
    pub cell: Arc<KeyCell>,
    /// Written by the module that writes the other fields.
    pub fields: OnceLock<LimitFields>,
    /// When its last use was noted.
    noted_at: AtomicU64,
}

/// The fields of an answer that are the same for every request of a key.
#[derive(Debug)]
pub struct LimitFields {
    /// `X-RateLimit-Limit`
    pub limit: http::HeaderValue,
    /// `RateLimit-Policy`
    pub policy: http::HeaderValue,
}

/// Why a key opens nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    Unknown,
    Inactive,
    Expired,
}

impl KeyRecord {
    /// Whether the key opens anything `now`, which is asked for only where it counts.
    pub fn usable(&self, now: impl FnOnce() -> UnixNanos) -> Result<(), Refusal> {
        if !self.is_active {
            return Err(Refusal::Inactive);
        }
        match self.expires_at {
            Some(end) if end <= now() => Err(Refusal::Expired),
            _ => Ok(()),
        }
    }
}

impl KeyRecord {
    /// Whether a use at `now` is worth noting: the last one noted is a second old, or of a clock that was
    /// ahead. So a busy key costs no more than an idle one.
    pub fn is_worth_noting(&self, now: UnixNanos) -> bool {
        let noted_at = self.noted_at.load(Ordering::Relaxed);
        let worth = now.0.abs_diff(noted_at) >= NOTE_EVERY;
        if worth {
            self.noted_at.store(now.0, Ordering::Relaxed);
        }
        worth
    }
}

/// A service token.
#[derive(Debug, Clone, Copy)]
pub struct ServiceRecord {
    pub tenant: TenantId,
    pub id: ServiceTokenId,
}

/// Finds keys and service tokens by their text. Cheap to clone.
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
    /// Without `shared`, what is not in memory is asked of PostgreSQL.
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

    /// The record of the key with this text, usable or not; `None` when there is none. `now` is by the
    /// monotonic clock. `source` is who causes the look-up of a key that is not known.
    pub async fn key(
        &self,
        text: &SecretText,
        now: u64,
        source: Source,
    ) -> Result<Option<Arc<KeyRecord>>, Unconfirmed> {
        let hash = text.hash();
        if let Some(known) = self.keys.peek_at(&hash, now) {
            return Ok(known);
        }
        let source = (!self.keys.holds(&hash)).then_some(source);
        let (lookups, limiter, shared) = (
            self.lookups.keys.clone(),
            self.limiter.clone(),
            self.shared.clone(),
        );
        let (index, cached) = (self.index.clone(), self.keys.clone());
        let record = move |facts: KeyFacts, as_of| {
            // Before it is cached.
            let owners = [facts.tenant_id, facts.plan_id, facts.id];
            index.add(hash, owners, |hash| cached.holds_or_loads(hash));
            record(facts, as_of, &limiter)
        };
        self.keys
            .get(hash, move || {
                let (lookups, record, shared) = (lookups.clone(), record.clone(), shared.clone());
                async move {
                    let lookup = lookups.begin(source)?;
                    if let Some(shared) = &shared
                        && let Some(found) = shared.get(&hash).await
                    {
                        let as_of = found.as_of;
                        let record = found.facts.map(|facts| record(facts, as_of));
                        return Ok(Loaded {
                            value: record.transpose()?,
                            true_at: Some(found.true_at),
                        });
                    }
                    let facts = lookup.find(hash).await?;
                    if let Some(shared) = &shared {
                        shared.put(&hash, facts.as_ref().map(|(facts, as_of)| (facts, *as_of)));
                    }
                    let record = facts.map(|(facts, as_of)| record(facts, as_of));
                    Ok(record.transpose()?.into())
                }
            })
            .await
    }

    pub async fn service_token(
        &self,
        text: &SecretText,
        source: Source,
    ) -> Result<Option<Arc<ServiceRecord>>, Unconfirmed> {
        let hash = text.hash();
        if let Some(known) = self.tokens.peek(&hash) {
            return Ok(known);
        }
        let source = (!self.tokens.holds(&hash)).then_some(source);
        let lookups = self.lookups.tokens.clone();
        self.tokens
            .get(hash, move || {
                let lookups = lookups.clone();
                async move {
                    let owner = lookups.begin(source)?.find(hash).await?;
                    Ok(owner.map(|(tenant, id)| ServiceRecord { tenant, id }))
                }
            })
            .await
    }

    /// Forgets what changes have made untrue.
    pub fn revoke(&self, gone: &Gone) {
        if gone.any_key() {
            // Loads in progress are repeated, including those that the index does not have yet.
            self.keys.forget_these(|| self.index.take(gone));
        }
        if gone.any_token() {
            self.tokens
                .forget(|_, token| gone.token(token.tenant.0, token.id.0));
        }
    }

    /// The record of a key that was found by its ID. It has the same limiter state as the one that requests find.
    pub fn described(&self, found: FoundKey) -> Result<KeyRecord, Unconfirmed> {
        record(found.facts, found.as_of, &self.limiter)
    }

    /// Forgets every key and token.
    pub fn forget_all(&self) {
        self.keys.forget(|_, _| true);
        self.tokens.forget(|_, _| true);
    }

    /// A text that was looked up before it existed exists now.
    pub fn made(&self, text: &SecretText) {
        let hash = text.hash();
        self.keys.forget_absent(&hash);
        self.tokens.forget_absent(&hash);
    }
}

fn record(facts: KeyFacts, as_of: i64, limiter: &Limiter) -> Result<KeyRecord, Unconfirmed> {
    let (tenant, id) = (TenantId(facts.tenant_id), ApiKeyId(facts.id));
    let cell = limiter
        .cell(tenant, id)
        .map_err(|error| Unconfirmed::Failed(error.to_string().into()))?;
    let (rpm, burst) = rate(facts.default_rpm, facts.burst, facts.rpm_override);
    let zone = Zone::named(&facts.time_zone).unwrap_or_else(|_| {
        tracing::error!(zone = facts.time_zone, tenant = %tenant, "an unknown time zone is read as UTC");
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
                .and_then(OnRedisFailure::named),
        )
        // Grows with every change of anything.
        .with_version(u64::try_from(as_of).unwrap_or(0)),
        cell,
        fields: OnceLock::new(),
        noted_at: AtomicU64::new(0),
    })
}

/// The rate and burst of a key. An override takes the rate's place; the burst follows it where the plan's
/// burst is its rate, which is what a plan has that names none.
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
