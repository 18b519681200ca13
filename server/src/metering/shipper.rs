//! Decides which segments to ship, and in which order. The segments may belong to this process, to stopped replicas, or
//! to a directory specified by an operator. [`source`](super::source) ships a single segment.

use std::{
    collections::{BTreeSet, VecDeque},
    fmt::Display,
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
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
    /// Why a segment could not be opened.
    unreadable: Option<io::Error>,
}

impl Adopted {
    /// Takes over a directory and opens its segments. Returns `None` if a running process holds the directory, or if
    /// the path is not an existing replica directory.
    fn take(path: &Path) -> io::Result<Option<Self>> {
        let Some(directory) = Directory::adopt(path)? else {
            return Ok(None);
        };
        directory.delete_unfinished()?;
        directory.move_rejected()?;
        let (sources, unreadable) = sources(path, Writer::Ended)?;
        Ok(Some(Self {
            directory,
            sources,
            unreadable,
        }))
    }

    /// Returns the number of segments that are neither completely shipped nor rejected.
    fn left(&self) -> usize {
        let sources = self.sources.iter();
        sources
            .filter(|(source, _)| source.state == SourceState::Open)
            .count()
    }

    fn is_done(&self) -> bool {
        self.left() == 0
    }
}

/// The segments of a directory, and the first error if a segment could not be opened.
type Sources = (Vec<(Source, PathBuf)>, Option<io::Error>);

fn sources(directory: &Path, writer: Writer) -> io::Result<Sources> {
    let (mut sources, mut unreadable) = (Vec::new(), None);
    for path in directory::segments(directory)? {
        match open(&path, writer) {
            Ok(source) => sources.extend(source.map(|it| (it, path))),
            Err(error) => {
                unreadable.get_or_insert(error);
            }
        }
    }
    Ok((sources, unreadable))
}

/// Opens a segment's file. Returns `None` if the file no longer exists or is not a segment.
fn open(path: &Path, writer: Writer) -> io::Result<Option<Source>> {
    let file = match File::open(path) {
        Ok(file) => file,
        // The segment's owner has already shipped it, and has deleted or renamed the file.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let Some(head) = SegmentHead::read(&file)? else {
        // If the directory's owner is running, it may have renamed the file since it was opened, and may be clearing it
        // for another segment.
        if writer == Writer::Ended {
            tracing::error!(path = %path.display(), "this file is not a usage segment");
            directory::set_aside(path)?;
        }
        return Ok(None);
    };
    Ok(Some(Source::new(head, Arc::new(file), writer)))
}

/// Ships the segments of this process.
#[derive(Debug, Default)]
pub(super) struct Shipper {
    own: Vec<(Source, Arc<Segment>)>,
    size: BatchSize,
    reported_at: Option<Instant>,
    /// Start time of the last pass that shipped everything.
    complete_until: Option<DateTime<Utc>>,
}

/// Ships the records of stopped replicas.
#[derive(Debug, Default)]
pub(super) struct Adopter {
    adopted: VecDeque<Adopted>,
    /// The number of segments that could not be shipped. These segments are retried the next time the adopter looks for
    /// directories.
    failed_segments: usize,
    size: BatchSize,
    looked_at: Option<Instant>,
    /// Directories with files that cannot be shipped or removed. The adopter retries these directories.
    failing: BTreeSet<PathBuf>,
}

fn is_due(last: Option<Instant>, every: Duration) -> bool {
    last.is_none_or(|at| at.elapsed() >= every)
}

impl Shipper {
    /// Ships all available records. Returns their number.
    pub async fn ship(&mut self, context: &Context, recorder: &Recorder) -> Result<u64, ShipError> {
        recorder.void_unused();
        // Every decision made before `began` is in one of the segments that `find_segments` finds.
        let began = recorder.now();
        self.find_segments(recorder);
        let mut shipped = 0;
        let mut failed = None;
        for (source, _) in &mut self.own {
            match ship(context, source, &mut self.size).await {
                Ok(records) => shipped += records,
                Err(error) => {
                    let is_outage = error.is_outage();
                    failed = Some(error);
                    if is_outage {
                        break;
                    }
                }
            }
        }
        if failed.is_none() && self.own.iter().all(|(source, _)| !source.is_blocked) {
            self.complete_until = Some(began.into());
        }
        // A segment that has been shipped completely is kept until the next segment is in use.
        let mut removed = Ok(());
        self.own.retain(|(source, segment)| {
            let is_removed = match source.state {
                SourceState::Open => Ok(false),
                SourceState::Complete => recorder.remove_shipped(segment),
                SourceState::Rejected => recorder.remove(segment, directory::set_aside),
            };
            match is_removed {
                Ok(is_removed) => !is_removed,
                Err(error) => {
                    removed = Err(error);
                    true
                }
            }
        });
        self.measure(&context.metrics);
        if let Some(error) = failed {
            return Err(error);
        }
        // The report comes first: even if a file cannot be removed, its records have been shipped.
        self.report(context, recorder).await?;
        removed?;
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

    /// Measures the backlog of this process.
    fn pending(&self) -> Pending {
        let (mut records, mut bytes, mut is_blocked) = (0, 0, false);
        let mut oldest = self.complete_until;
        for (source, segment) in &self.own {
            let recorded = segment.records.load(Ordering::Relaxed);
            let left = recorded.saturating_sub(source.shipped);
            records += left;
            if left > 0 {
                let position = source.position.unwrap_or(source.cursor);
                bytes += segment.tail().saturating_sub(position);
            }
            is_blocked |= source.is_blocked;
            let known = [
                oldest,
                source.oldest,
                // Used only if no pass has shipped everything yet.
                self.complete_until
                    .is_none()
                    .then(|| source.head.started_at.into()),
            ];
            oldest = known.into_iter().flatten().min();
        }
        let number = |it: u64| i64::try_from(it).unwrap_or(i64::MAX);
        Pending {
            records: number(records),
            bytes: number(bytes),
            oldest: oldest.filter(|_| records > 0 || is_blocked),
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
            let pending = self.pending();
            let at = match (pending.oldest, self.complete_until) {
                // Decisions made after `complete_until` may not have been shipped.
                (None, Some(complete_until)) => complete_until,
                _ => recorder.now().into(),
            };
            context.report(&directory, &pending, at).await?;
            self.reported_at = Some(Instant::now());
        }
        Ok(())
    }

    /// Ships the remaining records, then deletes this process's files. Keeps the files if any records have not been
    /// shipped. Call after [`Recorder::close`].
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
    /// Ships the records of stopped replicas in `root`. Returns the number of shipped records. If a segment cannot be
    /// shipped, the others are still shipped, unless PostgreSQL is unreachable. The first error is returned at the end.
    pub async fn ship(&mut self, context: &Context, root: &Path) -> Result<u64, ShipError> {
        let shipped = self.ship_all(context, root).await;
        let left = self.adopted.iter().map(Adopted::left).sum::<usize>() + self.failed_segments;
        let left = i64::try_from(left).unwrap_or(i64::MAX);
        context.metrics.usage_adopted_segments.set(left);
        shipped
    }

    async fn ship_all(&mut self, context: &Context, root: &Path) -> Result<u64, ShipError> {
        let (mut shipped, mut failed) = (0, None::<ShipError>);
        if is_due(self.looked_at, ADOPT) {
            self.looked_at = Some(Instant::now());
            self.failed_segments = 0;
            if let Err(error) = directory::delete_unfinished(root) {
                failed.get_or_insert(error.into());
            }
            for path in directory::list(root)? {
                match Adopted::take(&path) {
                    Ok(None) => {}
                    Ok(Some(adopted)) => {
                        if !self.failing.contains(&path) {
                            tracing::info!(path = %path.display(), "took over the usage of a stopped replica");
                        }
                        self.adopted.push_back(adopted);
                    }
                    Err(error) => {
                        self.note(path, &error);
                        failed.get_or_insert(error.into());
                    }
                }
            }
        }
        while let Some(mut adopted) = self.adopted.pop_front() {
            let path = adopted.directory.path.clone();
            let (records, error) = ship_directory(context, &mut adopted, &mut self.size).await;
            shipped += records;
            match error {
                Some(error) if error.is_outage() => {
                    // The next pass starts with the other directories.
                    self.adopted.push_back(adopted);
                    return Err(error);
                }
                Some(error) => {
                    self.failed_segments += adopted.left();
                    self.note(path, &error);
                    failed.get_or_insert(error);
                }
                None if !adopted.is_done() => break,
                None => match adopted.directory.remove() {
                    Ok(true) => {
                        self.failing.remove(&path);
                    }
                    Ok(false) => self.note(path, &"the directory contains other files"),
                    Err(error) => {
                        self.note(path, &error);
                        failed.get_or_insert(error.into());
                    }
                },
            }
        }
        failed.map_or(Ok(shipped), Err)
    }

    /// Logs a directory's failure only once.
    fn note(&mut self, path: PathBuf, error: &dyn Display) {
        if !self.failing.contains(&path) {
            tracing::error!(
                path = %path.display(), %error,
                "cannot ship or remove some files in this usage directory; all others are being shipped"
            );
            self.failing.insert(path);
        }
    }
}

/// Ships a directory's segments. Returns the number of shipped records and the first error. An error does not stop the
/// shipping of other segments, unless PostgreSQL is unreachable.
async fn ship_directory(
    context: &Context,
    adopted: &mut Adopted,
    size: &mut BatchSize,
) -> (u64, Option<ShipError>) {
    let (mut shipped, mut failed) = (0, adopted.unreadable.take().map(ShipError::from));
    for (source, path) in &mut adopted.sources {
        let before = source.shipped;
        let result = ship_segment(context, source, path, size).await;
        let records = source.shipped - before;
        context.metrics.usage_records_replayed.inc_by(records);
        shipped += records;
        match result {
            Err(error) if error.is_outage() => return (shipped, Some(error)),
            Err(error) => {
                failed.get_or_insert(error);
            }
            Ok(()) => {}
        }
    }
    if failed.is_none()
        && adopted.is_done()
        && let Err(error) = context.remove_report(&adopted.directory).await
    {
        failed = Some(error.into());
    }
    (shipped, failed)
}

/// Ships a segment of a process that has exited, and removes the segment when it is complete.
async fn ship_segment(
    context: &Context,
    source: &mut Source,
    path: &Path,
    size: &mut BatchSize,
) -> Result<(), ShipError> {
    ship(context, source, size).await?;
    match source.state {
        SourceState::Open => {}
        SourceState::Complete => directory::delete(path)?,
        SourceState::Rejected => directory::set_aside(path)?,
    }
    Ok(())
}

/// The result of `quota usage replay`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Replayed {
    pub records: u64,
    /// Whether a running process holds the directory. That process ships the remaining records.
    pub is_owned: bool,
}

/// Ships the usage records in the directory of a replica that will not return. If the replica is still running, ships
/// only finished records and does not delete anything.
pub(super) async fn replay(context: &Context, path: &Path) -> Result<Replayed, ShipError> {
    let mut size = BatchSize::default();
    if let Some(mut adopted) = Adopted::take(path)? {
        let (records, failed) = ship_directory(context, &mut adopted, &mut size).await;
        if let Some(error) = failed {
            return Err(error);
        }
        adopted.directory.remove()?;
        return Ok(Replayed {
            records,
            is_owned: false,
        });
    }
    let (mut records, mut failed) = (0, None);
    let (sources, unreadable) = sources(path, Writer::Running)?;
    for (mut source, _) in sources {
        match ship(context, &mut source, &mut size).await {
            Ok(shipped) => records += shipped,
            Err(error) if error.is_outage() => return Err(error),
            Err(error) => {
                failed.get_or_insert(error);
            }
        }
    }
    match failed.or(unreadable.map(ShipError::from)) {
        Some(error) => Err(error),
        None => Ok(Replayed {
            records,
            is_owned: true,
        }),
    }
}
