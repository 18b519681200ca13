//! Calendar quotas: windows of days and months, and blocks of tokens from the ledger.

pub(super) mod block;
pub(super) mod calendar;
pub(super) mod ledger;
