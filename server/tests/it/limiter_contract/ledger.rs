//! An in-memory ledger that counts calls, and fails or delays them on request.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use quota_common::id::{ApiKeyId, TenantId};
use quota_server::{
    clock::UnixNanos,
    limiter::{
        LedgerError, Policy, QuotaLedger, QuotaWindow, ReturnBatch, TakeRequest, Taken, Window,
    },
};
use uuid::Uuid;

type Owner = (TenantId, ApiKeyId, Policy);

/// A window and its usage.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kept {
    pub(crate) window: QuotaWindow,
    pub(crate) used: u64,
}

#[derive(Debug, Default)]
pub(crate) struct TestLedger {
    rows: Mutex<HashMap<Owner, Vec<Kept>>>,
    applied: Mutex<HashSet<Uuid>>,
    down: AtomicBool,
    delay_ms: AtomicU64,
    /// The additional delay of returns.
    return_delay_ms: AtomicU64,
    /// How many of the next returns lose their response after they have been applied.
    lose_answers: AtomicU64,
    /// Whether the next take panics.
    panic: AtomicBool,
    takes: AtomicU64,
    calls: AtomicU64,
    under_way: AtomicU64,
    most_under_way: AtomicU64,
    largest: AtomicU64,
}

#[derive(Debug, thiserror::Error)]
#[error("connection refused")]
struct Down;

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

    pub(super) fn set_return_delay(&self, delay: Duration) {
        let ms = u64::try_from(delay.as_millis()).unwrap();
        self.return_delay_ms.store(ms, Ordering::SeqCst);
    }

    pub(super) fn lose_answers(&self, n: u64) {
        self.lose_answers.store(n, Ordering::SeqCst);
    }

    pub(super) fn panic_next(&self) {
        self.panic.store(true, Ordering::SeqCst);
    }

    /// Returns how many times tokens were requested.
    pub(crate) fn takes(&self) -> u64 {
        self.takes.load(Ordering::SeqCst)
    }

    /// Returns the number of calls, and the highest number of concurrent calls.
    pub(super) fn calls(&self) -> (u64, u64) {
        let calls = self.calls.load(Ordering::SeqCst);
        (calls, self.most_under_way.load(Ordering::SeqCst))
    }

    /// Returns the largest grant.
    pub(super) fn largest(&self) -> u64 {
        self.largest.load(Ordering::SeqCst)
    }

    /// Returns the total usage of all rows.
    pub(crate) fn used(&self) -> u64 {
        let rows = self.rows.lock().unwrap();
        rows.values().flatten().map(|row| row.used).sum()
    }

    /// Returns each owner's windows that have usage, ordered by start.
    pub(super) fn used_windows(&self) -> Vec<Vec<Kept>> {
        let rows = self.rows.lock().unwrap();
        let used = rows.values().map(|rows| {
            let mut used: Vec<_> = rows.iter().copied().filter(|row| row.used > 0).collect();
            used.sort_by_key(|row| row.window.span.start);
            used
        });
        used.collect()
    }

    /// Takes or returns tokens in every row, as another replica would.
    pub(super) fn adjust(&self, change: impl Fn(u64) -> u64) {
        for row in self.rows.lock().unwrap().values_mut().flatten() {
            row.used = change(row.used);
        }
    }

    async fn answer(&self) -> Result<(), LedgerError> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let under_way = self.under_way.fetch_add(1, Ordering::SeqCst) + 1;
        self.most_under_way.fetch_max(under_way, Ordering::SeqCst);
        let delay = self.delay_ms.load(Ordering::SeqCst);
        if delay > 0 {
            tokio::time::sleep(Duration::from_millis(delay)).await;
        } else {
            // Even the fastest database does not respond immediately.
            tokio::task::yield_now().await;
        }
        self.under_way.fetch_sub(1, Ordering::SeqCst);
        if self.down.load(Ordering::SeqCst) {
            return Err(Arc::new(Down));
        }
        Ok(())
    }

    fn take_one(&self, request: &TakeRequest) -> Taken {
        assert!(request.want > 0, "no tokens were requested");
        assert!(
            request.calendar.contains(request.at),
            "the window does not contain the request's time"
        );
        self.takes.fetch_add(1, Ordering::SeqCst);
        let owner = (request.tenant, request.key, request.policy);
        let mut rows = self.rows.lock().unwrap();
        let rows = rows.entry(owner).or_default();
        // Discard windows without usage.
        rows.retain(|row| row.used > 0);
        let known = rows
            .iter()
            .position(|row| row.window.span.contains(request.at));
        let index = known.unwrap_or_else(|| {
            rows.push(Kept {
                window: opened(request, rows),
                used: 0,
            });
            rows.len() - 1
        });
        let row = &mut rows[index];
        let quota = row.window.quota(request.limit);
        let granted = request.want.min(quota.saturating_sub(row.used));
        row.used += granted;
        self.largest.fetch_max(granted, Ordering::SeqCst);
        Taken {
            window: row.window,
            granted,
            used: row.used,
        }
    }
}

/// Returns the part of the day or month that does not overlap any other window.
fn opened(request: &TakeRequest, rows: &[Kept]) -> QuotaWindow {
    let Window { mut start, mut end } = request.calendar;
    let before = rows.iter().map(|row| row.window.span.end);
    if let Some(before) = before.filter(|before| *before <= request.at).max() {
        start = UnixNanos(start.0.max(before.0));
    }
    let after = rows.iter().map(|row| row.window.span.start);
    if let Some(after) = after.filter(|after| *after > request.at).min() {
        end = UnixNanos(end.0.min(after.0));
    }
    QuotaWindow {
        span: Window { start, end },
        period: request.calendar.length(),
    }
}

#[async_trait]
impl QuotaLedger for TestLedger {
    async fn take(&self, requests: &[TakeRequest]) -> Vec<Result<Taken, LedgerError>> {
        let owners: HashSet<_> = requests
            .iter()
            .map(|it| (it.tenant, it.key, it.policy))
            .collect();
        assert_eq!(owners.len(), requests.len(), "two requests for one block");
        assert!(!self.panic.swap(false, Ordering::SeqCst), "a planned panic");
        if let Err(error) = self.answer().await {
            return vec![Err(error); requests.len()];
        }
        requests.iter().map(|it| Ok(self.take_one(it))).collect()
    }

    async fn give_back(&self, batch: &ReturnBatch) -> Result<(), LedgerError> {
        assert!(!batch.rows.is_empty(), "no tokens are returned");
        assert!(
            batch.rows.is_sorted_by(|a, b| a.0 < b.0),
            "the rows are not in order"
        );
        let delay = self.return_delay_ms.load(Ordering::SeqCst);
        if delay > 0 {
            tokio::time::sleep(Duration::from_millis(delay)).await;
        }
        self.answer().await?;
        if self.applied.lock().unwrap().insert(batch.id) {
            let mut rows = self.rows.lock().unwrap();
            for (of, n) in &batch.rows {
                assert!(*n > 0, "a row returns no tokens");
                let rows = rows.get_mut(&(of.tenant, of.key, of.policy));
                let row = rows
                    .into_iter()
                    .flatten()
                    .find(|row| row.window.span.start == of.window_start)
                    .expect("only tokens that were taken are returned");
                row.used = row
                    .used
                    .checked_sub(*n)
                    .expect("no more tokens are returned than were taken");
            }
        }
        let lose = |left: u64| left.checked_sub(1);
        if self
            .lose_answers
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, lose)
            .is_ok()
        {
            return Err(Arc::new(Down));
        }
        Ok(())
    }
}
