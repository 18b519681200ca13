//! What every store of limits promises, as one suite that runs on each of them, and a comparison with a
//! model that decides in the plainest way.
//!
//! A store takes part by a line in [`stores`]: a function that sets it up on a clock and a ledger of its own.

mod behavior;
mod concurrency;
mod ledger;
mod memory;
mod midnight;
mod model;
mod world;
mod zones;

pub(crate) use self::{ledger::TestLedger, world::START};

/// A far store keeps a clock of its own, which a test cannot set back.
#[tokio::test]
async fn a_clock_set_back_locks_nobody_out() {
    behavior::a_clock_set_back_locks_nobody_out(&world::memory()).await;
}

/// Runs the behaviors named here on every store.
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

        /// The memory store as if it were far away, so that the local gate stands in front of it.
        mod far_store {
            $(#[tokio::test]
            async fn $behavior() {
                super::behavior::$behavior(&super::world::far()).await;
            })*
        }
    };
}

on_every_store! {
    a_rested_key_gets_its_burst_and_then_waits_exactly,
    a_steady_key_gets_its_rate,
    a_denial_by_rate_consumes_no_quota,
    a_denial_by_quota_consumes_no_rate,
    every_violated_policy_is_named_and_the_longest_wait_told,
    a_cost_above_a_limit_is_refused_and_takes_nothing,
    a_cost_is_taken_whole,
    a_quota_begins_anew_with_the_local_day,
    a_quota_begins_anew_with_the_month,
    a_change_of_time_zone_gives_no_fresh_quota,
    a_clock_that_stands_still_refills_nothing,
    a_larger_burst_is_there_at_once_less_what_was_used,
    a_smaller_burst_is_no_fresh_one,
    a_detour_over_a_smaller_burst_gives_nothing,
    a_rest_across_an_edit_refills_at_the_lower_rate,
    a_raised_quota_is_in_force_at_once,
    a_lowered_quota_is_not_spent_beyond,
    a_key_finds_its_handle_again,
    keys_do_not_share,
    quotas_outlive_a_clean_stop_exactly,
    quotas_outlive_a_crash_but_for_a_block,
    a_ledger_that_is_down_admits_nothing_and_stops_no_rate,
    tokens_given_back_by_others_are_found,
    peeking_takes_nothing,
}
