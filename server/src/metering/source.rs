//! Moves records from a segment to PostgreSQL, each record exactly once.
//!
//! A batch is one transaction, which moves the segment's cursor from the start of the batch to its end and inserts the
//! records. If the cursor was at another position, or it is unknown whether the COMMIT succeeded, the cursor is read
//! again. While PostgreSQL is unreachable, the backlog grows.

use std::{
    fs::File,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use tokio::time::timeout;

use super::{
    directory::Directory,
    scan::{self, Span, Writer},
    segment::{RECORDS_AT, SegmentHead},
};
use crate::{
    db::{Db, DbError, Lane, SystemTx},
    repo::{
        usage_append,
        usage_batch::{UsageBatch, UsageBatchBuilder},
        usage_shipping::{self, Pending},
    },
    telemetry::metrics::Metrics,
};

/// The initial number of records per transaction.
const FIRST: usize = 2_000;
/// The maximum number of records per transaction.
const MOST: usize = 50_000;
/// The minimum number of records per transaction.
const LEAST: usize = 50;
/// If a transaction takes less time than this, the next batch is larger.
const SHORT: Duration = Duration::from_millis(300);
/// If a transaction takes more time than this, the next batch is smaller.
const LONG: Duration = Duration::from_millis(900);

/// The thread that reads a segment yields to other threads after this many records. It rarely blocks, so without yielding,
/// it would delay requests on the same core by milliseconds.
const YIELD_EVERY: usize = 4_000;

/// The maximum duration of a transaction. Its statements may take longer than the statements of a request.
const COMMIT: Duration = Duration::from_secs(40);

/// A segment that is being shipped.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) head: SegmentHead,
    pub(super) file: Arc<File>,
    pub(super) writer: Writer,
    /// Where the next batch begins. If `None`, it begins at the cursor, which must first be read from PostgreSQL.
    pub(super) position: Option<u64>,
    /// The cursor when it was last read or moved. There are no records between the cursor and `position`.
    pub(super) cursor: u64,
    pub(super) shipped: u64,
    /// The time of the oldest record that has been read but not shipped.
    pub(super) oldest: Option<DateTime<Utc>>,
    /// Whether a record is still being written. That record and all later records have not been read.
    pub(super) is_blocked: bool,
    pub(super) state: SourceState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SourceState {
    /// More records may follow.
    Open,
    /// Everything was shipped.
    Complete,
    /// The segment is older than `QUOTA_USAGE_RETENTION` and has no cursor.
    Rejected,
}

impl Source {
    pub(super) fn new(head: SegmentHead, file: Arc<File>, writer: Writer) -> Self {
        Self {
            head,
            file,
            writer,
            position: None,
            cursor: RECORDS_AT as u64,
            shipped: 0,
            oldest: None,
            is_blocked: false,
            state: SourceState::Open,
        }
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "each shipper reads one segment at a time, which takes one thread of the pool"
    )]
    async fn read(&self, max: usize) -> io::Result<(UsageBatch, Span)> {
        let (file, head, writer) = (self.file.clone(), self.head, self.writer);
        let position = self.position.unwrap_or(self.cursor);
        let read = move || {
            let mut batch = UsageBatchBuilder::default();
            let mut records = 0;
            let span = scan::read(&file, &head, position, writer, max, |it| {
                batch.push(it);
                records += 1;
                if records % YIELD_EVERY == 0 {
                    thread::yield_now();
                }
            })?;
            // The batch is also prepared on this thread, because the preparation takes milliseconds and would delay
            // requests on other threads.
            Ok((batch.build(), span))
        };
        tokio::task::spawn_blocking(read)
            .await
            .map_err(io::Error::other)?
    }
}

/// Why records could not be shipped.
#[derive(Debug, thiserror::Error)]
pub enum ShipError {
    #[error("cannot write usage records to PostgreSQL")]
    Database(#[from] DbError),
    #[error("a segment could not be read")]
    Read(#[from] io::Error),
}

impl ShipError {
    /// Returns whether other segments would fail too.
    pub(super) const fn is_outage(&self) -> bool {
        matches!(self, Self::Database(DbError::Unavailable(_)))
    }
}

/// Dependencies of a shipper.
#[derive(Debug)]
pub(super) struct Context {
    pub db: Db,
    /// Segments that are older than the retention and have no cursor are rejected.
    pub retention: Duration,
    pub metrics: Arc<Metrics>,
    pub host: String,
    /// Whether to leave the segments of stopped replicas to other replicas after the current batch.
    pub is_stopping: AtomicBool,
}

impl Context {
    pub fn new(db: &Db, retention: Duration, metrics: Arc<Metrics>) -> Self {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        Self {
            db: db.on(Lane::Shipping),
            retention,
            metrics,
            host: host.trim().to_owned(),
            is_stopping: AtomicBool::new(false),
        }
    }

    async fn open_cursor(&self, head: &SegmentHead) -> Result<Option<u64>, DbError> {
        let started_at = head.started_at.into();
        let opened = async {
            let mut tx = self.db.system().await?;
            let position = usage_shipping::open_cursor(
                &mut tx,
                head.id,
                i64::try_from(RECORDS_AT).unwrap_or(0),
                started_at,
                self.retention,
            )
            .await?;
            tx.commit().await?;
            Ok(position)
        };
        let position = self.db.within_limit(opened).await?;
        Ok(position.map(|it| u64::try_from(it).unwrap_or(0)))
    }

    /// Inserts a batch and commits the transaction. Returns `false` if the cursor was not at `from`.
    async fn commit(
        &self,
        mut tx: SystemTx,
        head: &SegmentHead,
        (from, to): (u64, u64),
        batch: &UsageBatch,
    ) -> Result<bool, DbError> {
        let position = |it: u64| i64::try_from(it).unwrap_or(i64::MAX);
        let shipped = async {
            let (from, to) = (position(from), position(to));
            if !usage_shipping::move_cursor(&mut tx, head.id, from, to).await? {
                return Ok(false);
            }
            let appended = usage_append::append(&mut tx, batch).await?;
            tx.commit().await?;
            self.metrics.usage_endpoints_folded.inc_by(appended.folded);
            Ok(true)
        };
        timeout(COMMIT, shipped).await.unwrap_or_else(|_| {
            Err(DbError::Unavailable(
                "writing a batch of usage took too long".into(),
            ))
        })
    }

    pub(super) async fn report(
        &self,
        directory: &Directory,
        pending: &Pending,
        at: DateTime<Utc>,
    ) -> Result<(), DbError> {
        let reported = async {
            let mut tx = self.db.system().await?;
            usage_shipping::report(&mut tx, directory.id, &self.host, pending, at).await?;
            tx.commit().await
        };
        self.db.within_limit(reported).await
    }

    pub(super) async fn remove_report(&self, directory: &Directory) -> Result<(), DbError> {
        let removed = async {
            let mut tx = self.db.system().await?;
            usage_shipping::remove_report(&mut tx, directory.id).await?;
            tx.commit().await
        };
        self.db.within_limit(removed).await
    }
}

/// Adapts the size of batches to their duration.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BatchSize(usize);

impl Default for BatchSize {
    fn default() -> Self {
        Self(FIRST)
    }
}

impl BatchSize {
    fn took(&mut self, elapsed: Duration) {
        if elapsed < SHORT {
            self.0 = (self.0 * 2).min(MOST);
        } else if elapsed > LONG {
            self.0 = (self.0 / 2).max(LEAST);
        }
    }

    fn failed(&mut self) {
        self.0 = (self.0 / 4).max(LEAST);
    }
}

/// Ships as much of a segment as possible. Returns the number of shipped records.
pub(super) async fn ship(
    context: &Context,
    source: &mut Source,
    size: &mut BatchSize,
) -> Result<u64, ShipError> {
    let mut shipped = 0;
    while source.state == SourceState::Open {
        if source.writer == Writer::Ended && context.is_stopping.load(Ordering::Relaxed) {
            return Ok(shipped);
        }
        // The segment is read before PostgreSQL is queried, so that the age of the backlog is known even while
        // PostgreSQL is unreachable.
        let max = size.0;
        let (batch, span) = source.read(max).await?;
        source.oldest = batch.oldest();
        source.is_blocked = span.is_blocked;
        if source.position.is_none() {
            if batch.is_empty() && source.cursor == RECORDS_AT as u64 {
                // A segment without records does not need a cursor.
                if span.is_complete {
                    source.state = SourceState::Complete;
                }
                return Ok(shipped);
            }
            match context.open_cursor(&source.head).await? {
                Some(cursor) => {
                    let is_read = cursor == source.cursor;
                    (source.cursor, source.position) = (cursor, Some(cursor));
                    if !is_read {
                        // The batch was read from another position, so it is discarded.
                        continue;
                    }
                }
                None => {
                    source.state = SourceState::Rejected;
                    context.metrics.usage_segments_rejected.inc();
                    tracing::error!(
                        segment = %source.head.id,
                        started_at = %DateTime::from(source.head.started_at),
                        "this segment is older than QUOTA_USAGE_RETENTION and will not be shipped; it was kept for inspection"
                    );
                    return Ok(shipped);
                }
            }
        }
        if batch.is_empty() {
            source.position = Some(span.end);
            context.metrics.usage_records_damaged.inc_by(span.damaged);
            if span.is_complete {
                source.state = SourceState::Complete;
            }
            return Ok(shipped);
        }
        let began = Instant::now();
        let moved = (source.cursor, span.end);
        // If this fails, for example because PostgreSQL is unreachable, a smaller batch would fail too.
        let tx = context.db.system().await?;
        match context.commit(tx, &source.head, moved, &batch).await {
            Ok(true) => {
                let rows = batch.len() as u64;
                size.took(began.elapsed());
                (source.cursor, source.position) = (span.end, Some(span.end));
                source.shipped += rows;
                source.oldest = None;
                shipped += rows;
                context.metrics.usage_records_shipped.inc_by(rows);
                context.metrics.usage_records_damaged.inc_by(span.damaged);
                if span.is_complete {
                    source.state = SourceState::Complete;
                } else if batch.len() < max {
                    return Ok(shipped);
                }
            }
            // The cursor has moved, because another process ships this segment too.
            Ok(false) => source.position = None,
            Err(error) => {
                // The batch may have been committed.
                source.position = None;
                size.failed();
                return Err(error.into());
            }
        }
    }
    Ok(shipped)
}
