//! Tests of limits that many replicas share: the store in a simulated world, its script in a real Redis, and both
//! together while Redis is slow, killed or frozen.

mod bursts;
mod credits;
mod faults;
mod model;
mod quotas;
mod script;
mod simulation;

pub(crate) use self::script::{ClockedCounters, started};
