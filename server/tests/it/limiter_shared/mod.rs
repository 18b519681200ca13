//! Limits that many replicas share: the store in a simulated world, its script in a real Redis, and both of
//! them together while that is killed and frozen.

mod faults;
mod model;
mod script;
mod simulation;

pub(crate) use self::script::{ClockedCounters, started};
