//! Calendar quotas: their windows (calendar days and months), and the blocks of tokens taken from the ledger.

pub(super) mod block;
pub(super) mod calendar;
pub(super) mod ledger;
