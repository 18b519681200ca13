//! Requests that wait for quota tokens.

use std::{num::NonZeroU32, sync::Arc};

use super::{handle::KeyHandle, ledger_calls::LedgerCalls, state::KeyState};
use crate::{
    clock::UnixNanos,
    limiter::{
        policy::Policy,
        quota::block::{Need, ReservedTokens},
    },
};

/// A waiting request. Tokens fetched for the request are kept until the request [reserves](Self::reserve) them. The
/// reservation lasts until the tokens are spent or released. Dropping the guard releases reserved tokens.
pub(in crate::limiter) struct DemandGuard<'a> {
    calls: &'a Arc<LedgerCalls>,
    handle: &'a Arc<KeyHandle>,
    cost: NonZeroU32,
    reserved: Option<[ReservedTokens; 2]>,
}

impl<'a> DemandGuard<'a> {
    pub(in crate::limiter) fn new(
        calls: &'a Arc<LedgerCalls>,
        handle: &'a Arc<KeyHandle>,
        cost: NonZeroU32,
    ) -> Self {
        handle.state.lock().begin_wait(cost);
        Self {
            calls,
            handle,
            cost,
            reserved: None,
        }
    }

    fn tokens(&self) -> u64 {
        u64::from(self.cost.get())
    }

    /// Reserves the request's quota tokens if all blocks have enough, so that no other request can use the same tokens
    /// while this request waits for the other policies. Returns whether the tokens are reserved.
    pub(in crate::limiter) fn reserve(&mut self, state: &mut KeyState, now: UnixNanos) -> bool {
        if self.reserved.is_none() {
            self.reserved = state.reserve_quotas(self.tokens(), now);
            if self.reserved.is_some() {
                state.end_wait(self.cost);
            }
        }
        self.reserved.is_some()
    }

    /// Spends the reserved tokens. If the window of these tokens has ended, releases them and tries to spend tokens of
    /// the current window. Returns whether tokens were spent.
    pub(in crate::limiter) fn spend(&mut self, state: &mut KeyState, now: UnixNanos) -> bool {
        let Some(reserved) = self.reserved.take() else {
            return state.spend_quotas(self.tokens(), now);
        };
        state.begin_wait(self.cost);
        let is_spent = state.spend_reserved(reserved) || state.spend_quotas(self.tokens(), now);
        if is_spent {
            self.notify_denied(state);
        } else {
            state.notify_waiting();
        }
        is_spent
    }

    pub(in crate::limiter) fn spend_in_any_window(&mut self, state: &mut KeyState) {
        if let Some(reserved) = self.reserved.take() {
            state.begin_wait(self.cost);
            state.spend_reserved_in_any_window(reserved);
            self.notify_denied(state);
        }
    }

    /// Notifies the requests that wait for a reservation to be released, if some of them may now have to be denied.
    fn notify_denied(&self, state: &KeyState) {
        if state.waited_for > self.tokens() && state.may_deny_waiting() {
            state.notify_waiting();
        }
    }

    /// Releases the reserved tokens. The request then waits for tokens again.
    pub(in crate::limiter) fn release(&mut self, state: &mut KeyState) {
        if let Some(reserved) = self.reserved.take() {
            state.begin_wait(self.cost);
            state.release_reserved(reserved);
            if state.waited_for > self.tokens() {
                state.notify_waiting();
            }
        }
    }
}

impl Drop for DemandGuard<'_> {
    fn drop(&mut self) {
        let mut state = self.handle.state.lock();
        self.release(&mut state);
        state.end_wait(self.cost);
        state.free_notification();
        state.tidy();
        if self.calls.is_draining() {
            for policy in [Policy::Daily, Policy::Monthly] {
                self.calls.return_block(self.handle, &mut state, policy);
            }
            return;
        }
        let now = self.calls.clock.now();
        let is_last = state.waited_for == 0;
        for policy in [Policy::Daily, Policy::Monthly] {
            if state
                .block(policy)
                .is_some_and(|block| block.is_return_due(now) || (is_last && block.is_low(now)))
            {
                self.calls
                    .start(self.handle, &mut state, policy, Need::Ahead);
            }
        }
    }
}
