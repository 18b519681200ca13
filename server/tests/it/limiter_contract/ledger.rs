//! A ledger in memory that obeys its trait, keeps a log, and fails or dawdles when told to.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use quota_server::limiter::{LedgerError, LedgerRow, QuotaLedger, Taken};

#[derive(Debug, Default)]
pub(crate) struct TestLedger {
    used: Mutex<HashMap<LedgerRow, u64>>,
    down: AtomicBool,
    delay_ms: AtomicU64,
    takes: AtomicU64,
    largest: AtomicU64,
}

impl TestLedger {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(super) fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::SeqCst);
    }

    pub(crate) fn set_delay(&self, delay: Duration) {
        let ms = u64::try_from(delay.as_millis()).unwrap();
        self.delay_ms.store(ms, Ordering::SeqCst);
    }

    /// How often tokens were asked for.
    pub(super) fn takes(&self) -> u64 {
        self.takes.load(Ordering::SeqCst)
    }

    /// The largest grant.
    pub(super) fn largest(&self) -> u64 {
        self.largest.load(Ordering::SeqCst)
    }

    /// All that is used, over all rows.
    pub(super) fn used(&self) -> u64 {
        self.used.lock().unwrap().values().sum()
    }

    /// Somebody else takes or gives back tokens of every row.
    pub(super) fn adjust(&self, change: impl Fn(u64) -> u64) {
        for used in self.used.lock().unwrap().values_mut() {
            *used = change(*used);
        }
    }

    async fn answer(&self) -> Result<(), LedgerError> {
        let delay = self.delay_ms.load(Ordering::SeqCst);
        if delay > 0 {
            tokio::time::sleep(Duration::from_millis(delay)).await;
        } else {
            // Even the fastest database answers later.
            tokio::task::yield_now().await;
        }
        if self.down.load(Ordering::SeqCst) {
            return Err("connection refused".into());
        }
        Ok(())
    }
}

#[async_trait]
impl QuotaLedger for TestLedger {
    async fn take(&self, row: LedgerRow, limit: u64, want: u64) -> Result<Taken, LedgerError> {
        assert!(want > 0, "asked for nothing");
        self.takes.fetch_add(1, Ordering::SeqCst);
        self.answer().await?;
        let mut rows = self.used.lock().unwrap();
        let used = rows.entry(row).or_default();
        let granted = want.min(limit.saturating_sub(*used));
        *used += granted;
        self.largest.fetch_max(granted, Ordering::SeqCst);
        Ok(Taken {
            granted,
            used: *used,
        })
    }

    async fn give_back(&self, row: LedgerRow, n: u64) -> Result<(), LedgerError> {
        assert!(n > 0, "gave nothing back");
        self.answer().await?;
        let mut rows = self.used.lock().unwrap();
        let used = rows.get_mut(&row).expect("only what was taken comes back");
        *used = used
            .checked_sub(n)
            .expect("no more comes back than was taken");
        Ok(())
    }
}
