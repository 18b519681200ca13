//! Which segments are shipped, in which order, and by which process: those of this process, of stopped replicas, and of
//! a directory given by an operator. Shipping a segment is in [`source`](super::source).

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
    scan::Writer,
    segment::{Segment, SegmentHead},
    source::{BatchSize, Context, ShipError, Source, SourceState, ship},
};
use crate::{db::DbError, repo::usage_shipping::Pending, telemetry::metrics::Metrics};

/// How often a directory's backlog is reported.
const REPORT: Duration = Duration::from_secs(1);
/// How often to search for directories of stopped replicas.
const ADOPT: Duration = Duration::from_secs(30);

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

/// The segments in a directory.
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
        // A segment that is full to the last word is kept until the next one is in use.
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
                    // Next time, others come first.
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
