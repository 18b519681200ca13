//! Moves records from segments to PostgreSQL, each exactly once.
//!
//! A batch is one transaction: the segment's cursor moves from the start of the batch to its end, and the records are
//! inserted. If the cursor was elsewhere, or it is unknown whether the COMMIT succeeded, the cursor is read again.
//! While PostgreSQL is unreachable, the segments just grow.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};

use super::{
    directory::{self, Directory},
    recorder::Recorder,
    scan::{self, Batch, Writer},
    segment::{RECORDS_AT, Segment, SegmentHead},
};
use crate::{
    db::{Db, DbError, Lane},
    repo::{
        usage_log,
        usage_shipping::{self, Pending},
    },
    telemetry::metrics::Metrics,
};

/// The initial and the maximum number of records per transaction.
const FIRST: usize = 2_000;
const MOST: usize = 20_000;
const LEAST: usize = 50;
/// The intended duration of a batch.
const SHORT: Duration = Duration::from_millis(150);
const LONG: Duration = Duration::from_millis(600);
/// How often a directory's backlog is reported.
const REPORT: Duration = Duration::from_secs(1);
/// How often to search for directories of stopped replicas.
const ADOPT: Duration = Duration::from_secs(30);

/// A segment that is being shipped.
#[derive(Debug)]
struct Source {
    head: SegmentHead,
    file: Arc<File>,
    writer: Writer,
    /// Where the next batch begins. `None`: at the cursor.
    position: Option<u64>,
    /// The cursor as last read. Only space without records is between it and `position`.
    cursor: u64,
    shipped: u64,
    /// The time of the oldest record that was read but not shipped yet.
    oldest: Option<DateTime<Utc>>,
    state: SourceState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SourceState {
    /// More records may follow.
    Open,
    /// Everything was shipped.
    Complete,
    /// The segment is older than the log and has no cursor.
    Refused,
}

impl Source {
    fn new(head: SegmentHead, file: Arc<File>, writer: Writer) -> Self {
        Self {
            head,
            file,
            writer,
            position: None,
            cursor: RECORDS_AT as u64,
            shipped: 0,
            oldest: None,
            state: SourceState::Open,
        }
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "each shipper reads one segment at a time, which takes one thread of the pool"
    )]
    async fn read(&self, max: usize) -> io::Result<Batch> {
        let (file, head, writer) = (self.file.clone(), self.head, self.writer);
        let position = self.position.unwrap_or(self.cursor);
        let read = move || scan::read(&file, &head, position, writer, max);
        tokio::task::spawn_blocking(read)
            .await
            .map_err(io::Error::other)?
    }
}

/// Why records could not be shipped.
#[derive(Debug, thiserror::Error)]
pub enum ShipError {
    #[error("PostgreSQL did not accept usage records")]
    Database(#[from] DbError),
    #[error("a segment could not be read")]
    Read(#[from] io::Error),
}

/// Dependencies of a shipper.
#[derive(Debug)]
pub(super) struct Context {
    pub db: Db,
    /// Older segments without a cursor are rejected.
    pub retention: Duration,
    pub metrics: Arc<Metrics>,
    pub host: String,
}

impl Context {
    pub fn new(db: &Db, retention: Duration, metrics: Arc<Metrics>) -> Self {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        Self {
            db: db.on(Lane::Shipping),
            retention,
            metrics,
            host: host.trim().to_owned(),
        }
    }

    async fn open_cursor(&self, head: &SegmentHead) -> Result<Option<u64>, DbError> {
        let started_at =
            DateTime::from_timestamp_nanos(i64::try_from(head.started_at.0).unwrap_or(i64::MAX));
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

    /// Returns `false` if the cursor was not at `from`.
    async fn commit(&self, head: &SegmentHead, from: u64, batch: &Batch) -> Result<bool, DbError> {
        let position = |it: u64| i64::try_from(it).unwrap_or(i64::MAX);
        let shipped = async {
            let mut tx = self.db.system().await?;
            let (from, to) = (position(from), position(batch.end));
            if !usage_shipping::move_cursor(&mut tx, head.id, from, to).await? {
                return Ok(false);
            }
            let appended = usage_log::append(&mut tx, &batch.rows).await?;
            tx.commit().await?;
            self.metrics.usage_endpoints_folded.inc_by(appended.folded);
            Ok(true)
        };
        self.db.within_limit(shipped).await
    }

    async fn report(&self, directory: &Directory, pending: &Pending) -> Result<(), DbError> {
        let reported = async {
            let mut tx = self.db.system().await?;
            usage_shipping::report(&mut tx, directory.id, &self.host, pending).await?;
            tx.commit().await
        };
        self.db.within_limit(reported).await
    }

    async fn remove_report(&self, directory: &Directory) -> Result<(), DbError> {
        let removed = async {
            let mut tx = self.db.system().await?;
            usage_shipping::remove_report(&mut tx, directory.id).await?;
            tx.commit().await
        };
        self.db.within_limit(removed).await
    }
}

/// Adapts the size of batches to their duration.
#[derive(Debug)]
struct BatchSize(usize);

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

/// Ships one segment as far as possible. Returns the number of records.
async fn ship(
    context: &Context,
    source: &mut Source,
    size: &mut BatchSize,
) -> Result<u64, ShipError> {
    let mut shipped = 0;
    while source.state == SourceState::Open {
        // Before PostgreSQL is queried, so that the age of the backlog is known even while it is unreachable.
        let max = size.0;
        let batch = source.read(max).await?;
        source.oldest = batch.rows.first().map(|row| row.at);
        if source.position.is_none() {
            if batch.rows.is_empty() && source.cursor == RECORDS_AT as u64 {
                // A segment without records needs no cursor.
                if batch.is_complete {
                    source.state = SourceState::Complete;
                }
                return Ok(shipped);
            }
            match context.open_cursor(&source.head).await? {
                Some(cursor) => (source.cursor, source.position) = (cursor, Some(cursor)),
                None => {
                    source.state = SourceState::Refused;
                    return Ok(shipped);
                }
            }
            continue;
        }
        if batch.rows.is_empty() {
            source.position = Some(batch.end);
            context.metrics.usage_records_damaged.inc_by(batch.damaged);
            if batch.is_complete {
                source.state = SourceState::Complete;
            }
            return Ok(shipped);
        }
        let began = Instant::now();
        match context.commit(&source.head, source.cursor, &batch).await {
            Ok(true) => {
                let rows = batch.rows.len() as u64;
                size.took(began.elapsed());
                (source.cursor, source.position) = (batch.end, Some(batch.end));
                source.shipped += rows;
                source.oldest = None;
                shipped += rows;
                context.metrics.usage_records_shipped.inc_by(rows);
                context.metrics.usage_records_damaged.inc_by(batch.damaged);
                if batch.is_complete {
                    source.state = SourceState::Complete;
                } else if batch.rows.len() < max {
                    return Ok(shipped);
                }
            }
            // Another process ships this segment too.
            Ok(false) => source.position = None,
            Err(error) => {
                // It is unknown whether it was committed.
                source.position = None;
                size.failed();
                return Err(error.into());
            }
        }
    }
    Ok(shipped)
}

/// The directory of a stopped replica.
#[derive(Debug)]
struct Adopted {
    directory: Directory,
    sources: Vec<(Source, PathBuf)>,
}

impl Adopted {
    fn open(directory: Directory) -> io::Result<Self> {
        directory.delete_unfinished()?;
        let sources = sources(&directory.path, Writer::Ended)?;
        Ok(Self { directory, sources })
    }
}

/// The segments of a directory.
fn sources(directory: &Path, writer: Writer) -> io::Result<Vec<(Source, PathBuf)>> {
    let mut sources = Vec::new();
    for path in directory::segments(directory)? {
        let file = match File::open(&path) {
            Ok(file) => file,
            // Its owner has shipped it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        match SegmentHead::read(&file)? {
            Some(head) => sources.push((Source::new(head, Arc::new(file), writer), path)),
            None => {
                tracing::error!(path = %path.display(), "not a segment of usage records");
                if writer == Writer::Ended {
                    directory::set_aside(&path)?;
                }
            }
        }
    }
    Ok(sources)
}

/// Ships the segments of this process.
#[derive(Debug, Default)]
pub(super) struct Shipper {
    own: Vec<(Source, Arc<Segment>)>,
    size: BatchSize,
    reported_at: Option<Instant>,
}

/// Ships the records of stopped replicas.
#[derive(Debug, Default)]
pub(super) struct Adopter {
    adopted: Vec<Adopted>,
    size: BatchSize,
    looked_at: Option<Instant>,
}

fn is_due(last: Option<Instant>, every: Duration) -> bool {
    last.is_none_or(|at| at.elapsed() >= every)
}

impl Shipper {
    /// Ships all available records. Returns their number.
    pub async fn ship(&mut self, context: &Context, recorder: &Recorder) -> Result<u64, ShipError> {
        self.find_segments(recorder);
        let mut shipped = 0;
        let mut failed = None;
        for (source, _) in &mut self.own {
            match ship(context, source, &mut self.size).await {
                Ok(records) => shipped += records,
                Err(error) => {
                    let is_database = matches!(error, ShipError::Database(_));
                    failed = Some(error);
                    if is_database {
                        break;
                    }
                }
            }
        }
        // A segment that is full to the last word stays until the next one is in use.
        let mut deleted = Ok(());
        self.own.retain(|(source, segment)| {
            if source.state != SourceState::Complete {
                return true;
            }
            match recorder.delete(segment) {
                Ok(is_gone) => !is_gone,
                Err(error) => {
                    deleted = Err(error);
                    true
                }
            }
        });
        deleted?;
        self.measure(&context.metrics);
        if let Some(error) = failed {
            return Err(error);
        }
        self.report(context, recorder).await?;
        Ok(shipped)
    }

    fn find_segments(&mut self, recorder: &Recorder) {
        for segment in recorder.segments() {
            let known = self
                .own
                .iter()
                .any(|(source, _)| source.head == segment.head);
            if !known {
                let source = Source::new(segment.head, segment.file.clone(), Writer::Running);
                self.own.push((source, segment));
            }
        }
    }

    /// Returns what this process has recorded but not shipped yet.
    fn pending(&self) -> Pending {
        let (mut records, mut bytes, mut oldest) = (0, 0, None::<DateTime<Utc>>);
        for (source, segment) in &self.own {
            let recorded = segment.records.load(std::sync::atomic::Ordering::Relaxed);
            let left = recorded.saturating_sub(source.shipped);
            records += left;
            if left > 0 {
                let position = source.position.unwrap_or(source.cursor);
                bytes += segment.tail().saturating_sub(position);
            }
            oldest = match (oldest, source.oldest) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        }
        let number = |it: u64| i64::try_from(it).unwrap_or(i64::MAX);
        Pending {
            records: number(records),
            bytes: number(bytes),
            oldest: oldest.filter(|_| records > 0),
        }
    }

    fn measure(&self, metrics: &Metrics) {
        let pending = self.pending();
        metrics.usage_backlog_records.set(pending.records);
        metrics.usage_backlog_bytes.set(pending.bytes);
        let oldest = pending.oldest.map_or(0, |at| at.timestamp());
        metrics.usage_oldest_seconds.set(oldest);
    }

    async fn report(&mut self, context: &Context, recorder: &Recorder) -> Result<(), DbError> {
        if !is_due(self.reported_at, REPORT) {
            return Ok(());
        }
        if let Some(directory) = recorder.own_directory() {
            context.report(&directory, &self.pending()).await?;
            self.reported_at = Some(Instant::now());
        }
        Ok(())
    }

    /// Deletes the files of a process that has shipped everything. Call after [`Recorder::close`].
    pub async fn finish(
        &mut self,
        context: &Context,
        recorder: &Recorder,
    ) -> Result<(), ShipError> {
        self.find_segments(recorder);
        self.ship(context, recorder).await?;
        if !self.own.is_empty() {
            return Ok(());
        }
        if let Some(directory) = recorder.own_directory()
            && self.reported_at.is_some()
        {
            context.remove_report(&directory).await?;
        }
        recorder.remove_directory()?;
        Ok(())
    }
}

impl Adopter {
    /// Ships the records of stopped replicas in `root`. Returns their number.
    pub async fn ship(&mut self, context: &Context, root: &Path) -> Result<u64, ShipError> {
        if is_due(self.looked_at, ADOPT) {
            self.looked_at = Some(Instant::now());
            for path in directory::list(root)? {
                if let Some(directory) = Directory::adopt(&path)? {
                    tracing::info!(path = %path.display(), "took over the usage of a stopped replica");
                    self.adopted.push(Adopted::open(directory)?);
                }
            }
        }
        let mut shipped = 0;
        while let Some(adopted) = self.adopted.first_mut() {
            match ship_directory(context, adopted, &mut self.size).await {
                Ok(records) => shipped += records,
                Err(error) => {
                    // The next time, others come first.
                    self.adopted.rotate_left(1);
                    return Err(error);
                }
            }
            let adopted = self.adopted.remove(0);
            adopted.directory.remove()?;
        }
        Ok(shipped)
    }
}

async fn ship_directory(
    context: &Context,
    adopted: &mut Adopted,
    size: &mut BatchSize,
) -> Result<u64, ShipError> {
    let mut shipped = 0;
    for (source, path) in &mut adopted.sources {
        let records = ship(context, source, size).await?;
        context.metrics.usage_records_replayed.inc_by(records);
        shipped += records;
        match source.state {
            SourceState::Complete => delete(path)?,
            SourceState::Refused => {
                context.metrics.usage_segments_refused.inc();
                tracing::error!(
                    path = %path.display(),
                    "this segment is older than the usage log and was not shipped; it is kept for the operator"
                );
                directory::set_aside(path)?;
            }
            SourceState::Open => {}
        }
    }
    context.remove_report(&adopted.directory).await?;
    Ok(shipped)
}

fn delete(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// The result of `quota usage replay`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Replayed {
    pub records: u64,
    /// Whether a running process holds the directory. It ships the rest itself.
    pub is_owned: bool,
}

/// Ships the directory of a replica that will not return. Harmless if it is still running: finished records are shipped
/// and nothing is deleted.
pub(super) async fn replay(context: &Context, path: &Path) -> Result<Replayed, ShipError> {
    let mut size = BatchSize::default();
    if let Some(directory) = Directory::adopt(path)? {
        let mut adopted = Adopted::open(directory)?;
        let records = ship_directory(context, &mut adopted, &mut size).await?;
        adopted.directory.remove()?;
        return Ok(Replayed {
            records,
            is_owned: false,
        });
    }
    let mut records = 0;
    for (mut source, _) in sources(path, Writer::Running)? {
        records += ship(context, &mut source, &mut size).await?;
    }
    Ok(Replayed {
        records,
        is_owned: true,
    })
}
