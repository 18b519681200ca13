//! Everything about one key in memory.

pub(super) mod ledger_calls;
pub(super) mod state;
pub(super) mod table;
