//! Metering: records decisions on known keys, and ships each record to PostgreSQL exactly once.
//!
//! A record is written to a *segment*, a file on this machine, before the response is sent, so recording does not wait
//! for the network. Space is reserved before the decision; without space, no decision is made. A *shipper* moves
//! records to PostgreSQL. Each segment has a *cursor*, the position up to which the segment has been shipped. The
//! transaction that inserts the records also advances the cursor. Records that have not been shipped yet are the
//! *backlog*.
//!
//! ```text
//! reserve -> decision -> fill, or void        one word, then the record, in a mapped file
//!                 |
//!              shipper -> cursor + usage_log + rollups, in one transaction
//! ```
//!
//! | file | what it owns |
//! |---|---|
//! | `record.rs` | the layout of a record, its CRC and its ID |
//! | `segment.rs` | a segment that is being written: reserving, filling, sealing, and reusing its file |
//! | `scan.rs` | reading a segment, including one that a crash left behind |
//! | `directory.rs` | a replica's directory and the lock on it |
//! | `recorder.rs` | which segment is in use, and what to do when there is no space |
//! | `reusable.rs` | space that requests share while denials of their tenant are not recorded |
//! | `sync.rs` | `fdatasync` for groups of records |
//! | `source.rs` | one segment that is being shipped: its batches and its cursor |
//! | `shipper.rs` | which segments to ship, and in which order, including those of replicas that have exited |
//! | `time.rs` | the time of events |
//! | `denials.rs` | the log line of a denial, and how many denials of a tenant are recorded while the backlog is long |
//!
//! This module does not depend on HTTP. While PostgreSQL is unreachable, the backlog grows up to
//! `QUOTA_USAGE_BACKLOG_MAX`. While the disk is full or read-only, no segments can be created. Once the existing
//! segments are full, no decisions are made.
//!
//! Denied requests do not cost their sender anything. Therefore, from the time when the backlog is half full until it
//! is less than a quarter full, only a limited number of each tenant's denials per second are recorded. Otherwise, one
//! tenant's denials could fill the backlog for everyone. The other denials are counted in a metric. Every allowed
//! request is recorded.

mod denials;
mod directory;
mod record;
mod recorder;
mod reusable;
mod scan;
mod segment;
mod shipper;
mod source;
mod sync;
#[cfg(test)]
mod tests;
mod time;

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use quota_common::{ApiKeyId, PlanId, TenantId, plan::Billing};
use uuid::Uuid;

use self::{
    denials::{DenialBudget, DenialLog},
    recorder::Recorder,
    reusable::ReusableSpace,
    segment::{ReservedRecord, Segment},
    shipper::{Adopter, Shipper},
    source::Context,
    time::EventClock,
};
pub use self::{
    record::{DecisionRecord, ENDPOINT_MAX, RecordedOutcome},
    recorder::Unrecordable,
    shipper::Replayed,
    source::ShipError,
};
use crate::{
    clock::{Clock, Monotonic},
    config::{Config, Durability},
    db::{Db, DbError, Lane},
    keys::KeyRecord,
    limiter::{Decision, Outcome},
    repo::usage_shipping,
    telemetry::metrics::Metrics,
};

/// Records decisions. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Metering(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// `None` if metering is off.
    recorder: Option<Arc<Recorder>>,
    is_durable: bool,
    /// The folder that contains the directories of all replicas.
    root: PathBuf,
    backlog_max: u64,
    context: Context,
    clock: Arc<dyn Clock>,
    time: Arc<EventClock>,
    denials: DenialLog,
    denial_budget: DenialBudget,
    /// Locked while this process's records are being shipped.
    shipper: tokio::sync::Mutex<Shipper>,
    /// Locked while the records of stopped replicas are being shipped.
    adopter: tokio::sync::Mutex<Adopter>,
    /// Whether the backlog has reached half its maximum and has not fallen below a quarter since.
    is_half_full: AtomicBool,
}

/// Space for the record of a decision that is about to be made. Dropping the reservation discards the space.
#[derive(Debug)]
#[must_use = "a decision that is not recorded is lost"]
pub struct Reservation<'a> {
    space: Space,
    endpoint: &'a str,
    request_id: &'a str,
}

#[derive(Debug)]
enum Space {
    /// Metering is off.
    Unneeded,
    Reserved(ReservedRecord),
    /// No more denials of the tenant are recorded at the moment, so a denied request leaves the space for other
    /// requests.
    Reusable(ReusableSpace),
}

/// The record may be lost if the machine fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a decision could not be recorded on disk")]
pub struct NotDurable;

impl Metering {
    pub fn new(
        config: &Config,
        db: &Db,
        clock: Arc<dyn Clock>,
        metrics: Arc<Metrics>,
    ) -> io::Result<Self> {
        let root = config.data_dir.join(directory::FOLDER);
        let time = Arc::new(EventClock::new(clock.now(), clock.monotonic()));
        let recorder = if config.metering {
            Some(Recorder::new(
                root.clone(),
                config.usage_backlog_max,
                config.durability,
                clock.clone(),
                time.clone(),
                metrics.clone(),
            )?)
        } else {
            None
        };
        Ok(Self(Arc::new(Inner {
            recorder,
            is_durable: config.durability == Durability::Machine,
            root,
            backlog_max: config.usage_backlog_max,
            context: Context::new(db, config.usage_retention, metrics),
            clock,
            time,
            denials: DenialLog::default(),
            denial_budget: DenialBudget::default(),
            shipper: tokio::sync::Mutex::default(),
            adopter: tokio::sync::Mutex::default(),
            is_half_full: AtomicBool::new(false),
        })))
    }

    /// Reserves space for the record of a decision. Call before the decision. If the reservation fails, do not make the
    /// decision.
    #[inline]
    pub fn reserve<'a>(
        &self,
        tenant: TenantId,
        endpoint: &'a str,
        request_id: &'a str,
    ) -> Result<Reservation<'a>, Unrecordable> {
        let endpoint = record::cut(endpoint, ENDPOINT_MAX);
        let request_id = record::cut(request_id, record::REQUEST_ID_MAX);
        let space = match &self.0.recorder {
            None => Space::Unneeded,
            Some(recorder) => {
                let reserved = if self.has_spent_denials(tenant) {
                    recorder.reserve_reusable().map(Space::Reusable)
                } else {
                    let reserved = recorder.reserve(endpoint.len(), request_id.len());
                    reserved.map(Space::Reserved)
                };
                reserved.inspect_err(|_| {
                    self.0.context.metrics.usage_decisions_rejected.inc();
                })?
            }
        };
        Ok(Reservation {
            space,
            endpoint,
            request_id,
        })
    }

    fn has_spent_denials(&self, tenant: TenantId) -> bool {
        self.0.is_half_full.load(Ordering::Relaxed)
            && self
                .0
                .denial_budget
                .is_spent(tenant, self.0.clock.monotonic())
    }

    /// Records the decision made at the monotonic time `at`, which must be after the reservation. If no more denials of
    /// the tenant are recorded at the moment, a denial is only counted. Call before the response is sent.
    #[inline]
    pub async fn record(
        &self,
        reservation: Reservation<'_>,
        key: &KeyRecord,
        decision: &Decision,
        cost: u32,
        at: Monotonic,
    ) -> Result<(), NotDurable> {
        let is_allowed = decision.is_allowed();
        let outcome = match decision.outcome {
            Outcome::Allowed => RecordedOutcome::Allowed,
            Outcome::Denied { violated, .. } if violated.is_empty() => {
                RecordedOutcome::Denied(None)
            }
            Outcome::Denied { .. } => RecordedOutcome::Denied(Some(decision.nearest().policy)),
        };
        if !is_allowed {
            self.0.denials.log(key, reservation.endpoint, outcome, at);
            if self.0.is_half_full.load(Ordering::Relaxed) {
                self.0.denial_budget.spend(key.tenant(), at);
            }
        }
        let reserved = match (reservation.space, &self.0.recorder) {
            (Space::Reserved(reserved), _) => reserved,
            (Space::Reusable(space), _) if is_allowed => space.record,
            (Space::Reusable(space), recorder) => {
                if let Some(recorder) = recorder {
                    recorder.give_back(space);
                }
                self.0.context.metrics.usage_denials_unrecorded.inc();
                return Ok(());
            }
            (Space::Unneeded, _) => return Ok(()),
        };
        let retry_after = if is_allowed {
            None
        } else {
            decision.retry_after_secs()
        };
        let segment = self.0.is_durable.then(|| reserved.segment.clone());
        reserved.fill(&DecisionRecord {
            tenant: key.tenant(),
            key: key.id(),
            plan: key.plan.id,
            billing: key.plan.billing,
            at: self.0.time.at(at),
            cost,
            outcome,
            retry_after_secs: retry_after.map_or(0, |it| u32::try_from(it).unwrap_or(u32::MAX)),
            endpoint: reservation.endpoint,
            request_id: reservation.request_id,
        });
        if let Some(segment) = segment
            && let Some(recorder) = &self.0.recorder
            && !recorder.made_durable(segment).await
        {
            return Err(NotDurable);
        }
        Ok(())
    }

    /// Returns whether [`Self::record`] waits for the disk.
    pub fn waits_for_disk(&self) -> bool {
        self.0.is_durable && self.is_on()
    }

    pub fn is_on(&self) -> bool {
        self.0.recorder.is_some()
    }

    /// Returns whether [`Self::prepare`] has work to do.
    pub fn wants_preparation(&self) -> bool {
        let recorder = self.0.recorder.as_ref();
        recorder.is_some_and(|recorder| recorder.wants_spare())
    }

    /// Creates segments in advance, and replaces old ones. Blocks the current thread.
    pub fn prepare(&self) {
        if let Some(recorder) = &self.0.recorder {
            recorder.create_spare();
        }
    }

    /// Measures PostgreSQL's clock, for the times of events. Returns whether the measurement was accurate enough.
    pub async fn measure_time(&self, db: &Db) -> Result<bool, DbError> {
        let db = db.on(Lane::Health);
        let measured = async {
            let mut tx = db.system().await?;
            // The transaction has already begun, so only one round trip is measured.
            let asked = self.0.clock.monotonic();
            let now = usage_shipping::now(&mut tx).await?;
            let answered = self.0.clock.monotonic();
            tx.commit().await?;
            Ok(self.0.time.measured(now, asked, answered))
        };
        db.within_limit(measured).await
    }

    /// Ships everything recorded so far. Returns the number of records.
    pub async fn ship(&self) -> Result<u64, ShipError> {
        let Some(recorder) = &self.0.recorder else {
            return Ok(0);
        };
        let mut shipper = self.0.shipper.lock().await;
        let shipped = shipper.ship(&self.0.context, recorder).await;
        self.watch_backlog();
        shipped
    }

    /// Makes [`Self::ship_adopted`] return after the current batch.
    pub fn stop_adopting(&self) {
        let is_stopping = &self.0.context.is_stopping;
        is_stopping.store(true, Ordering::Relaxed);
    }

    /// Ships the records of stopped replicas in the same data directory. Returns the number of records.
    pub async fn ship_adopted(&self) -> Result<u64, ShipError> {
        if !self.is_on() {
            return Ok(0);
        }
        let mut adopter = self.0.adopter.lock().await;
        adopter.ship(&self.0.context, &self.0.root).await
    }

    /// Ships the remaining records, and then deletes this process's files, unless some records could not be shipped.
    /// Call after the last request.
    pub async fn finish(&self) -> Result<(), ShipError> {
        let Some(recorder) = &self.0.recorder else {
            return Ok(());
        };
        recorder.close();
        // The directory cannot be deleted while a segment is being created in it. Creating a segment takes
        // milliseconds.
        for _ in 0..100 {
            if !recorder.is_creating() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let mut shipper = self.0.shipper.lock().await;
        shipper.finish(&self.0.context, recorder).await
    }

    /// Updates whether the backlog is half full, and logs a warning each time it reaches half its maximum.
    fn watch_backlog(&self) {
        let metrics = &self.0.context.metrics;
        let bytes = u64::try_from(metrics.usage_backlog_bytes.get()).unwrap_or(0);
        let is_half_full = &self.0.is_half_full;
        if bytes >= self.0.backlog_max / 2 {
            if !is_half_full.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    bytes,
                    limit = self.0.backlog_max,
                    "the usage backlog has reached half of QUOTA_USAGE_BACKLOG_MAX; for tenants with many denials, only some denials are recorded"
                );
            }
        } else if bytes < self.0.backlog_max / 4 {
            is_half_full.store(false, Ordering::Relaxed);
        }
    }
}

/// Measures how long it takes to reserve and fill `count` records, including the time to create the segments. All
/// segments but the first reuse a file.
pub fn measure_append(directory: &Path, count: u32) -> io::Result<Duration> {
    const SIZE: u64 = 8 << 20;
    let clock = crate::clock::SystemClock::new();
    let record = DecisionRecord {
        tenant: TenantId(Uuid::from_u128(1)),
        key: ApiKeyId(Uuid::from_u128(2)),
        plan: PlanId(Uuid::from_u128(3)),
        billing: Billing::Free,
        at: clock.now(),
        cost: 1,
        outcome: RecordedOutcome::Allowed,
        retry_after_secs: 0,
        endpoint: "GET /v1/echo",
        request_id: "019ab4e1-7c00-7000-8000-000000000001",
    };
    let began = clock.monotonic();
    let mut segment = Arc::new(Segment::create(directory, SIZE, clock.now(), false)?);
    let mut left = count;
    while left > 0 {
        let reserved = segment.reserve(record.endpoint.len(), record.request_id.len());
        if let Some(reserved) = reserved {
            reserved.fill(&record);
            left -= 1;
            continue;
        }
        segment.retire()?;
        let full = Arc::try_unwrap(segment).map_err(|_| io::ErrorKind::ResourceBusy)?;
        segment = Arc::new(full.reuse(clock.now())?);
    }
    let took = clock.monotonic().saturating_since(began);
    std::fs::remove_file(&segment.path)?;
    Ok(took.into())
}

/// Returns the usage directories at a path, which is either the directory of one replica or a folder that contains
/// several such directories. Returns an empty list if there are no usage directories.
pub fn directories(path: &Path) -> io::Result<Vec<PathBuf>> {
    let path = path.canonicalize()?;
    if directory::id_of(&path).is_some() {
        return Ok(vec![path]);
    }
    directory::list(&path)
}

/// Ships the directory of a replica that will not return, for `quota usage replay`. Harmless if the replica is still
/// running, or if another process ships the directory at the same time.
pub async fn replay(config: &Config, db: &Db, directory: &Path) -> Result<Replayed, ShipError> {
    let context = Context::new(db, config.usage_retention, Arc::default());
    shipper::replay(&context, directory).await
}
