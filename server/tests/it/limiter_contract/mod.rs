//! Tests of the contract of limit stores, which run on each store, and a comparison with a simple model.
//!
//! To include a store, add a module to the macro `on_every_store`, and add a function to `world` that creates the store
//! with its own clock and ledger.

mod behavior;
mod concurrency;
mod ledger;
mod memory;
mod midnight;
mod model;
mod world;
mod zones;

pub(crate) use self::{ledger::TestLedger, world::START};

/// Runs only on the local store: a remote store has its own clock, so it is not affected if a replica's clock is set
/// back.
#[tokio::test]
async fn clock_set_back_does_not_lock_keys_out() {
    behavior::clock_set_back_does_not_lock_keys_out(&world::memory()).await;
}

/// Runs the listed tests on every store.
macro_rules! on_every_store {
    ($($behavior:ident),* $(,)?) => {
        mod memory_store {
            $(#[tokio::test]
            async fn $behavior() {
                super::behavior::$behavior(&super::world::memory()).await;
            })*
        }

        mod redis_store {
            $(#[tokio::test]
            async fn $behavior() {
                let (world, _redis) = super::world::redis().await;
                super::behavior::$behavior(&world).await;
            })*
        }

        /// The local store, treated as a remote store with the denial cache in front of it.
        mod far_store {
            $(#[tokio::test]
            async fn $behavior() {
                super::behavior::$behavior(&super::world::far()).await;
            })*
        }
    };
}

on_every_store! {
    idle_key_gets_its_burst_and_then_waits_exactly,
    steady_key_gets_its_rate,
    denial_by_rate_consumes_no_quota,
    denial_by_quota_consumes_no_rate,
    every_violated_policy_is_named_with_the_longest_wait,
    cost_above_a_limit_is_denied_and_consumes_nothing,
    cost_is_taken_as_a_whole,
    quota_resets_with_the_local_day,
    quota_resets_with_the_month,
    change_of_time_zone_grants_no_new_quota,
    stopped_clock_refills_nothing,
    larger_burst_is_available_immediately_less_what_was_used,
    smaller_burst_is_not_a_new_one,
    lowering_and_raising_the_burst_grants_nothing,
    idle_time_that_spans_an_edit_refills_at_the_lower_rate,
    raised_quota_applies_immediately,
    lowered_quota_is_not_exceeded,
    key_finds_its_handle_again,
    keys_do_not_share,
    quotas_survive_a_clean_stop_exactly,
    quotas_survive_a_crash_except_for_a_block,
    failed_ledger_admits_nothing_and_does_not_affect_rates,
    tokens_returned_by_others_are_found,
    peek_consumes_nothing,
}
