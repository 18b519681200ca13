use std::{
    collections::BTreeSet,
    fs::File,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use fastrand::Rng;
use futures_util::future::{join, join3};
use quota_common::{ApiKeyId, PlanId, TenantId, plan::Billing};
use tempfile::TempDir;
use uuid::Uuid;

use super::{
    Durability,
    directory::{self, Directory},
    record::{DecisionRecord, RecordedOutcome, cut},
    recorder::Recorder,
    scan::{self, Span, Writer},
    segment::{RECORDS_AT, ReservedRecord, Segment, SegmentHead},
    source::{BatchSize, Context, Source, ship},
    sync::Syncer,
    time::EventClock,
};
use crate::{
    clock::{Clock, Monotonic, UnixNanos},
    config::DatabaseSettings,
    db::Db,
    limiter::Policy,
    repo::usage_batch::UsageRecord,
    telemetry::metrics::Metrics,
};

const SIZE: u64 = 64 << 10;
const ENDPOINT: &str = "GET /orders/{id}";

fn segment(directory: &Path) -> Arc<Segment> {
    let started_at = UnixNanos(1_790_000_000_000_000_000);
    Arc::new(Segment::create(directory, SIZE, started_at, false).expect("there is space"))
}

fn record(request_id: &str) -> DecisionRecord<'_> {
    DecisionRecord {
        tenant: TenantId(Uuid::from_u128(1)),
        key: ApiKeyId(Uuid::from_u128(2)),
        plan: PlanId(Uuid::from_u128(3)),
        billing: Billing::Paid,
        at: UnixNanos(1_790_000_000_123_456_000),
        cost: 7,
        outcome: RecordedOutcome::Denied(Some(Policy::Daily)),
        retry_after_secs: 42,
        endpoint: ENDPOINT,
        request_id,
    }
}

fn reserve(segment: &Arc<Segment>, request_id: &str) -> Option<ReservedRecord> {
    segment.reserve(ENDPOINT.len(), request_id.len())
}

fn write(segment: &Arc<Segment>, request_id: &str) {
    let reserved = reserve(segment, request_id).expect("there is space");
    reserved.fill(&record(request_id));
}

/// Consecutive records of a segment.
#[derive(Debug)]
struct Batch {
    rows: Vec<UsageRecord>,
    span: Span,
}

fn read(file: &File, writer: Writer) -> Batch {
    read_from(file, RECORDS_AT as u64, writer, usize::MAX)
}

fn read_from(file: &File, position: u64, writer: Writer, max: usize) -> Batch {
    let head = SegmentHead::read(file)
        .expect("the file is readable")
        .expect("the file is a segment");
    let mut rows = Vec::new();
    let span = scan::read(file, &head, position, writer, max, |it| {
        let UsageRecord {
            event_id,
            tenant_id,
            key_id,
            plan_id,
            at,
            billing,
            was_rejected,
            policy,
            retry_after_seconds,
            cost,
            ..
        } = *it;
        rows.push(UsageRecord {
            event_id,
            tenant_id,
            key_id,
            plan_id,
            at,
            billing,
            endpoint: it.endpoint.to_string(),
            was_rejected,
            policy,
            retry_after_seconds,
            cost,
            request_id: it.request_id.to_string(),
        });
    })
    .expect("the file is readable");
    Batch { rows, span }
}

fn request_ids(batch: &Batch) -> Vec<&str> {
    let ids = batch.rows.iter().map(|row| row.request_id.as_str());
    ids.collect()
}

fn bytes_of(segment: &Segment) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(SIZE).expect("the size fits")];
    segment
        .file
        .read_exact_at(&mut bytes, 0)
        .expect("the file is readable");
    bytes
}

fn image(directory: &Path, bytes: &[u8]) -> File {
    let path = directory.join("image");
    std::fs::write(&path, bytes).expect("there is space");
    File::open(path).expect("the file was written")
}

#[test]
fn a_record_is_read_as_it_was_written() {
    let directory = TempDir::new().unwrap();
    let segment = segment(directory.path());
    write(&segment, "a");
    let allowed = DecisionRecord {
        outcome: RecordedOutcome::Allowed,
        billing: Billing::Free,
        retry_after_secs: 0,
        endpoint: "",
        request_id: "b",
        ..record("")
    };
    let reserved = segment.reserve(0, 1).unwrap();
    reserved.fill(&allowed);
    let batch = read(&segment.file, Writer::Running);
    let [a, b] = &batch.rows[..] else {
        panic!("{batch:?}");
    };
    assert_eq!(a.tenant_id, Uuid::from_u128(1));
    assert_eq!(a.key_id, Uuid::from_u128(2));
    assert_eq!(a.plan_id, Uuid::from_u128(3));
    assert_eq!(a.at.timestamp_nanos_opt(), Some(1_790_000_000_123_456_000));
    assert_eq!((a.billing, a.cost, a.was_rejected), ("paid", 7, true));
    assert_eq!((a.policy, a.retry_after_seconds), (Some("daily"), Some(42)));
    assert_eq!(
        (a.endpoint.as_str(), a.request_id.as_str()),
        (ENDPOINT, "a")
    );
    assert_eq!((b.billing, b.was_rejected, b.policy), ("free", false, None));
    assert_eq!((b.retry_after_seconds, b.endpoint.as_str()), (None, ""));
    assert_ne!(a.event_id, b.event_id);
    assert_eq!(a.event_id.get_version_num(), 7);
    assert_eq!(read(&segment.file, Writer::Ended).rows, batch.rows);
}

#[test]
fn every_outcome_survives() {
    let directory = TempDir::new().unwrap();
    let segment = segment(directory.path());
    let mut outcomes = vec![RecordedOutcome::Allowed, RecordedOutcome::Denied(None)];
    outcomes.extend(Policy::ALL.map(|policy| RecordedOutcome::Denied(Some(policy))));
    for outcome in &outcomes {
        let reserved = reserve(&segment, "x").unwrap();
        reserved.fill(&DecisionRecord {
            outcome: *outcome,
            ..record("x")
        });
    }
    let read = read(&segment.file, Writer::Running);
    let read = read.rows.iter().map(|row| (row.was_rejected, row.policy));
    assert_eq!(
        read.collect::<Vec<_>>(),
        [
            (false, None),
            (true, None),
            (true, Some("rpm")),
            (true, Some("daily")),
            (true, Some("monthly")),
            (true, Some("tenant_monthly"))
        ]
    );
}

#[test]
fn texts_are_cut_at_a_character() {
    assert_eq!(cut("abc", 3), "abc");
    assert_eq!(cut("abcd", 3), "abc");
    assert_eq!(cut("aäöü", 4), "aä");
    assert_eq!(cut("ä", 1), "");
}

#[test]
fn reading_beside_the_writer_stops_at_the_first_open_record() {
    let directory = TempDir::new().unwrap();
    let segment = segment(directory.path());
    write(&segment, "a");
    let open = reserve(&segment, "b").unwrap();
    write(&segment, "c");
    drop(reserve(&segment, "void"));
    write(&segment, "d");
    let before = read(&segment.file, Writer::Running);
    assert_eq!(request_ids(&before), ["a"]);
    assert!(!before.span.is_complete);
    // If the writer has exited, no response was sent for the open record, so the record is skipped.
    let after = read(&segment.file, Writer::Ended);
    assert_eq!(request_ids(&after), ["a", "c", "d"]);
    assert_eq!(after.span.damaged, 0);

    open.fill(&record("b"));
    let rest = read_from(&segment.file, before.span.end, Writer::Running, 2);
    assert_eq!(request_ids(&rest), ["b", "c"]);
    let rest = read_from(&segment.file, rest.span.end, Writer::Running, 2);
    assert_eq!(request_ids(&rest), ["d"]);
}

#[test]
fn a_full_segment_takes_nothing_and_a_sealed_one_is_complete() {
    let directory = TempDir::new().unwrap();
    let full = segment(directory.path());
    let mut written = 0_u64;
    while let Some(reserved) = reserve(&full, "a") {
        reserved.fill(&record("a"));
        written += 1;
    }
    assert!(written > 400, "{written}");
    full.seal();
    let batch = read(&full.file, Writer::Running);
    assert_eq!(batch.rows.len() as u64, written);
    assert!(batch.span.is_complete);

    let sealed = segment(directory.path());
    write(&sealed, "a");
    sealed.seal();
    sealed.seal();
    assert!(reserve(&sealed, "b").is_none());
    let batch = read(&sealed.file, Writer::Running);
    assert_eq!(
        (request_ids(&batch), batch.span.is_complete),
        (vec!["a"], true)
    );
}

#[test]
fn a_damaged_record_is_left_out_and_later_ones_are_kept() {
    let directory = TempDir::new().unwrap();
    let segment = segment(directory.path());
    let mut ends = Vec::new();
    for id in ["a", "b", "c"] {
        write(&segment, id);
        ends.push(usize::try_from(segment.tail()).unwrap());
    }
    let whole = bytes_of(&segment);
    // Flips each bit of the second record, including its header, one at a time.
    for at in ends[0]..ends[1] {
        for bit in 0..8 {
            let mut torn = whole.clone();
            torn[at] ^= 1 << bit;
            let batch = read(&image(directory.path(), &torn), Writer::Ended);
            assert_eq!(request_ids(&batch), ["a", "c"], "byte {at}, bit {bit}");
            assert_eq!(batch.span.damaged, 1, "byte {at}, bit {bit}");
        }
    }
}

/// The file is read in chunks, and this gap is longer than a chunk.
#[test]
fn a_gap_that_spans_several_chunks_is_counted_by_how_it_begins() {
    let directory = TempDir::new().unwrap();
    let started_at = UnixNanos(1_790_000_000_000_000_000);
    let segment = Segment::create(directory.path(), 4 << 20, started_at, false).unwrap();
    let segment = Arc::new(segment);
    let (mut written, mut before, mut start) = (0, 0, 0);
    while let Some(reserved) = reserve(&segment, "a") {
        reserved.fill(&record("a"));
        written += 1;
        if segment.tail() <= 512 << 10 {
            (before, start) = (written, usize::try_from(segment.tail()).unwrap());
        }
    }
    let whole = std::fs::read(&segment.path).unwrap();
    let (middle, end) = (start + (1 << 20), start + (2 << 20));
    for (first, damaged) in [(0x5a, 1), (0, 0)] {
        let mut torn = whole.clone();
        torn[start..middle].fill(first);
        torn[middle..end].fill(0x5a);
        let batch = read(&image(directory.path(), &torn), Writer::Ended);
        assert_eq!(batch.span.damaged, damaged, "the gap begins with {first}");
        let read = batch.rows.len();
        assert!(
            before < read && read < written,
            "{before} < {read} < {written}"
        );
    }
}

#[test]
fn a_clients_text_does_not_pass_for_a_record() {
    let directory = TempDir::new().unwrap();
    let (victim, forger) = (segment(directory.path()), segment(directory.path()));
    write(&forger, "forged");
    let end = usize::try_from(forger.tail()).unwrap();
    let forged = bytes_of(&forger)[RECORDS_AT..end].to_vec();
    write(&victim, "a");
    write(&victim, "b");
    // A request may contain a string that is itself a complete record of another segment. Even if the disk has lost the
    // header in front of this string, the string must not be read as a record.
    let mut bytes = bytes_of(&victim);
    let second = RECORDS_AT + (usize::try_from(victim.tail()).unwrap() - RECORDS_AT) / 2;
    bytes[second..second + forged.len()].copy_from_slice(&forged);
    let batch = read(&image(directory.path(), &bytes), Writer::Ended);
    assert_eq!(request_ids(&batch), ["a"]);
}

/// A segment in each version of the layout, in hexadecimal, with two records and a seal. Generated by a Python script
/// that does not use this code: CRC-32 is from Python's standard library, and CRC-32C is calculated bit by bit.
const IMAGES: [&str; 2] = [
    concat!(
        "71756f746175736501a219684ea17052b7e7a828c3c9daa20000f323845bd718400100000000000013dba605000000000000",
        "0000000000000000000000000000",
        "0b000201179e7fbb000000000000000000000000000000010000000000000000000000000000000200000000000000000000",
        "00000000000300ca4e2b845bd71807000000000105010000000000000000474554202f610000",
        "0b0002016bf918c5000000000000000000000000000000010000000000000000000000000000000200000000000000000000",
        "00000000000300ca4e2b845bd71807000000010105022a00000000000000474554202f626300",
        "00000401d59d223b",
    ),
    concat!(
        "71756f746175736501a219684ea17052b7e7a828c3c9daa20000f323845bd718400100000000000013dba605000000000000",
        "0000000000000000000000000000",
        "0b00020251d3d077000000000000000000000000000000010000000000000000000000000000000200000000000000000000",
        "00000000000300ca4e2b845bd71807000000000105010000000000000000474554202f610000",
        "0b000202659d75b5000000000000000000000000000000010000000000000000000000000000000200000000000000000000",
        "00000000000300ca4e2b845bd71807000000010105022a00000000000000474554202f626300",
        "00000402cccd4c05",
    ),
];

#[test]
fn segments_of_both_versions_are_read() {
    let directory = TempDir::new().unwrap();
    for image_text in IMAGES {
        let digits = image_text.as_bytes().chunks(2);
        let digits = digits.map(|it| u8::from_str_radix(str::from_utf8(it).unwrap(), 16).unwrap());
        let mut bytes: Vec<u8> = digits.collect();
        bytes.resize(320, 0);
        let batch = read(&image(directory.path(), &bytes), Writer::Ended);
        assert_eq!(request_ids(&batch), ["a", "bc"]);
        assert!(batch.span.is_complete && batch.span.damaged == 0);
        let [a, bc] = &batch.rows[..] else {
            panic!("{batch:?}");
        };
        assert_eq!((a.tenant_id, a.cost), (Uuid::from_u128(1), 7));
        assert_eq!((a.was_rejected, bc.was_rejected), (false, true));
        assert_eq!(bc.retry_after_seconds, Some(42));
        // If any bit of a record is flipped, that record is skipped and the other one is still read.
        let records = RECORDS_AT..RECORDS_AT + 2 * 88;
        for bit in records.start * 8..records.end * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            let changed = read(&image(directory.path(), &bytes), Writer::Ended);
            let rest = if bit / 8 < RECORDS_AT + 88 { "bc" } else { "a" };
            assert_eq!(request_ids(&changed), [rest], "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }
}

#[test]
fn earlier_versions_leave_directories_with_records_of_version_2_alone() {
    let root = TempDir::new().unwrap();
    let directory = Directory::create(root.path(), false).unwrap();
    let name = directory.path.file_name().unwrap().to_str().unwrap();
    // Earlier versions take over directories whose names are IDs.
    assert!(Uuid::try_parse(name).is_err(), "{name}");
    let earlier = root.path().join(Uuid::nil().to_string());
    for other in ["1", "lock", "rejected"] {
        std::fs::create_dir(root.path().join(other)).unwrap();
    }
    std::fs::create_dir(&earlier).unwrap();
    let found = directory::list(root.path()).unwrap();
    assert_eq!(found, [earlier.clone(), directory.path.clone()]);
    assert_eq!(directory::id_of(&directory.path), Some(directory.id));
    assert!(Directory::adopt(&earlier).unwrap().is_some());
    assert!(Directory::adopt(&directory.path).unwrap().is_none());
    let path = directory.path.clone();
    drop(directory);
    assert!(Directory::adopt(&path).unwrap().is_some());
}

/// Several threads write to a segment while its file is copied. Each copy contains what a killed process would leave
/// behind.
#[test]
fn a_copy_of_the_file_at_any_moment_has_every_record_that_was_finished_before() {
    for seed in 0..20 {
        let directory = TempDir::new().unwrap();
        let segment = segment(directory.path());
        let finished = Mutex::new(BTreeSet::new());
        let mut copies = Vec::new();
        thread::scope(|scope| {
            let writers = (0..4_u64).map(|writer| {
                let (segment, finished) = (segment.clone(), &finished);
                scope.spawn(move || {
                    let mut random = Rng::with_seed(seed * 10 + writer);
                    let mut open = Vec::new();
                    for n in 0_u32.. {
                        let id = format!("{writer}-{n}{}", "x".repeat(random.usize(..40)));
                        let Some(reserved) = reserve(&segment, &id) else {
                            break;
                        };
                        match random.u8(..10) {
                            0 => drop(reserved),
                            1 => open.push(reserved),
                            _ => {
                                reserved.fill(&record(&id));
                                finished.lock().unwrap().insert(id);
                            }
                        }
                    }
                    // These records stay open, like those of a killed process.
                    open.into_iter().for_each(std::mem::forget);
                })
            });
            let writers = writers.collect::<Vec<_>>();
            while writers.iter().any(|writer| !writer.is_finished()) {
                let before = finished.lock().unwrap().clone();
                copies.push((before, bytes_of(&segment)));
                if copies.len() > 50 {
                    copies.remove(fastrand::usize(..copies.len()));
                }
            }
        });
        let all = finished.into_inner().unwrap();
        assert!(all.len() > 200, "{}", all.len());
        copies.push((all.clone(), bytes_of(&segment)));
        for (before, bytes) in copies {
            let batch = read(&image(directory.path(), &bytes), Writer::Ended);
            let found = request_ids(&batch);
            let unique = found.iter().copied().collect::<BTreeSet<_>>();
            assert_eq!(unique.len(), found.len(), "no record twice");
            for id in &before {
                assert!(unique.contains(id.as_str()), "seed {seed}: {id} is lost");
            }
        }
        // After all writers have exited, exactly the finished records are read.
        let batch = read(&segment.file, Writer::Ended);
        let found = request_ids(&batch).into_iter().map(str::to_owned);
        assert_eq!(found.collect::<BTreeSet<_>>(), all);
    }
}

/// What happened to the latest changes to a page when the machine failed. Writes that the disk has confirmed are never
/// lost. The disk may have kept all, none, or only some sectors of later writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Kept,
    Dropped,
    Torn,
}

fn crashed(synced: &[u8], current: &[u8], random: &mut Rng) -> Vec<u8> {
    const PAGE: usize = 4096;
    const SECTOR: usize = 512;
    let mut bytes = Vec::with_capacity(current.len());
    for (old, new) in synced.chunks(PAGE).zip(current.chunks(PAGE)) {
        match random.choice([Fate::Kept, Fate::Dropped, Fate::Torn]) {
            Some(Fate::Kept) | None => bytes.extend_from_slice(new),
            Some(Fate::Dropped) => bytes.extend_from_slice(old),
            Some(Fate::Torn) => {
                for (old, new) in old.chunks(SECTOR).zip(new.chunks(SECTOR)) {
                    bytes.extend_from_slice(if random.bool() { new } else { old });
                }
            }
        }
    }
    bytes
}

/// Returns the number of crash images (files as they may look after a crash) to check. Set `CRASH_IMAGES=10000` to
/// check more.
#[expect(
    clippy::disallowed_methods,
    reason = "this variable is not a setting of the server"
)]
fn crash_images() -> u64 {
    std::env::var("CRASH_IMAGES").map_or(500, |images| {
        images.parse().expect("CRASH_IMAGES is a number")
    })
}

#[test]
fn no_record_that_was_synced_is_lost_in_any_crash_of_the_machine() {
    let images = crash_images();
    let directory = TempDir::new().unwrap();
    let (mut checked, mut kept_unsynced) = (0_u64, 0_u64);
    for seed in 0..images {
        let mut random = Rng::with_seed(seed);
        let segment = segment(directory.path());
        std::fs::remove_file(&segment.path).unwrap();
        let mut synced = bytes_of(&segment);
        let (mut confirmed, mut written) = (BTreeSet::new(), BTreeSet::new());
        let mut open = Vec::new();
        for n in 0..random.u32(20..400) {
            let id = format!("{n}-{}", "x".repeat(random.usize(..60)));
            match random.u8(..20) {
                0 => {
                    synced = bytes_of(&segment);
                    confirmed = written.clone();
                }
                1 | 2 if !open.is_empty() => {
                    let (id, reserved): (String, ReservedRecord) =
                        open.swap_remove(random.usize(..open.len()));
                    reserved.fill(&record(&id));
                    written.insert(id);
                }
                3 => drop(reserve(&segment, &id)),
                4..=6 => {
                    if let Some(reserved) = reserve(&segment, &id) {
                        open.push((id, reserved));
                    }
                }
                _ => {
                    if let Some(reserved) = reserve(&segment, &id) {
                        reserved.fill(&record(&id));
                        written.insert(id);
                    }
                }
            }
        }
        let bytes = crashed(&synced, &bytes_of(&segment), &mut random);
        let batch = read(&image(directory.path(), &bytes), Writer::Ended);
        let found = request_ids(&batch);
        let unique = found.iter().copied().collect::<BTreeSet<_>>();
        assert_eq!(unique.len(), found.len(), "seed {seed}: no record twice");
        for id in &confirmed {
            assert!(unique.contains(id.as_str()), "seed {seed}: {id} is lost");
        }
        for id in &unique {
            assert!(written.contains(*id), "seed {seed}: {id} was never written");
        }
        checked += confirmed.len() as u64;
        kept_unsynced += (unique.len() - confirmed.len()) as u64;
    }
    assert!(checked > images * 20, "{checked} records were synced");
    assert!(kept_unsynced > 0, "some of the other records are recovered");
    println!("{images} images, {checked} synced records, 0 lost; {kept_unsynced} others recovered");
}

#[test]
fn a_directory_has_one_owner_and_is_adopted_after_it() {
    let root = TempDir::new().unwrap();
    let owner = Directory::create(root.path(), true).unwrap();
    write(&segment(&owner.path), "a");
    assert_eq!(
        directory::list(root.path()).unwrap(),
        std::slice::from_ref(&owner.path)
    );
    assert!(Directory::adopt(&owner.path).unwrap().is_none());
    let (path, id) = (owner.path.clone(), owner.id);
    drop(owner);
    let adopted = Directory::adopt(&path)
        .unwrap()
        .expect("no process holds the directory");
    assert_eq!(adopted.id, id);
    assert!(Directory::adopt(&path).unwrap().is_none());
    // The directory is kept while it contains segments.
    let segments = directory::segments(&path).unwrap();
    assert_eq!(segments.len(), 1);
    adopted.remove().unwrap();
    assert!(path.exists());
    std::fs::remove_file(&segments[0]).unwrap();
    Directory::adopt(&path).unwrap().unwrap().remove().unwrap();
    assert!(!path.exists());
    assert!(Directory::adopt(&path).unwrap().is_none());
}

#[test]
fn shipping_a_copy_takes_nothing_from_the_segment_it_was_copied_from() {
    let directory = TempDir::new().unwrap();
    let live = segment(directory.path());
    write(&live, "a");
    write(&live, "b");
    // Nothing locks the directory of a copy, so the copy's writer counts as exited.
    let copy = read(&image(directory.path(), &bytes_of(&live)), Writer::Ended);
    assert_eq!(
        (request_ids(&copy), copy.span.is_complete),
        (vec!["a", "b"], true)
    );
    write(&live, "c");
    let rest = read_from(&live.file, copy.span.end, Writer::Running, usize::MAX);
    assert_eq!(request_ids(&rest), ["c"]);
}

#[derive(Debug, Default)]
struct TestClock(AtomicU64);

impl Clock for TestClock {
    fn now(&self) -> UnixNanos {
        UnixNanos(self.monotonic().0)
    }

    fn monotonic(&self) -> Monotonic {
        Monotonic(self.0.load(Ordering::Relaxed))
    }
}

#[test]
fn a_quiet_server_replaces_its_segments_before_they_are_too_old_to_be_shipped() {
    const HOUR: u64 = 3_600_000_000_000;
    let directory = TempDir::new().unwrap();
    let clock = Arc::new(TestClock::default());
    let recorder = recorder_with(
        directory.path(),
        8 << 20,
        Durability::Process,
        clock.clone(),
        Arc::default(),
    );
    recorder.create_spare();
    let reserved = recorder.reserve(ENDPOINT.len(), 1).unwrap();
    reserved.fill(&record("a"));
    // Some of these times are within the minimum retention of two days, and others are beyond it.
    for hours in [1, 23, 47, 49, 500] {
        clock.0.store(hours * HOUR, Ordering::Relaxed);
        while recorder.wants_spare() {
            recorder.create_spare();
        }
        let segments = recorder.segments();
        let in_use = segments.last().unwrap();
        let age = hours * HOUR - in_use.head.started_at.0;
        assert!(
            age < 12 * HOUR,
            "after {hours} hours the segment is {age} ns old"
        );
        let first = read(&segments[0].file, Writer::Running);
        assert_eq!(request_ids(&first), ["a"]);
        // Earlier segments are complete, so the shipper can delete them.
        assert!(segments.len() == 1 || first.span.is_complete);
        drop(recorder.reserve(ENDPOINT.len(), 1).unwrap());
    }
}

#[tokio::test]
async fn a_segment_that_failed_to_reach_the_disk_once_is_never_reported_as_written() {
    let directory = TempDir::new().unwrap();
    let (broken, intact) = (segment(directory.path()), segment(directory.path()));
    let (id, failures) = (broken.head.id, Arc::new(AtomicU64::new(0)));
    // Like the kernel, this function reports the failure only to the first call.
    let has_failed = AtomicBool::new(false);
    let write = move |segment: &Segment| {
        if segment.head.id == id && !has_failed.swap(true, Ordering::Relaxed) {
            return Err(std::io::Error::other("lost"));
        }
        Ok(())
    };
    let counted = failures.clone();
    let on_failure = move |_: &Segment, _: &std::io::Error| {
        counted.fetch_add(1, Ordering::Relaxed);
    };
    let syncer = Syncer::start(write, on_failure).unwrap();
    assert!(syncer.sync(intact.clone()).await);
    assert!(!syncer.sync(broken.clone()).await);
    // A record can be reserved before the failure and synced after it.
    assert!(!syncer.sync(broken.clone()).await);
    assert!(syncer.sync(intact).await);
    assert!(!syncer.sync(broken).await);
    assert_eq!(failures.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_failed_segment_does_not_affect_other_segments_of_its_group() {
    let directory = TempDir::new().unwrap();
    let [first, broken, intact] = [(); 3].map(|()| segment(directory.path()));
    let (first_id, broken_id) = (first.head.id, broken.head.id);
    let (reached, has_reached) = mpsc::channel();
    let (resume, resumed) = mpsc::channel();
    let write = move |segment: &Segment| {
        if segment.head.id == first_id {
            reached.send(()).unwrap();
            resumed.recv().unwrap();
        }
        if segment.head.id == broken_id {
            return Err(std::io::Error::other("lost"));
        }
        Ok(())
    };
    let syncer = Syncer::start(write, |_, _| {}).unwrap();
    let group = async {
        // While the first segment is being written, the others join the next group.
        has_reached.recv().unwrap();
        let resume = async { resume.send(()).unwrap() };
        join3(syncer.sync(broken), syncer.sync(intact), resume).await
    };
    let (first, (broken, intact, ())) = join(syncer.sync(first), group).await;
    assert_eq!((first, broken, intact), (true, false, true));
}

fn recorder(directory: &Path, backlog_max: u64, metrics: Arc<Metrics>) -> Arc<Recorder> {
    let clock = Arc::<TestClock>::default();
    recorder_with(directory, backlog_max, Durability::Process, clock, metrics)
}

fn recorder_with(
    directory: &Path,
    backlog_max: u64,
    durability: Durability,
    clock: Arc<TestClock>,
    metrics: Arc<Metrics>,
) -> Arc<Recorder> {
    let time = Arc::new(EventClock::new(UnixNanos(0), Monotonic(0)));
    let directory = directory.to_owned();
    Recorder::new(directory, backlog_max, durability, clock, time, metrics).unwrap()
}

/// Writes records until there is no space. Returns the number of records.
fn fill_up(recorder: &Recorder) -> u64 {
    let mut written = 0;
    while let Ok(reserved) = recorder.reserve(ENDPOINT.len(), 1) {
        reserved.fill(&record("a"));
        written += 1;
    }
    written
}

#[test]
fn an_outage_ends_when_the_next_segment_is_created_in_advance() {
    let directory = TempDir::new().unwrap();
    let metrics = Arc::<Metrics>::default();
    let recorder = recorder(directory.path(), 2 * SIZE, metrics.clone());
    recorder.create_spare();
    for _ in 0..3 {
        assert_eq!(metrics.usage_unrecordable.get(), 0);
        assert!(fill_up(&recorder) > 400);
        assert_eq!(metrics.usage_unrecordable.get(), 1);
        let shipped = recorder.segments().remove(0);
        assert!(recorder.remove(&shipped, directory::delete).unwrap());
        assert_eq!(metrics.usage_unrecordable.get(), 1);
        assert!(recorder.wants_spare());
        recorder.create_spare();
    }
    assert_eq!(metrics.usage_unrecordable.get(), 0);
    assert!(recorder.reserve(ENDPOINT.len(), 1).is_ok());
}

/// Writes records until the recorder switches to the next segment, to which the last record is written. Returns the full
/// segment and the next one.
fn fill_segment(recorder: &Recorder, request_id: &str) -> (Arc<Segment>, Arc<Segment>) {
    let current = |recorder: &Recorder| recorder.segments().pop().expect("a segment is in use");
    let full = current(recorder);
    loop {
        let reserved = recorder.reserve(ENDPOINT.len(), request_id.len());
        reserved.expect("there is space").fill(&record(request_id));
        let next = current(recorder);
        if next.head != full.head {
            assert!(full.records.load(Ordering::Relaxed) > 400);
            return (full, next);
        }
    }
}

/// Returns the number of files of retired segments.
fn retired(recorder: &Recorder) -> usize {
    let directory = recorder.own_directory().expect("a directory");
    let files = std::fs::read_dir(&directory.path).expect("a directory");
    let names = files.map(|it| it.expect("a file").path());
    names
        .filter(|it| it.extension().is_some_and(|it| it == "new"))
        .count()
}

fn inode(file: &File) -> u64 {
    file.metadata().expect("the file is open").ino()
}

#[test]
fn the_file_of_a_shipped_segment_is_reused() {
    let directory = TempDir::new().unwrap();
    let recorder = recorder(directory.path(), 8 * SIZE, Arc::default());
    recorder.create_spare();
    let mut shipped_file = None;
    for round in 0..5 {
        let id = format!("record of round {round}");
        let (full, next) = fill_segment(&recorder, &id);
        if let Some(shipped_file) = shipped_file {
            assert_eq!(inode(&next.file), shipped_file);
        }
        // The first record was written at the end of the previous round.
        let batch = read(&full.file, Writer::Running);
        assert!(batch.span.is_complete);
        let new = usize::from(round > 0);
        assert!(request_ids(&batch)[new..].iter().all(|it| *it == id));
        // The reused file contains no earlier records.
        let batch = read(&next.file, Writer::Ended);
        assert_eq!(
            (request_ids(&batch), batch.span.damaged),
            (vec![id.as_str()], 0)
        );
        assert!(bytes_of(&next)[300..].iter().all(|it| *it == 0));
        assert_ne!(full.head.id, next.head.id);

        assert!(recorder.remove_shipped(&full).unwrap());
        assert!(!recorder.remove_shipped(&full).unwrap());
        assert!(!recorder.remove_shipped(&next).unwrap());
        assert!(!full.path.exists() && next.path.exists());
        assert_eq!(retired(&recorder), 1);
        shipped_file = Some(inode(&full.file));
        drop(full);
        recorder.create_spare();
        assert_eq!(retired(&recorder), 0);
    }
}

#[test]
fn a_retired_segment_that_is_still_referenced_is_not_reused() {
    let directory = TempDir::new().unwrap();
    let recorder = recorder(directory.path(), 8 * SIZE, Arc::default());
    recorder.create_spare();
    let (full, _) = fill_segment(&recorder, "a");
    let before = bytes_of(&full);
    assert!(recorder.remove_shipped(&full).unwrap());
    recorder.create_spare();
    assert_eq!(retired(&recorder), 0);
    let (_, next) = fill_segment(&recorder, "b");
    assert_ne!(inode(&next.file), inode(&full.file));
    assert!(full.reserve(1, 1).is_none());
    assert_eq!(bytes_of(&full), before);
}

#[test]
fn a_file_that_was_replaced_is_not_reused() {
    let directory = TempDir::new().unwrap();
    let recorder = recorder(directory.path(), 8 * SIZE, Arc::default());
    recorder.create_spare();
    let (full, _) = fill_segment(&recorder, "a");
    std::fs::remove_file(&full.path).unwrap();
    std::fs::write(&full.path, "another file").unwrap();
    assert!(recorder.remove_shipped(&full).unwrap());
    assert!(!full.path.exists());
    assert_eq!(retired(&recorder), 0);
}

#[test]
fn a_file_is_not_reused_after_it_may_have_been_written_to_disk() {
    let directory = TempDir::new().unwrap();
    let clock = Arc::new(TestClock::default());
    let recorder = recorder_with(
        directory.path(),
        8 * SIZE,
        Durability::Process,
        clock.clone(),
        Arc::default(),
    );
    recorder.create_spare();
    // The files are created at 0 s and reused until they are 20 s old. Each round fills both files.
    for seconds in [0, 9, 18, 27] {
        clock.0.store(seconds * 1_000_000_000, Ordering::Relaxed);
        for _ in 0..2 {
            let (full, _) = fill_segment(&recorder, "a");
            assert!(recorder.remove_shipped(&full).unwrap());
            assert_eq!(retired(&recorder), usize::from(seconds < 20), "{seconds} s");
            drop(full);
            recorder.create_spare();
        }
    }
    // New files are reused again, but not after they have been kept for too long.
    for (seconds, is_reused) in [(28, true), (60, false)] {
        let (full, next) = fill_segment(&recorder, "a");
        assert!(recorder.remove_shipped(&full).unwrap());
        assert_eq!(retired(&recorder), 1);
        clock.0.store(seconds * 1_000_000_000, Ordering::Relaxed);
        let file = inode(&full.file);
        let open = File::open(full.path.with_extension("new")).unwrap();
        drop((full, next));
        recorder.create_spare();
        assert_eq!(retired(&recorder), 0);
        let (_, next) = fill_segment(&recorder, "b");
        assert_eq!(inode(&next.file) == file, is_reused, "{seconds} s");
        // While the file is open, no other file gets its number.
        drop(open);
        recorder.create_spare();
    }
}

#[test]
fn a_retired_segment_counts_toward_the_maximum_and_is_deleted_on_close() {
    let directory = TempDir::new().unwrap();
    let metrics = Arc::<Metrics>::default();
    let recorder = recorder(directory.path(), 2 * SIZE, metrics.clone());
    recorder.create_spare();
    let first = fill_up(&recorder);
    for round in 0..3 {
        // The backlog has space for two segments. A retired segment is one of them until its file is reused.
        if round > 0 {
            assert_eq!(fill_up(&recorder) * 2, first);
        }
        assert_eq!(metrics.usage_unrecordable.get(), 1);
        let shipped = recorder.segments().remove(0);
        assert!(recorder.remove_shipped(&shipped).unwrap());
        drop(shipped);
        assert!(recorder.wants_spare());
        recorder.create_spare();
        assert_eq!(metrics.usage_unrecordable.get(), 0);
    }
    fill_up(&recorder);
    for shipped in recorder.segments() {
        recorder.remove_shipped(&shipped).unwrap();
    }
    assert_eq!(retired(&recorder), 1);
    recorder.close();
    assert_eq!(retired(&recorder), 0);
    for last in recorder.segments() {
        // After `close`, no file is kept for reuse.
        assert!(recorder.remove_shipped(&last).unwrap());
    }
    assert!(recorder.remove_directory().unwrap());
}

#[test]
fn files_are_not_reused_if_segments_must_survive_a_machine_crash() {
    let directory = TempDir::new().unwrap();
    let recorder = recorder_with(
        directory.path(),
        8 * SIZE,
        Durability::Machine,
        Arc::default(),
        Arc::default(),
    );
    recorder.create_spare();
    let (full, _) = fill_segment(&recorder, "a");
    assert!(recorder.remove_shipped(&full).unwrap());
    assert!(!full.path.exists());
    assert_eq!(retired(&recorder), 0);
}

#[test]
fn a_tenant_that_may_not_record_more_denials_gets_space_before_the_decision() {
    let directory = TempDir::new().unwrap();
    let recorder = recorder(directory.path(), 2 * SIZE, Arc::default());
    recorder.create_spare();
    // Reserves many times the available space in total, two reservations at a time.
    for _ in 0..5_000 {
        let spaces = [(); 2].map(|()| recorder.reserve_reusable().expect("there is space"));
        for space in spaces {
            recorder.give_back(space);
        }
    }
    let segments = recorder.segments();
    let [only] = &segments[..] else {
        panic!("more than one segment is in use");
    };
    assert!(only.tail() < 1_000, "{}", only.tail());
    // The record of an allowed request is shipped once no earlier request is in progress.
    let in_progress = recorder.reserve_reusable().unwrap();
    let admitted = recorder.reserve_reusable().unwrap();
    admitted.record.fill(&record("admitted"));
    let shipped = || {
        recorder.void_unused();
        let batch = read(&only.file, Writer::Running);
        let ids = request_ids(&batch).into_iter().map(str::to_owned);
        (ids.collect::<Vec<_>>(), batch.span.is_blocked)
    };
    let before = shipped();
    assert!(before.1, "{before:?}");
    // The space that held up the shipper is not reused.
    recorder.give_back(in_progress);
    assert_eq!(shipped(), (vec!["admitted".to_owned()], false));

    let kept = recorder.reserve_reusable().unwrap();
    assert!(fill_up(&recorder) > 800);
    recorder.give_back(kept);
    let kept = recorder.reserve_reusable().expect("the same space");
    // Without space, there is no decision.
    assert!(recorder.reserve_reusable().is_err());
    let segment = kept.record.segment.clone();
    kept.record.fill(&record("last"));
    let batch = read(&segment.file, Writer::Ended);
    let last = batch
        .rows
        .iter()
        .find(|it| it.request_id == "last")
        .unwrap();
    assert_eq!((last.endpoint.as_str(), last.cost), (ENDPOINT, 7));
}

#[test]
fn space_in_a_segment_that_failed_to_reach_the_disk_is_not_used_again() {
    let directory = TempDir::new().unwrap();
    let recorder = recorder(directory.path(), 8 * SIZE, Arc::default());
    let space = recorder.reserve_reusable().unwrap();
    let broken = recorder.segments().remove(0);
    recorder.give_back(space);
    broken.has_broken();
    broken.seal();
    let next = recorder.reserve_reusable().unwrap();
    assert!(!Arc::ptr_eq(&next.record.segment, &broken));
}

#[test]
fn a_directory_whose_creation_was_interrupted_is_deleted_later() {
    let root = TempDir::new().unwrap();
    let owner = Directory::create(root.path(), true).unwrap();
    let [old, new] = [(); 2].map(|()| root.path().join(format!("{}.new", Uuid::now_v7())));
    for path in [&old, &new] {
        std::fs::create_dir(path).unwrap();
        File::create(path.join("lock")).unwrap();
    }
    // This directory was created by the operator, so it must be kept.
    let other = root.path().join("other.new");
    std::fs::create_dir(&other).unwrap();
    let now = new.metadata().unwrap().modified().unwrap();
    let two_hours_ago = now - Duration::from_hours(2);
    for path in [&old, &other, &owner.path] {
        File::open(path)
            .unwrap()
            .set_modified(two_hours_ago)
            .unwrap();
    }
    directory::delete_unfinished(root.path()).unwrap();
    assert!(!old.exists());
    assert!(new.exists() && other.exists() && owner.path.exists());
}

#[tokio::test]
async fn an_outage_of_the_database_does_not_change_the_size_of_batches() {
    let directory = TempDir::new().unwrap();
    let segment = segment(directory.path());
    write(&segment, "a");
    // Nothing listens on this port.
    let url = "postgres://quota@127.0.0.1:1/quota".into();
    let db = Db::new(&url, &DatabaseSettings::default());
    let context = Context::new(&db, Duration::MAX, Arc::default());
    let mut source = Source::new(segment.head, segment.file.clone(), Writer::Running);
    // The cursor was read before the outage.
    source.position = Some(source.cursor);
    let mut size = BatchSize::default();
    let error = ship(&context, &mut source, &mut size).await.unwrap_err();
    assert!(error.is_outage(), "{error:?}");
    assert_eq!(size, BatchSize::default());
}
