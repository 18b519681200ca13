//! A segment: a file of fixed size in which decisions are recorded.
//!
//! The whole file is allocated before use and mapped into memory. A record is written with plain stores to that memory:
//! the kernel keeps the record if the process is killed, and the write cannot fail for lack of space.
//!
//! Writers share a segment without a lock. To reserve space, a writer uses compare-and-swap to replace the zero word
//! after the last record with an open header. This header contains the record's length, so the record can be skipped
//! even if its writer is killed.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use memmap2::{Advice, MmapOptions, MmapRaw};
use nix::fcntl::{FallocateFlags, fallocate};
use uuid::Uuid;

use super::record::{Body, DecisionRecord, Header, HeaderWords, RecordState, Version, WORD, words};
use crate::clock::UnixNanos;

/// The suffix of a segment's file name.
pub(super) const EXTENSION: &str = "segment";
/// The suffix of a file that is being prepared, or that is kept for another segment.
pub(super) const UNFINISHED: &str = "new";
/// The byte offset of the first record.
pub(super) const RECORDS_AT: usize = 64;
const MAGIC: [u8; 8] = *b"quotause";

/// The first bytes of a segment's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SegmentHead {
    pub id: Uuid,
    pub started_at: UnixNanos,
    /// The size of the file in bytes.
    pub size: u64,
}

impl SegmentHead {
    fn bytes(self) -> [u8; RECORDS_AT] {
        let mut bytes = [0; RECORDS_AT];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..24].copy_from_slice(self.id.as_bytes());
        bytes[24..32].copy_from_slice(&self.started_at.0.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.size.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..40]);
        bytes[40..44].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Returns `None` if the bytes are not the head of a segment.
    pub fn parse(bytes: &[u8; RECORDS_AT]) -> Option<Self> {
        let number = |at: usize| Some(u64::from_le_bytes(bytes[at..at + 8].try_into().ok()?));
        let head = Self {
            id: Uuid::from_slice(&bytes[8..24]).ok()?,
            started_at: UnixNanos(number(24)?),
            size: number(32)?,
        };
        (head.bytes() == *bytes).then_some(head)
    }

    pub fn read(file: &File) -> io::Result<Option<Self>> {
        let mut bytes = [0; RECORDS_AT];
        match file.read_exact_at(&mut bytes, 0) {
            Ok(()) => Ok(Self::parse(&bytes)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// A segment that this process writes.
#[derive(Debug)]
pub(super) struct Segment {
    pub head: SegmentHead,
    pub path: PathBuf,
    pub file: Arc<File>,
    /// When the file was created. Earlier than the start of the segment if the file has been reused.
    pub file_created_at: UnixNanos,
    map: MmapRaw,
    headers: HeaderWords,
    /// The index of the word where the next record begins. The index may lag behind: a writer that finds a header there
    /// advances the index.
    tail: AtomicUsize,
    /// The number of records filled so far.
    pub records: AtomicU64,
    /// Whether writing the file to disk has failed. The kernel reports the failure only once: later calls to
    /// `fdatasync` succeed even though records may be missing on disk.
    is_broken: AtomicBool,
}

impl Segment {
    /// Creates and allocates the file. If `durable` is set, the file also survives a machine crash.
    pub fn create(
        directory: &Path,
        size: u64,
        started_at: UnixNanos,
        durable: bool,
    ) -> io::Result<Self> {
        let head = SegmentHead {
            id: Uuid::now_v7(),
            started_at,
            size,
        };
        let unfinished = directory.join(format!("{}.{UNFINISHED}", head.id));
        let path = directory.join(format!("{}.{EXTENSION}", head.id));
        let created = (|| {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&unfinished)?;
            // Every block is allocated now. Writing to a hole in a mapped file would kill the process if the disk were
            // full.
            let length = i64::try_from(size).map_err(io::Error::other)?;
            fallocate(&file, FallocateFlags::empty(), 0, length)?;
            file.write_all_at(&head.bytes(), 0)?;
            if durable {
                file.sync_all()?;
            }
            std::fs::rename(&unfinished, &path)?;
            if durable {
                File::open(directory)?.sync_all()?;
            }
            // The pages are loaded now, so that the first writes do not wait for page faults.
            let loaded = || MmapOptions::new().populate().map_raw(&file);
            if durable {
                return Ok((loaded()?, file));
            }
            // `PopulateWrite` also marks the pages as changed, which the first write to each page would have to do
            // otherwise. Pages of a durable file are not marked: the first `fdatasync` would write all of them to disk,
            // and delay the first responses. Linux before 5.14 does not support `PopulateWrite` and returns `EINVAL`.
            // Any other error means that writing to the memory would kill the process.
            let map = MmapOptions::new().map_raw(&file)?;
            match map.advise(Advice::PopulateWrite) {
                Ok(()) => Ok((map, file)),
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok((loaded()?, file)),
                Err(error) => Err(error),
            }
        })();
        match created {
            Ok((map, file)) => Ok(Self::empty(head, path, Arc::new(file), map)),
            Err(error) => {
                // Removing the file frees its space for other files.
                let _ = std::fs::remove_file(&unfinished);
                let _ = std::fs::remove_file(&path);
                Err(error)
            }
        }
    }

    /// Renames the file of a segment that is no longer needed, so that the file is no longer found. Fails if another file
    /// has taken its place. A process that already has the file open cannot mistake the records of the next segment for
    /// records of this one, because their CRCs cover another ID. If this process exits before the file is reused or
    /// deleted, the file is deleted like any other unfinished file.
    pub fn retire(&self) -> io::Result<()> {
        let (found, own) = (
            std::fs::symlink_metadata(&self.path)?,
            self.file.metadata()?,
        );
        if (found.dev(), found.ino()) != (own.dev(), own.ino()) {
            return Err(io::Error::other("the segment's file was replaced"));
        }
        std::fs::rename(&self.path, self.retired_path())
    }

    /// Deletes the file of a retired segment.
    pub fn delete_retired(&self) -> io::Result<()> {
        std::fs::remove_file(self.retired_path())
    }

    fn retired_path(&self) -> PathBuf {
        self.path.with_extension(UNFINISHED)
    }

    /// Turns a retired segment into an empty one, which is much faster than allocating another file. The new segment may
    /// not survive a machine crash. On failure, the file is deleted.
    pub fn reuse(self, started_at: UnixNanos) -> io::Result<Self> {
        // A file system that never overwrites blocks, such as Btrfs, allocates new ones for pages that have been written
        // to disk since. If there is no space, this fails, while writing to the memory would kill the process. Linux
        // before 5.14 returns `EINVAL`.
        match self.map.advise(Advice::PopulateWrite) {
            Err(error) if error.kind() != io::ErrorKind::InvalidInput => {
                let _ = self.delete_retired();
                return Err(error);
            }
            _ => {}
        }
        // `self` is the only reference to the segment, so no other thread writes to it.
        for word in self.words() {
            word.store(0, Ordering::Relaxed);
        }
        let head = SegmentHead {
            id: Uuid::now_v7(),
            started_at,
            size: self.head.size,
        };
        let path = self.path.with_file_name(format!("{}.{EXTENSION}", head.id));
        let written = self
            .file
            .write_all_at(&head.bytes(), 0)
            .and_then(|()| std::fs::rename(self.retired_path(), &path));
        if let Err(error) = written {
            let _ = self.delete_retired();
            return Err(error);
        }
        let file_created_at = self.file_created_at;
        Ok(Self {
            file_created_at,
            ..Self::empty(head, path, self.file, self.map)
        })
    }

    fn empty(head: SegmentHead, path: PathBuf, file: Arc<File>, map: MmapRaw) -> Self {
        Self {
            head,
            path,
            file,
            file_created_at: head.started_at,
            map,
            headers: HeaderWords::of(head.id),
            tail: AtomicUsize::new(RECORDS_AT / WORD),
            records: AtomicU64::new(0),
            is_broken: AtomicBool::new(false),
        }
    }

    #[expect(
        unsafe_code,
        clippy::cast_ptr_alignment,
        reason = "mapped memory can only be accessed through a pointer, and mappings are page-aligned"
    )]
    fn words(&self) -> &[AtomicU64] {
        let count = self.map.len() / WORD;
        // SAFETY:
        // - Valid: `map` owns `map.len()` bytes of mapped memory, mapped read-write, until it is dropped; the returned
        //   slice borrows `self`. The file was allocated to at least that length and no process truncates it, so no
        //   access is beyond its end.
        // - Aligned: mappings are page-aligned, and `AtomicU64` requires 8-byte alignment.
        // - Initialized: every bit pattern is a `u64`.
        // - No data races: all accesses in this process go through these atomics, which may be shared. There are no
        //   non-atomic references to the memory. Other processes only read the file with system calls.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast::<AtomicU64>(), count) }
    }

    /// Returns the header word of a record that is not done.
    fn header(&self, index: usize, state: RecordState, words: usize) -> u64 {
        self.headers
            .word(Version::Two, index * WORD, state, words, &[])
    }

    /// Reserves `len` words. Returns `None` if fewer words are left.
    fn take(&self, len: usize) -> Option<usize> {
        let words = self.words();
        loop {
            let index = self.tail.load(Ordering::Acquire);
            if index + len > words.len() {
                return None;
            }
            let open = self.header(index, RecordState::Open, len);
            let found = words[index].compare_exchange(0, open, Ordering::AcqRel, Ordering::Acquire);
            let next = match found {
                Ok(_) => index + len,
                Err(taken) => self.after(index, taken),
            };
            // The exchange fails if another writer has already advanced the tail.
            let _ = self
                .tail
                .compare_exchange(index, next, Ordering::AcqRel, Ordering::Acquire);
            if found.is_ok() {
                return Some(index);
            }
        }
    }

    /// Returns the index after the record at `index`, whose header is `word`.
    fn after(&self, index: usize, word: u64) -> usize {
        match Header::parse(word) {
            Some(header) if header.state != RecordState::Sealed => index + header.words,
            // The word is a seal, since only valid headers are ever written at this position.
            _ => self.words().len(),
        }
    }

    /// Reserves space for a record whose strings have these lengths in bytes. Returns `None` if the segment is full or
    /// sealed.
    pub fn reserve(self: &Arc<Self>, endpoint: usize, request_id: usize) -> Option<ReservedRecord> {
        let words = words(endpoint, request_id);
        let index = self.take(words)?;
        Some(ReservedRecord {
            segment: self.clone(),
            index,
            words,
            is_open: true,
        })
    }

    /// Seals the segment, so that no more space can be reserved in it.
    pub fn seal(&self) {
        let words = self.words();
        loop {
            let index = self.tail.load(Ordering::Acquire);
            if index >= words.len() {
                return;
            }
            let seal = self.header(index, RecordState::Sealed, 0);
            let next =
                match words[index].compare_exchange(0, seal, Ordering::AcqRel, Ordering::Acquire) {
                    Ok(_) => words.len(),
                    Err(taken) => self.after(index, taken),
                };
            let _ = self
                .tail
                .compare_exchange(index, next, Ordering::AcqRel, Ordering::Acquire);
        }
    }

    /// Returns whether `other` is the same segment.
    pub fn is_same(&self, other: &Self) -> bool {
        self.head.id == other.head.id
    }

    /// Marks the segment as broken, because the file could not be written to disk.
    pub fn has_broken(&self) {
        self.is_broken.store(true, Ordering::Relaxed);
    }

    pub fn is_broken(&self) -> bool {
        self.is_broken.load(Ordering::Relaxed)
    }

    /// Returns the tail's position in bytes: the end of all records, except a record that is being reserved at this
    /// moment.
    pub fn tail(&self) -> u64 {
        (self.tail.load(Ordering::Acquire) * WORD) as u64
    }
}

/// Space for a record. If dropped without being filled, the space is voided.
#[derive(Debug)]
pub struct ReservedRecord {
    pub(super) segment: Arc<Segment>,
    index: usize,
    words: usize,
    is_open: bool,
}

impl ReservedRecord {
    /// Writes the record. Its strings must not exceed the lengths that were reserved.
    pub fn fill(mut self, record: &DecisionRecord<'_>) {
        let mut body = Body::of(record);
        let bytes = body.padded(self.words);
        debug_assert!(bytes.is_some());
        if let Some(bytes) = bytes {
            let target = &self.segment.words()[self.index + 1..][..self.words - 1];
            for (word, chunk) in target.iter().zip(bytes.chunks_exact(WORD)) {
                let chunk = chunk.try_into().map_or(0, u64::from_le_bytes);
                word.store(chunk, Ordering::Relaxed);
            }
            // The header is written last, so that only a complete record is marked as done.
            let position = self.index * WORD;
            let headers = &self.segment.headers;
            self.close(headers.word_of_done(position, self.words, &mut body));
            self.segment.records.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn close(&mut self, header: u64) {
        self.segment.words()[self.index].store(header, Ordering::Release);
        self.is_open = false;
    }
}

impl Drop for ReservedRecord {
    fn drop(&mut self) {
        if self.is_open {
            let header = self
                .segment
                .header(self.index, RecordState::Void, self.words);
            self.close(header);
        }
    }
}
