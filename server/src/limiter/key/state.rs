//! The state of one key on this replica: its bucket or lease, and its blocks of calendar quotas.
//!
//! The state contains everything that a decision reads and changes under the key's lock, for every store. This module
//! does not read clocks, start tasks or make calls. It reports missing blocks to the store, which fetches them.

use std::{
    num::{NonZeroU32, NonZeroU64},
    sync::Arc,
};

use tokio::sync::Notify;

use super::quotas::QuotaBlocks;
pub(in crate::limiter) use super::quotas::{Denial, MissingBlocks, OnUnknown, Quotas};
use crate::{
    clock::{Moment, Monotonic, Nanos, UnixNanos},
    limiter::{
        decision::{Decision, Outcome, PolicyState},
        denial_cache::DenialCache,
        limits::{Limits, Policies},
        policy::{Policy, PolicySet},
        quota::{
            block::{Block, BlockStatus, Need, ReservedTokens},
            calendar::{self, Zone},
        },
        rate::{
            gcra::{Level, Verdict},
            lease::Lease,
        },
    },
};

/// The state of one key.
///
/// This struct is small, because there is one for each cached key. Data that only some keys need is boxed.
#[derive(Debug)]
pub(in crate::limiter) struct KeyState {
    /// The limits that were last applied to this state.
    limits: Option<Arc<Limits>>,
    /// The TAT of the local bucket. Used by the local store, and during an outage with the fallback setting `open`.
    pub(in crate::limiter) tat: UnixNanos,
    /// Debt beyond that of an empty bucket, left over from a larger burst.
    beyond: Nanos,
    /// When tokens were last taken from the bucket, or when its rate or burst was last edited, whichever is later.
    used_at: UnixNanos,
    /// `None` if the key has never had a quota.
    quotas: Option<Box<QuotaBlocks>>,
    /// `None` if the key has no state of the distributed store.
    remote: Option<Box<RemoteState>>,
    /// The total cost of requests that wait for quota tokens, except requests that have reserved these tokens.
    pub(in crate::limiter) waited_for: u64,
    /// An upper bound on the largest cost among the requests in `waited_for`.
    largest_wait: u32,
    /// See [`Lease::new`].
    is_plan_confirmed: bool,
}

/// A key's state in the distributed store.
#[derive(Debug)]
struct RemoteState {
    lease: Lease,
    denials: DenialCache,
}

impl KeyState {
    pub(in crate::limiter) fn new() -> Self {
        Self {
            limits: None,
            tat: UnixNanos(0),
            beyond: Nanos::ZERO,
            used_at: UnixNanos(0),
            quotas: None,
            remote: None,
            waited_for: 0,
            largest_wait: 0,
            is_plan_confirmed: false,
        }
    }

    fn level(&self) -> Level<UnixNanos> {
        Level {
            tat: self.tat,
            beyond: self.beyond,
        }
    }

    /// Returns the block of a policy, if the key has ever had a quota.
    pub(in crate::limiter) fn block(&mut self, policy: Policy) -> Option<&mut Block> {
        let quotas = self.quotas.as_deref_mut()?;
        match policy {
            Policy::Rpm | Policy::TenantMonthly => None,
            Policy::Daily => Some(&mut quotas.daily),
            Policy::Monthly => Some(&mut quotas.monthly),
        }
    }

    fn blocks(&self) -> impl Iterator<Item = (Policy, &Block)> {
        self.quotas.iter().flat_map(|quotas| quotas.blocks())
    }

    fn blocks_mut(&mut self) -> impl Iterator<Item = &mut Block> {
        let quotas = self.quotas.iter_mut();
        quotas.flat_map(|quotas| [&mut quotas.daily, &mut quotas.monthly])
    }

    /// Applies `policies` and brings the state up to `now`. `replicas` is the number of replicas that share each quota.
    pub(in crate::limiter) fn apply_policies(
        &mut self,
        policies: &Policies,
        now: UnixNanos,
        replicas: u64,
    ) {
        let limits = policies.limits();
        if !self
            .limits
            .as_ref()
            .is_some_and(|it| Arc::ptr_eq(it, limits))
        {
            let before = self.limits.replace(Arc::clone(limits));
            if before.as_ref().map(|it| it.fingerprint()) != Some(limits.fingerprint()) {
                self.apply_edit(policies, before.as_deref(), now);
            }
        }
        self.enter_windows(now, replicas);
        self.tat = policies.gcra().settled(self.tat, now);
        self.used_at = self.used_at.min(now);
    }

    /// Applies policies that differ from `before`, which is `None` if these are the first policies.
    fn apply_edit(&mut self, policies: &Policies, before: Option<&Limits>, now: UnixNanos) {
        let gcra = policies.gcra();
        if let Some(before) = before {
            if gcra != before.gcra() {
                let level = gcra.carry_over(before.gcra(), self.level(), self.used_at, now);
                (self.tat, self.beyond) = (level.tat, level.beyond);
                self.used_at = now;
            }
            self.is_plan_confirmed = false;
            if let Some(remote) = &mut self.remote {
                remote.lease.reset_after_edit();
                // If the edit is undone, the bucket may have refilled at the other rate in the meantime.
                remote.denials = DenialCache::default();
            }
            if before.zone() != policies.zone() {
                self.blocks_mut().for_each(Block::rezone);
            }
        }
        if policies.has_quota() {
            self.quotas
                .get_or_insert_with(|| Box::new(QuotaBlocks::new()));
        }
        if let Some(quotas) = self.quotas.as_deref_mut() {
            quotas.daily.set_limit(policies.daily());
            quotas.monthly.set_limit(policies.monthly());
        }
    }

    /// Switches the blocks to the windows that contain `now`. `replicas` is the number of replicas that share each
    /// quota.
    pub(in crate::limiter) fn enter_windows(&mut self, now: UnixNanos, replicas: u64) {
        let (Some(quotas), Some(limits)) = (self.quotas.as_deref_mut(), &self.limits) else {
            return;
        };
        for (policy, block) in [
            (Policy::Daily, &mut quotas.daily),
            (Policy::Monthly, &mut quotas.monthly),
        ] {
            block.share_among(replicas);
            if block.is_outdated(now) {
                block.enter(calendar::window(policy, limits.zone(), now), now);
            }
        }
    }

    fn remote(&mut self) -> &mut RemoteState {
        let new = || {
            Box::new(RemoteState {
                lease: Lease::new(self.is_plan_confirmed),
                denials: DenialCache::default(),
            })
        };
        self.remote.get_or_insert_with(new)
    }

    pub(in crate::limiter) fn lease(&mut self) -> &mut Lease {
        &mut self.remote().lease
    }

    pub(in crate::limiter) fn existing_lease(&mut self) -> Option<&mut Lease> {
        self.remote.as_mut().map(|remote| &mut remote.lease)
    }

    pub(in crate::limiter) fn denials(&mut self) -> &mut DenialCache {
        &mut self.remote().denials
    }

    pub(in crate::limiter) fn existing_denials(&self) -> Option<&DenialCache> {
        self.remote.as_ref().map(|remote| &remote.denials)
    }

    /// Frees the state of the distributed store if a new one would behave the same way.
    pub(in crate::limiter) fn free_remote(&mut self, monotonic: Monotonic) {
        let is_unneeded = |remote: &RemoteState| {
            remote.lease.is_like_new(monotonic) && remote.denials.is_like_new(monotonic)
        };
        if let Some(remote) = self.remote.take_if(|it| is_unneeded(it)) {
            self.is_plan_confirmed = remote.lease.is_plan_confirmed();
        }
    }

    /// Returns the notification for requests that wait for quota tokens. Returns `None` if the key has never had a
    /// quota.
    pub(in crate::limiter) fn call_ended(&mut self) -> Option<Arc<Notify>> {
        let quotas = self.quotas.as_deref_mut()?;
        Some(Arc::clone(quotas.call_ended.get_or_insert_default()))
    }

    /// Works like [`call_ended`](Self::call_ended), but returns `None` if the notification has not been created.
    pub(in crate::limiter) fn existing_call_ended(&self) -> Option<Arc<Notify>> {
        self.quotas.as_deref()?.call_ended.clone()
    }

    /// Notifies the requests that wait for quota tokens.
    pub(in crate::limiter) fn notify_waiting(&self) {
        if let Some(call_ended) = self.existing_call_ended() {
            call_ended.notify_waiters();
        }
    }

    /// Frees the notification if no request waits for it.
    pub(in crate::limiter) fn free_notification(&mut self) {
        if let Some(quotas) = self.quotas.as_deref_mut() {
            quotas.call_ended.take_if(|it| Arc::strong_count(it) == 1);
        }
    }

    /// Returns the time zone of days and months.
    pub(in crate::limiter) fn zone(&self) -> Zone {
        let limits = self.limits.as_ref();
        limits.map_or_else(Zone::utc, |limits| limits.zone().clone())
    }

    /// Takes `cost` from the local bucket and every quota, or takes nothing. Returns the decision, or the blocks that
    /// must be fetched first. Call [`apply_policies`](Self::apply_policies) with the same time first.
    pub(in crate::limiter) fn step(
        &mut self,
        policies: &Policies,
        cost: NonZeroU32,
        at: Moment,
        on_unknown: OnUnknown,
    ) -> Result<Decision, MissingBlocks> {
        let (tokens, now) = (u64::from(cost.get()), at.calendar);
        let rate = policies.gcra().decide(self.tat, now, cost);
        if let Verdict::Fits { tat } = rate
            && self.spend_quotas(tokens, now)
        {
            self.charge(tat, now);
            return Ok(self.decision(policies, at, Outcome::Allowed));
        }
        let Quotas { mut denial, .. } = {
            let quotas = self.quotas(tokens, now);
            let denied = !matches!(rate, Verdict::Fits { .. });
            if let Some(missing) = quotas.missing(denied, on_unknown) {
                return Err(missing);
            }
            quotas
        };
        denial.add_rate(rate);
        Ok(self.decision(policies, at, denial.outcome()))
    }

    /// Takes `cost` from the local bucket only, if it contains that many tokens.
    pub(in crate::limiter) fn take_rate(
        &mut self,
        policies: &Policies,
        cost: NonZeroU32,
        now: UnixNanos,
    ) -> Verdict<UnixNanos> {
        let verdict = policies.gcra().decide(self.tat, now, cost);
        if let Verdict::Fits { tat } = verdict {
            self.charge(tat, now);
        }
        verdict
    }

    fn charge(&mut self, tat: UnixNanos, now: UnixNanos) {
        self.beyond = self.level().beyond_at(now);
        self.tat = tat;
        self.used_at = now;
    }

    /// Returns whether the block of every calendar quota has at least `tokens` tokens.
    #[inline]
    pub(in crate::limiter) fn quotas_fit(&self, tokens: u64) -> bool {
        self.blocks().all(|(_, block)| {
            matches!(
                block.status(tokens),
                BlockStatus::Fits | BlockStatus::Unlimited
            )
        })
    }

    /// Spends `tokens` tokens of every calendar quota, or of none if a quota has too few. Returns whether tokens were
    /// spent.
    #[inline]
    pub(in crate::limiter) fn spend_quotas(&mut self, tokens: u64, now: UnixNanos) -> bool {
        let fits = self.quotas_fit(tokens);
        if fits {
            self.blocks_mut().for_each(|block| block.spend(tokens, now));
        }
        fits
    }

    /// Reserves `tokens` tokens of every calendar quota, or of none if a quota has too few.
    pub(in crate::limiter) fn reserve_quotas(
        &mut self,
        tokens: u64,
        now: UnixNanos,
    ) -> Option<[ReservedTokens; 2]> {
        self.quotas_fit(tokens).then(|| match &mut self.quotas {
            Some(quotas) => [
                quotas.daily.reserve(tokens, now),
                quotas.monthly.reserve(tokens, now),
            ],
            None => [ReservedTokens::NONE; 2],
        })
    }

    /// Spends reserved tokens if they belong to the current windows; otherwise, releases them.
    pub(in crate::limiter) fn spend_reserved(&mut self, reserved: [ReservedTokens; 2]) -> bool {
        let is_current = self
            .blocks()
            .zip(reserved)
            .all(|((_, block), reserved)| block.is_current(reserved));
        self.settle(reserved, is_current);
        is_current
    }

    pub(in crate::limiter) fn spend_reserved_in_any_window(
        &mut self,
        reserved: [ReservedTokens; 2],
    ) {
        self.settle(reserved, true);
    }

    pub(in crate::limiter) fn release_reserved(&mut self, reserved: [ReservedTokens; 2]) {
        self.settle(reserved, false);
    }

    /// Ends a reservation. Without blocks, nothing can have been reserved, since blocks are never freed before the key.
    fn settle(&mut self, reserved: [ReservedTokens; 2], is_spent: bool) {
        for (block, reserved) in self.blocks_mut().zip(reserved) {
            block.settle(reserved, is_spent);
        }
    }

    /// Adds a request that waits for quota tokens.
    pub(in crate::limiter) fn begin_wait(&mut self, cost: NonZeroU32) {
        self.waited_for += u64::from(cost.get());
        self.largest_wait = self.largest_wait.max(cost.get());
    }

    /// Removes a request that waited for quota tokens.
    pub(in crate::limiter) fn end_wait(&mut self, cost: NonZeroU32) {
        self.waited_for -= u64::from(cost.get());
        if self.waited_for == 0 {
            self.largest_wait = 0;
        }
    }

    /// Returns whether a waiting request may have to be denied: the quotas have too few tokens for the request, even if
    /// all reserved tokens are released.
    pub(in crate::limiter) fn may_deny_waiting(&self) -> bool {
        self.blocks().any(|(_, block)| {
            let status = block.status(u64::from(self.largest_wait));
            // `NeverFits` counts too: the request with the largest cost may no longer be waiting, and the other
            // requests may have to be denied.
            matches!(status, BlockStatus::Exhausted | BlockStatus::NeverFits)
        })
    }

    pub(in crate::limiter) fn quotas(&self, tokens: u64, now: UnixNanos) -> Quotas {
        let mut quotas = Quotas {
            denial: Denial::default(),
            unknown: PolicySet::EMPTY,
            short: PolicySet::EMPTY,
        };
        for (policy, block) in self.blocks() {
            match block.status(tokens) {
                BlockStatus::Unlimited | BlockStatus::Fits => {}
                BlockStatus::Short => quotas.short = quotas.short.with(policy),
                BlockStatus::Unknown => quotas.unknown = quotas.unknown.with(policy),
                BlockStatus::NeverFits => quotas.denial.add(policy, None),
                BlockStatus::Exhausted => {
                    let wait = block.window().span.end.saturating_since(now);
                    quotas.denial.add(policy, NonZeroU64::new(wait.0.max(1)));
                }
            }
        }
        quotas
    }

    /// Returns a decision with the state of the local bucket.
    pub(in crate::limiter) fn decision(
        &self,
        policies: &Policies,
        at: Moment,
        outcome: Outcome,
    ) -> Decision {
        let now = at.calendar;
        let rate = PolicyState {
            policy: Policy::Rpm,
            limit: u64::from(policies.rate().burst.get()),
            remaining: policies.gcra().remaining(self.tat, now),
            reset_at: self.tat.max(now),
            shortened_to: None,
        };
        self.decision_with(policies, at, outcome, rate)
    }

    pub(in crate::limiter) fn decision_with(
        &self,
        policies: &Policies,
        at: Moment,
        outcome: Outcome,
        rate: PolicyState,
    ) -> Decision {
        let quota = |policy, block: fn(&QuotaBlocks) -> &Block| {
            let block = block(self.quotas.as_deref()?);
            block.quota().map(|quota| PolicyState {
                policy,
                limit: quota,
                remaining: block.remaining(),
                reset_at: block.window().span.end,
                shortened_to: block.window().shortened_to(),
            })
        };
        Decision {
            at: at.calendar,
            monotonic: at.monotonic,
            outcome,
            rpm: policies.rate().rpm,
            rate,
            daily: quota(Policy::Daily, |quotas| &quotas.daily),
            monthly: quota(Policy::Monthly, |quotas| &quotas.monthly),
            tenant_monthly: None,
            degraded: false,
        }
    }

    /// Returns, for each quota, why the ledger should be called after a decision: to fetch tokens in advance, to return
    /// tokens, or to query an exhausted quota again.
    pub(in crate::limiter) fn pending_refills(
        &self,
        decision: &Decision,
        now: UnixNanos,
    ) -> Option<[Option<Need>; 2]> {
        let quotas = self.quotas.as_deref()?;
        let violated = decision.violated();
        let may_pass_later = decision.retry_after().is_some();
        let need = |policy, block: &Block| {
            if block.is_low(now) || block.is_return_due(now) {
                Some(Need::Ahead)
            } else if violated.contains(policy)
                && may_pass_later
                && block.is_worth_asking_again(now)
            {
                Some(Need::Again)
            } else {
                None
            }
        };
        let needs = [
            need(Policy::Daily, &quotas.daily),
            need(Policy::Monthly, &quotas.monthly),
        ];
        (needs != [None, None]).then_some(needs)
    }

    /// Returns how often the ledger has failed for the daily and the monthly block.
    pub(in crate::limiter) fn failures(&self) -> [u64; 2] {
        let quotas = self.quotas.as_deref();
        quotas.map_or([0; 2], |it| [it.daily.failures(), it.monthly.failures()])
    }

    #[inline]
    pub(in crate::limiter) fn tidy(&mut self) {
        let waited_for = self.waited_for;
        self.blocks_mut().for_each(|block| block.tidy(waited_for));
    }

    /// Returns whether this state is equivalent to the state of a new key.
    pub(in crate::limiter) fn is_forgettable(&self, now: UnixNanos, monotonic: Monotonic) -> bool {
        let remote = self.remote.as_ref();
        self.tat.saturating_add(self.beyond) <= now
            && remote.is_none_or(|remote| remote.lease.is_forgettable(monotonic))
            && self.blocks().all(|(_, block)| block.is_forgettable())
    }
}
