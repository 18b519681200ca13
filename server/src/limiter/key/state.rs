//! The state of one key on this replica: its bucket or lease, and its blocks of calendar quotas.
//!
//! The state contains everything that a decision reads and changes under the key's lock, for every store. This module
//! does not read clocks, start tasks or make calls. It reports missing blocks to the store, which fetches them.

use std::num::{NonZeroU32, NonZeroU64};

use crate::{
    clock::{Monotonic, Nanos, UnixNanos},
    limiter::{
        decision::{Decision, Outcome, PolicyState},
        limits::Policies,
        policy::{Policy, PolicySet},
        quota::{
            block::{Block, BlockStatus, Need, ReservedTokens},
            calendar::{self, Zone},
        },
        rate::{
            gcra::{Gcra, Level, Verdict},
            lease::Lease,
        },
    },
};

/// The state of one key.
#[derive(Debug)]
pub(in crate::limiter) struct KeyState {
    /// Fingerprint of the policies that were last applied to this state; zero if no policies have been applied.
    fingerprint: u64,
    /// The time zone of days and months.
    zone: Zone,
    gcra: Gcra,
    /// The TAT of the local bucket. Used by the local store, and during an outage with the fallback setting `open`.
    pub(in crate::limiter) tat: UnixNanos,
    /// Debt beyond that of an empty bucket, left over from a larger burst.
    beyond: Nanos,
    /// When tokens were last taken from the bucket or the plan was last edited, whichever is later.
    used_at: UnixNanos,
    /// Used by the distributed store.
    pub(in crate::limiter) lease: Option<Box<Lease>>,
    daily: Block,
    monthly: Block,
    /// The total cost of requests that wait for quota tokens, except requests that have reserved these tokens.
    pub(in crate::limiter) waited_for: u64,
    /// An upper bound for the largest cost among these requests.
    largest_wait: u64,
}

/// The policies whose blocks must be fetched before a decision.
pub(in crate::limiter) type MissingBlocks = PolicySet;

/// What to do about policies for which the ledger has not responded yet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::limiter) enum OnUnknown {
    /// Fetch a block first.
    Wait,
    /// Blocks cannot be fetched, so deny the request if another policy denies it anyway.
    PassOver,
}

/// Whether the calendar quotas allow a cost.
pub(in crate::limiter) struct Quotas {
    pub(in crate::limiter) denial: Denial,
    /// Policies for which the ledger has not responded in this window.
    pub(in crate::limiter) unknown: PolicySet,
    /// Policies whose block has too few tokens, although the ledger should have enough.
    pub(in crate::limiter) short: PolicySet,
}

impl Quotas {
    /// Returns the policies whose blocks must be fetched before a decision. If the request is denied anyway, a block is
    /// worth fetching only if its quota may prolong the wait. `denied` means that the rate limit denies the request.
    pub(in crate::limiter) fn missing(
        &self,
        denied: bool,
        on_unknown: OnUnknown,
    ) -> Option<MissingBlocks> {
        if denied || !self.denial.violated.is_empty() {
            return (!self.unknown.is_empty() && on_unknown == OnUnknown::Wait)
                .then_some(self.unknown);
        }
        let missing: PolicySet = self.unknown.iter().chain(self.short.iter()).collect();
        (!missing.is_empty()).then_some(missing)
    }
}

impl KeyState {
    pub(in crate::limiter) fn new() -> Self {
        Self {
            fingerprint: 0,
            zone: Zone::utc(),
            gcra: Gcra::NONE,
            tat: UnixNanos(0),
            beyond: Nanos::ZERO,
            used_at: UnixNanos(0),
            lease: None,
            daily: Block::new(),
            monthly: Block::new(),
            waited_for: 0,
            largest_wait: 0,
        }
    }

    fn level(&self) -> Level<UnixNanos> {
        Level {
            tat: self.tat,
            beyond: self.beyond,
        }
    }

    pub(in crate::limiter) fn block(&mut self, policy: Policy) -> Option<&mut Block> {
        match policy {
            Policy::Rpm | Policy::TenantMonthly => None,
            Policy::Daily => Some(&mut self.daily),
            Policy::Monthly => Some(&mut self.monthly),
        }
    }

    /// Applies `policies` and brings the state up to `now`. `replicas` is the number of replicas that share each quota.
    pub(in crate::limiter) fn apply_policies(
        &mut self,
        policies: &Policies,
        now: UnixNanos,
        replicas: u64,
    ) {
        if self.fingerprint != policies.fingerprint() {
            let gcra = policies.gcra();
            if self.fingerprint != 0 {
                if gcra != self.gcra {
                    let level = gcra.carry_over(self.gcra, self.level(), self.used_at, now);
                    (self.tat, self.beyond) = (level.tat, level.beyond);
                    self.used_at = now;
                }
                if let Some(lease) = &mut self.lease {
                    lease.reset_after_edit();
                }
            }
            self.gcra = gcra;
            self.fingerprint = policies.fingerprint();
            if self.zone != *policies.zone() {
                self.zone = policies.zone().clone();
                self.daily.rezone();
                self.monthly.rezone();
            }
            self.daily.set_limit(policies.daily());
            self.monthly.set_limit(policies.monthly());
        }
        self.enter_windows(now, replicas);
        self.tat = self.gcra.settled(self.tat, now);
        self.used_at = self.used_at.min(now);
    }

    /// Switches the blocks to the windows that contain `now`. `replicas` is the number of replicas that share each
    /// quota.
    pub(in crate::limiter) fn enter_windows(&mut self, now: UnixNanos, replicas: u64) {
        self.daily.share_among(replicas);
        self.monthly.share_among(replicas);
        if self.daily.is_outdated(now) {
            let today = calendar::window(Policy::Daily, &self.zone, now);
            self.daily.enter(today, now);
        }
        if self.monthly.is_outdated(now) {
            let month = calendar::window(Policy::Monthly, &self.zone, now);
            self.monthly.enter(month, now);
        }
    }

    pub(in crate::limiter) fn lease(&mut self) -> &mut Lease {
        self.lease.get_or_insert_default()
    }

    pub(in crate::limiter) fn zone(&self) -> &Zone {
        &self.zone
    }

    /// Takes `cost` from the local bucket and every quota, or takes nothing. Call
    /// [`apply_policies`](Self::apply_policies) with `now` first.
    pub(in crate::limiter) fn step(
        &mut self,
        policies: &Policies,
        cost: NonZeroU32,
        now: UnixNanos,
        on_unknown: OnUnknown,
    ) -> Result<Decision, MissingBlocks> {
        let tokens = u64::from(cost.get());
        let rate = self.gcra.decide(self.tat, now, cost);
        if let Verdict::Fits { tat } = rate
            && self.spend_quotas(tokens, now)
        {
            self.charge(tat, now);
            return Ok(self.decision(policies, now, Outcome::Allowed));
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
        Ok(self.decision(policies, now, denial.outcome()))
    }

    /// Takes `cost` from the local bucket only, if it contains that many tokens.
    pub(in crate::limiter) fn take_rate(
        &mut self,
        cost: NonZeroU32,
        now: UnixNanos,
    ) -> Verdict<UnixNanos> {
        let verdict = self.gcra.decide(self.tat, now, cost);
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

    /// Returns whether the blocks of all calendar quotas contain `tokens` tokens.
    pub(in crate::limiter) fn quotas_fit(&self, tokens: u64) -> bool {
        let fits = |block: &Block| {
            matches!(
                block.status(tokens),
                BlockStatus::Fits | BlockStatus::Unlimited
            )
        };
        fits(&self.daily) && fits(&self.monthly)
    }

    /// Spends `tokens` tokens of every calendar quota, or of none if a quota has too few.
    pub(in crate::limiter) fn spend_quotas(&mut self, tokens: u64, now: UnixNanos) -> bool {
        let fits = self.quotas_fit(tokens);
        if fits {
            self.daily.spend(tokens, now);
            self.monthly.spend(tokens, now);
        }
        fits
    }

    /// Reserves `tokens` tokens of every calendar quota, or of none if a quota has too few.
    pub(in crate::limiter) fn reserve_quotas(
        &mut self,
        tokens: u64,
        now: UnixNanos,
    ) -> Option<[ReservedTokens; 2]> {
        self.quotas_fit(tokens).then(|| {
            [
                self.daily.reserve(tokens, now),
                self.monthly.reserve(tokens, now),
            ]
        })
    }

    /// Spends reserved tokens if they belong to the current windows; otherwise, releases them.
    pub(in crate::limiter) fn spend_reserved(
        &mut self,
        [daily, monthly]: [ReservedTokens; 2],
    ) -> bool {
        let is_current = self.daily.is_current(daily) && self.monthly.is_current(monthly);
        self.daily.settle(daily, is_current);
        self.monthly.settle(monthly, is_current);
        is_current
    }

    /// Spends reserved tokens, even if their window has ended.
    pub(in crate::limiter) fn spend_reserved_in_any_window(
        &mut self,
        [daily, monthly]: [ReservedTokens; 2],
    ) {
        self.daily.settle(daily, true);
        self.monthly.settle(monthly, true);
    }

    pub(in crate::limiter) fn release_reserved(&mut self, [daily, monthly]: [ReservedTokens; 2]) {
        self.daily.settle(daily, false);
        self.monthly.settle(monthly, false);
    }

    /// Adds a request that waits for quota tokens.
    pub(in crate::limiter) fn begin_wait(&mut self, cost: u64) {
        self.waited_for += cost;
        self.largest_wait = self.largest_wait.max(cost);
    }

    /// Removes a request that waited for quota tokens.
    pub(in crate::limiter) fn end_wait(&mut self, cost: u64) {
        self.waited_for -= cost;
        if self.waited_for == 0 {
            self.largest_wait = 0;
        }
    }

    /// Returns whether a waiting request may have to be denied: the quotas have too few tokens for the request, even if
    /// all reserved tokens are released.
    pub(in crate::limiter) fn may_deny_waiting(&self) -> bool {
        [&self.daily, &self.monthly].iter().any(|block| {
            let status = block.status(self.largest_wait);
            // `NeverFits` counts too: the largest cost may exceed the whole quota, and its request may no longer be
            // waiting.
            matches!(status, BlockStatus::Exhausted | BlockStatus::NeverFits)
        })
    }

    pub(in crate::limiter) fn quotas(&self, tokens: u64, now: UnixNanos) -> Quotas {
        let mut quotas = Quotas {
            denial: Denial::default(),
            unknown: PolicySet::EMPTY,
            short: PolicySet::EMPTY,
        };
        for (policy, block) in [
            (Policy::Daily, &self.daily),
            (Policy::Monthly, &self.monthly),
        ] {
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
        now: UnixNanos,
        outcome: Outcome,
    ) -> Decision {
        let rate = PolicyState {
            policy: Policy::Rpm,
            limit: u64::from(policies.rate().burst.get()),
            remaining: self.gcra.remaining(self.tat, now),
            reset_at: self.tat.max(now),
            shortened_to: None,
        };
        self.decision_with(policies, now, outcome, rate)
    }

    pub(in crate::limiter) fn decision_with(
        &self,
        policies: &Policies,
        now: UnixNanos,
        outcome: Outcome,
        rate: PolicyState,
    ) -> Decision {
        let quota = |policy, block: &Block| {
            block.quota().map(|quota| PolicyState {
                policy,
                limit: quota,
                remaining: block.remaining(),
                reset_at: block.window().span.end,
                shortened_to: block.window().shortened_to(),
            })
        };
        Decision {
            at: now,
            outcome,
            rpm: policies.rate().rpm,
            rate,
            daily: quota(Policy::Daily, &self.daily),
            monthly: quota(Policy::Monthly, &self.monthly),
            tenant_monthly: None,
            degraded: false,
        }
    }

    /// Returns what to fetch in advance for each quota.
    pub(in crate::limiter) fn pending_refills(
        &self,
        decision: &Decision,
        now: UnixNanos,
    ) -> Option<[Option<Need>; 2]> {
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
            need(Policy::Daily, &self.daily),
            need(Policy::Monthly, &self.monthly),
        ];
        (needs != [None, None]).then_some(needs)
    }

    /// Returns how often the ledger has failed for a policy's block.
    pub(in crate::limiter) fn failures(&self, policy: Policy) -> u64 {
        match policy {
            Policy::Rpm | Policy::TenantMonthly => 0,
            Policy::Daily => self.daily.failures(),
            Policy::Monthly => self.monthly.failures(),
        }
    }

    pub(in crate::limiter) fn tidy(&mut self) {
        self.daily.tidy(self.waited_for);
        self.monthly.tidy(self.waited_for);
    }

    /// Returns whether this state is equivalent to the state of a new key.
    pub(in crate::limiter) fn is_forgettable(&self, now: UnixNanos, monotonic: Monotonic) -> bool {
        self.tat.saturating_add(self.beyond) <= now
            && self
                .lease
                .as_ref()
                .is_none_or(|lease| lease.is_forgettable(monotonic))
            && self.daily.is_forgettable()
            && self.monthly.is_forgettable()
    }
}

/// A denial that is being assembled.
#[derive(Default)]
pub(in crate::limiter) struct Denial {
    pub(in crate::limiter) violated: PolicySet,
    wait: Option<NonZeroU64>,
    never: bool,
}

impl Denial {
    pub(in crate::limiter) fn add(&mut self, policy: Policy, wait: Option<NonZeroU64>) {
        self.violated = self.violated.with(policy);
        self.never |= wait.is_none();
        self.wait = self.wait.max(wait);
    }

    pub(in crate::limiter) fn add_rate<T: Copy>(&mut self, rate: Verdict<T>) {
        match rate {
            Verdict::Fits { .. } => {}
            Verdict::Wait { wait } => self.add(Policy::Rpm, Some(wait)),
            Verdict::NeverFits => self.add(Policy::Rpm, None),
        }
    }

    pub(in crate::limiter) fn outcome(self) -> Outcome {
        Outcome::Denied {
            violated: self.violated,
            retry_after: if self.never { None } else { self.wait },
        }
    }
}
