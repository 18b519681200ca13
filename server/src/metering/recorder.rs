//! The usage segments of this process: the current segment, a spare segment that is used next, sealed segments that wait
//! to be shipped, and a retired segment whose file is reused.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;

use super::{
    directory::{self, Directory},
    record::{ENDPOINT_MAX, REQUEST_ID_MAX},
    reusable::{Reusable, ReusableSpace},
    segment::{ReservedRecord, Segment},
    sync::Syncer,
    time::EventClock,
};
use crate::{
    clock::{Clock, Monotonic, Nanos, UnixNanos},
    config::Durability,
    telemetry::metrics::Metrics,
};

/// The size of a segment, unless the maximum backlog is smaller than eight segments of this size.
const SEGMENT_MAX: u64 = 8 << 20;
/// The minimum size of a segment: enough for more than a hundred records of maximum length.
const SEGMENT_MIN: u64 = 64 << 10;
/// The maximum age of a segment in use, in nanoseconds. Without this limit, an idle replica's segment could become
/// older than the retention of the usage log (at least two days). Such a segment is rejected if it has no cursor in
/// PostgreSQL.
const MAX_AGE: u64 = 6 * 3_600_000_000_000;
/// The maximum age of a file that is reused, in nanoseconds. Linux writes changed pages to disk after 30 seconds by
/// default. From then on, the first write to each page could have to wait for the disk.
const REUSED_MAX_AGE: u64 = 20_000_000_000;
/// The minimum time between attempts to create a segment after a failure.
const RETRY: Nanos = Nanos::from_millis(100);

/// Why decisions cannot be recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unrecordable {
    #[error("the usage backlog has reached QUOTA_USAGE_BACKLOG_MAX")]
    BacklogFull,
    #[error("no space left for usage records in QUOTA_DATA_DIR")]
    DiskFull,
    #[error("QUOTA_DATA_DIR is read-only")]
    ReadOnly,
    #[error("usage cannot be written to QUOTA_DATA_DIR")]
    Failed,
}

impl From<&io::Error> for Unrecordable {
    fn from(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull,
            io::ErrorKind::ReadOnlyFilesystem => Self::ReadOnly,
            _ => Self::Failed,
        }
    }
}

#[derive(Debug)]
pub(super) struct Recorder {
    /// The directory that contains the directories of all replicas.
    root: PathBuf,
    segment_size: u64,
    /// The maximum number of segments, including the spare one and a retired one.
    max_segments: usize,
    durability: Durability,
    clock: Arc<dyn Clock>,
    time: Arc<EventClock>,
    metrics: Arc<Metrics>,
    current: ArcSwapOption<Segment>,
    files: Mutex<Files>,
    reusable: Reusable,
    syncer: Option<Syncer>,
}

#[derive(Debug, Default)]
struct Files {
    directory: Option<Arc<Directory>>,
    spare: Option<Arc<Segment>>,
    /// Sealed segments that have not been removed yet, oldest first.
    sealed: Vec<Arc<Segment>>,
    /// A segment whose records have all been shipped. The next segment reuses its file.
    retired: Option<Arc<Segment>>,
    /// The number of segments, including a spare one that is being created, and a retired one.
    count: usize,
    /// The cause of the last failure to create a segment, and when the next attempt is allowed.
    failed: Option<(Unrecordable, Monotonic)>,
    is_creating_spare: bool,
    /// Whether recording has stopped. If so, no more spare segments are created.
    is_closed: bool,
}

impl Files {
    /// Deletes the file of a segment that contains no records.
    fn remove_unused(&mut self, segment: &Segment) {
        self.count -= 1;
        let _ = std::fs::remove_file(&segment.path);
    }

    fn take_retired(&mut self) -> Option<Arc<Segment>> {
        let retired = self.retired.take()?;
        self.count -= 1;
        Some(retired)
    }
}

impl Recorder {
    pub fn new(
        root: PathBuf,
        backlog_max: u64,
        durability: Durability,
        clock: Arc<dyn Clock>,
        time: Arc<EventClock>,
        metrics: Arc<Metrics>,
    ) -> io::Result<Arc<Self>> {
        let segment_size = (backlog_max / 8).clamp(SEGMENT_MIN, SEGMENT_MAX) & !0xfff;
        let max_segments = usize::try_from(backlog_max / segment_size).unwrap_or(usize::MAX);
        let syncer = match durability {
            Durability::Process => None,
            Durability::Machine => {
                let metrics = metrics.clone();
                let on_failure = move |segment: &Segment, error: &io::Error| {
                    metrics.usage_sync_errors.inc();
                    tracing::error!(
                        %error,
                        segment = %segment.head.id,
                        "usage records could not be written to disk"
                    );
                    // Further records go to another segment.
                    segment.seal();
                };
                // `fdatasync` also writes pages that were changed through a memory map.
                Some(Syncer::start(
                    |segment| segment.file.sync_data(),
                    on_failure,
                )?)
            }
        };
        Ok(Arc::new(Self {
            root,
            segment_size,
            max_segments: max_segments.max(2),
            durability,
            clock,
            time,
            metrics,
            current: ArcSwapOption::empty(),
            files: Mutex::default(),
            reusable: Reusable::default(),
            syncer,
        }))
    }

    /// Reserves space for a record whose strings have these lengths in bytes.
    #[inline]
    pub fn reserve(
        &self,
        endpoint: usize,
        request_id: usize,
    ) -> Result<ReservedRecord, Unrecordable> {
        let current = self.current.load();
        if let Some(segment) = current.as_ref()
            && let Some(reserved) = segment.reserve(endpoint, request_id)
        {
            return Ok(reserved);
        }
        drop(current);
        self.reserve_in_next(endpoint, request_id)
    }

    /// Reserves space for a record that will probably not be written.
    #[cold]
    pub fn reserve_reusable(&self) -> Result<ReusableSpace, Unrecordable> {
        self.reusable
            .take(|| self.reserve(ENDPOINT_MAX, REQUEST_ID_MAX))
    }

    /// Takes back reserved space in which no record was written.
    pub fn give_back(&self, space: ReusableSpace) {
        self.reusable.give_back(space);
    }

    /// Voids the reusable space that no request is using. Call before each of the shipper's passes.
    pub fn void_unused(&self) {
        self.reusable.begin_pass();
    }

    #[cold]
    fn reserve_in_next(
        &self,
        endpoint: usize,
        request_id: usize,
    ) -> Result<ReservedRecord, Unrecordable> {
        let mut files = self.files.lock();
        // Another thread may have replaced the segment already.
        let current = self.current.load_full();
        if let Some(segment) = &current
            && let Some(reserved) = segment.reserve(endpoint, request_id)
        {
            return Ok(reserved);
        }
        let next = match files.spare.take() {
            Some(spare) => spare,
            None => self.create_now(&mut files)?,
        };
        self.replace_current(&mut files, next.clone());
        next.reserve(endpoint, request_id)
            .ok_or(Unrecordable::Failed)
    }

    fn replace_current(&self, files: &mut Files, next: Arc<Segment>) {
        if let Some(last) = self.current.swap(Some(next)) {
            last.seal();
            files.sealed.push(last);
        }
    }

    fn create_now(&self, files: &mut Files) -> Result<Arc<Segment>, Unrecordable> {
        let now = self.clock.monotonic();
        if let Some((reason, retry_at)) = files.failed
            && now < retry_at
        {
            return Err(reason);
        }
        let retired = files.take_retired();
        let created = if files.count >= self.max_segments {
            Err(Unrecordable::BacklogFull)
        } else {
            self.directory(files)
                .and_then(|directory| self.create_in(&directory, retired))
                .map_err(|error| {
                    self.log_failure(files, &error);
                    Unrecordable::from(&error)
                })
        };
        match created {
            Ok(segment) => {
                files.count += 1;
                self.log_recovery(files);
                Ok(segment)
            }
            Err(reason) => {
                if files.failed.is_none() {
                    self.metrics.usage_unrecordable.set(1);
                    tracing::error!(%reason, "usage cannot be recorded; check requests get 503");
                }
                files.failed = Some((reason, now.saturating_add(RETRY)));
                Err(reason)
            }
        }
    }

    /// Logs that usage is being recorded again, if recording had failed. Call after creating a segment.
    fn log_recovery(&self, files: &mut Files) {
        if files.failed.take().is_some() {
            self.metrics.usage_unrecordable.set(0);
            tracing::info!("usage is being recorded again");
        }
    }

    /// Logs why a segment could not be created. Of consecutive failures, only the first is logged.
    fn log_failure(&self, files: &Files, error: &io::Error) {
        if files.failed.is_none() {
            tracing::error!(%error, path = %self.root.display(), "cannot create a usage segment");
        }
    }

    /// Returns the directory of this process, and creates it if necessary.
    fn directory(&self, files: &mut Files) -> io::Result<Arc<Directory>> {
        if let Some(directory) = &files.directory {
            return Ok(directory.clone());
        }
        let directory = Arc::new(Directory::create(&self.root, self.is_durable())?);
        files.directory = Some(directory.clone());
        Ok(directory)
    }

    /// Creates a segment. Reuses the file of the retired segment if possible.
    fn create_in(
        &self,
        directory: &Directory,
        retired: Option<Arc<Segment>>,
    ) -> io::Result<Arc<Segment>> {
        let started_at = self.now();
        match retired.map(Arc::try_unwrap) {
            Some(Ok(retired)) if self.is_reusable(&retired) => {
                if let Ok(segment) = retired.reuse(started_at) {
                    return Ok(Arc::new(segment));
                }
                // If that failed, the file was deleted.
            }
            Some(Ok(retired)) => {
                let _ = retired.delete_retired();
            }
            // Another thread may still be about to find out that the segment is sealed, so its memory must not be
            // reused.
            Some(Err(shared)) => {
                let _ = shared.delete_retired();
            }
            None => {}
        }
        let created = Segment::create(
            &directory.path,
            self.segment_size,
            started_at,
            self.is_durable(),
        );
        created.map(Arc::new)
    }

    fn is_durable(&self) -> bool {
        self.durability == Durability::Machine
    }

    pub fn now(&self) -> UnixNanos {
        self.time.at(self.clock.monotonic())
    }

    fn is_old(&self, segment: &Segment) -> bool {
        self.now().0.saturating_sub(segment.head.started_at.0) > MAX_AGE
    }

    fn is_reusable(&self, segment: &Segment) -> bool {
        let age = self.now().0.saturating_sub(segment.file_created_at.0);
        age <= REUSED_MAX_AGE
    }

    /// Returns whether a spare segment must be created or replaced.
    fn needs_spare(&self, files: &Files) -> bool {
        match &files.spare {
            None => files.count < self.max_segments || files.retired.is_some(),
            Some(spare) => self.is_old(spare),
        }
    }

    /// Returns whether the segment in use is so old that the spare segment must replace it.
    fn needs_rotation(&self, files: &Files) -> bool {
        let current = self.current.load();
        let is_old = |segment: &Arc<Segment>| self.is_old(segment);
        current.as_ref().is_some_and(is_old) && files.spare.as_ref().is_some_and(|it| !is_old(it))
    }

    /// Returns whether [`Self::create_spare`] has work to do.
    pub fn wants_spare(&self) -> bool {
        let files = self.files.lock();
        !files.is_closed && (self.needs_spare(&files) || self.needs_rotation(&files))
    }

    /// Creates the spare segment, and replaces segments that are too old. Blocks the calling thread. Decisions do not
    /// wait, unless there is no segment yet.
    pub fn create_spare(&self) {
        let (directory, retired) = {
            let mut files = self.files.lock();
            if files.is_closed {
                return;
            }
            if self.current.load().is_none() {
                // Create the first segment now, so that the first decision does not have to create it.
                if let Ok(first) = self.create_now(&mut files) {
                    self.current.store(Some(first));
                }
            }
            if self.needs_rotation(&files)
                && let Some(spare) = files.spare.take()
            {
                self.replace_current(&mut files, spare);
            }
            let is_needed = !files.is_creating_spare && self.needs_spare(&files);
            let Some(directory) = files.directory.clone().filter(|_| is_needed) else {
                return;
            };
            files.is_creating_spare = true;
            let retired = files.take_retired();
            files.count += 1;
            (directory, retired)
        };
        let spare = self.create_in(&directory, retired);
        let mut files = self.files.lock();
        files.is_creating_spare = false;
        if spare.is_ok() {
            self.log_recovery(&mut files);
        }
        match spare {
            Ok(spare)
                if !files.is_closed && files.spare.as_ref().is_none_or(|it| self.is_old(it)) =>
            {
                if let Some(old) = files.spare.replace(spare) {
                    files.remove_unused(&old);
                }
            }
            Ok(unused) => files.remove_unused(&unused),
            // The error is ignored, because decisions can still use the rest of the current segment, and an old spare
            // segment.
            Err(_) => files.count -= 1,
        }
    }

    /// Waits until the records written to the segment so far are as durable as configured. Returns `false` if they may
    /// be lost when the machine fails.
    pub async fn made_durable(&self, segment: Arc<Segment>) -> bool {
        match &self.syncer {
            None => true,
            Some(syncer) => syncer.sync(segment).await,
        }
    }

    /// Returns the segments that may contain records, oldest first.
    pub fn segments(&self) -> Vec<Arc<Segment>> {
        let files = self.files.lock();
        let mut segments = files.sealed.clone();
        segments.extend(self.current.load_full());
        segments
    }

    /// Returns the directory of this process, if it has been created.
    pub fn own_directory(&self) -> Option<Arc<Directory>> {
        self.files.lock().directory.clone()
    }

    /// Removes a segment's file by calling `remove`, unless the segment is still in use. Returns whether the file was
    /// removed.
    pub fn remove(
        &self,
        segment: &Segment,
        remove: impl FnOnce(&Path) -> io::Result<()>,
    ) -> io::Result<bool> {
        let mut files = self.files.lock();
        let Some(at) = files.sealed.iter().position(|it| it.is_same(segment)) else {
            return Ok(false);
        };
        remove(&segment.path)?;
        files.sealed.remove(at);
        files.count -= 1;
        Ok(true)
    }

    /// Removes a segment whose records have all been shipped, unless the segment is still in use. If possible, keeps the
    /// file for the next segment. Otherwise, deletes it. At most one file is kept. Returns whether the segment was
    /// removed.
    pub fn remove_shipped(&self, segment: &Segment) -> io::Result<bool> {
        // Reusing a file does not wait for the disk, so the new segment could be lost in a machine crash.
        if !self.is_durable() {
            let mut files = self.files.lock();
            let at = files.sealed.iter().position(|it| it.is_same(segment));
            if let Some(at) = at
                && files.retired.is_none()
                && files.count <= self.max_segments
                && self.is_reusable(segment)
                && !files.is_closed
                && segment.retire().is_ok()
            {
                files.retired = Some(files.sealed.remove(at));
                return Ok(true);
            }
        }
        self.remove(segment, directory::delete)
    }

    /// Stops recording. Call after the last request. Existing records can still be shipped.
    pub fn close(&self) {
        let mut files = self.files.lock();
        files.is_closed = true;
        if let Some(last) = self.current.swap(None) {
            last.seal();
            files.sealed.push(last);
        }
        if let Some(spare) = files.spare.take() {
            files.remove_unused(&spare);
        }
        if let Some(retired) = files.take_retired() {
            let _ = retired.delete_retired();
        }
    }

    pub fn is_creating(&self) -> bool {
        self.files.lock().is_creating_spare
    }

    /// Deletes the directory of this process if it contains no segments. Returns whether the directory was deleted.
    pub fn remove_directory(&self) -> io::Result<bool> {
        let mut files = self.files.lock();
        if files.count > 0 || self.current.load().is_some() {
            return Ok(false);
        }
        match files.directory.take().map(Arc::try_unwrap) {
            Some(Ok(directory)) => directory.remove(),
            _ => Ok(false),
        }
    }
}
