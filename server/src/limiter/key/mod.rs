//! The state of one key in memory.

pub(super) mod demand;
pub(super) mod handle;
pub(super) mod ledger_calls;
mod ledger_queue;
mod ledger_worker;
mod quotas;
pub(super) mod state;
pub(super) mod table;
