//! Reads records from a segment's file.
//!
//! This module reads the file instead of the memory map, so that segments of other processes can be read in the same
//! way.

use std::{fs::File, io, os::unix::fs::FileExt};

use super::{
    record::{self, Header, HeaderWords, RECORD_WORDS_MAX, RecordRead, RecordState, WORD},
    segment::SegmentHead,
};

/// Whether the process that writes the segment may still be running.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writer {
    /// The process may still fill reserved records, so reading stops at the first open record.
    Running,
    /// The process has exited. Unfinished records are skipped, because no response was sent to the requests that
    /// reserved them.
    Ended,
}

/// Where a sequence of records ends, and why.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Span {
    /// The byte offset after the last finished or void record. Open records after it are not included, even if the
    /// process that writes the segment seems to have exited. The file may be a copy of a segment to which records are
    /// still being added.
    pub end: u64,
    /// Whether the records end at the end of the segment.
    pub is_complete: bool,
    /// Whether reading stopped at a record that is still being written. Finished records may follow that record.
    pub is_blocked: bool,
    /// The number of gaps: ranges without readable records. Only gaps that begin with damaged bytes count, not those
    /// that begin with zeros.
    pub damaged: u64,
    /// Whether the last chunk ended within a gap.
    is_in_gap: bool,
}

/// How many bytes to read at a time: enough for many records of maximum length, and few enough to stay in the
/// processor's cache.
const CHUNK: usize = 256 << 10;
const _: () = assert!(RECORD_WORDS_MAX * WORD * 100 < CHUNK);

/// Passes at most `max` records to `take`, starting at `position`. Returns where and why reading stopped.
pub(super) fn read(
    file: &File,
    head: &SegmentHead,
    position: u64,
    writer: Writer,
    max: usize,
    mut take: impl FnMut(&RecordRead<'_>),
) -> io::Result<Span> {
    let mut span = Span {
        end: position,
        ..Span::default()
    };
    let mut left = max;
    let headers = HeaderWords::of(head.id);
    let mut bytes = vec![0; CHUNK];
    let mut at = position;
    while left > 0 && !span.is_complete {
        let rest = head.size.saturating_sub(at);
        let wanted = usize::try_from(rest).unwrap_or(CHUNK).min(CHUNK);
        let read = read_at(file, &mut bytes[..wanted], at)?;
        let is_last = read as u64 == rest || read < wanted;
        let scan = Scan {
            head,
            headers: &headers,
            base: at,
            bytes: &bytes[..read],
            is_last,
            writer,
        };
        match scan.collect(&mut left, &mut span, &mut take) {
            Some(length) => at += length as u64,
            None => break,
        }
    }
    Ok(span)
}

/// Reads until `bytes` is full or the file ends.
fn read_at(file: &File, bytes: &mut [u8], position: u64) -> io::Result<usize> {
    let mut read = 0;
    while read < bytes.len() {
        match file.read_at(&mut bytes[read..], position + read as u64) {
            Ok(0) => break,
            Ok(n) => read += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(read)
}

/// The content at a position in a segment.
enum Found<'a> {
    Record {
        record: RecordRead<'a>,
        len: usize,
    },
    /// An open or void record.
    Nothing {
        state: RecordState,
        len: usize,
    },
    Sealed,
    /// Zeros.
    Empty,
    Damaged,
    /// A record that ends beyond the bytes that were read.
    Cut,
}

struct Scan<'a> {
    head: &'a SegmentHead,
    headers: &'a HeaderWords,
    /// The position of `bytes` in the segment.
    base: u64,
    bytes: &'a [u8],
    /// Whether `bytes` reaches the end of the segment.
    is_last: bool,
    writer: Writer,
}

impl<'a> Scan<'a> {
    fn word(&self, at: usize) -> Option<u64> {
        let bytes = self.bytes.get(at..at + WORD)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    }

    #[inline]
    fn at(&self, at: usize) -> Found<'a> {
        let Some(word) = self.word(at) else {
            return Found::Cut;
        };
        if word == 0 {
            return Found::Empty;
        }
        let Some(header) = Header::parse(word) else {
            return Found::Damaged;
        };
        let len = header.words * WORD;
        let body = match header.state {
            RecordState::Done => match self.bytes.get(at + WORD..at + len) {
                Some(body) => body,
                None => return Found::Cut,
            },
            _ => &[],
        };
        let position = usize::try_from(self.base).unwrap_or(usize::MAX) + at;
        let headers = self.headers;
        if headers.word(header.version, position, header.state, header.words, body) != word {
            return Found::Damaged;
        }
        match header.state {
            RecordState::Done => match record::read(self.head.id, position, body) {
                Some(record) => Found::Record { record, len },
                None => Found::Damaged,
            },
            RecordState::Sealed => Found::Sealed,
            state => Found::Nothing { state, len },
        }
    }

    /// Passes at most `left` of the records in `bytes` to `take`, and subtracts their number from `left`. Returns the
    /// number of bytes processed, or `None` to stop reading.
    fn collect(
        &self,
        left: &mut usize,
        span: &mut Span,
        take: &mut impl FnMut(&RecordRead<'_>),
    ) -> Option<usize> {
        let is_running = self.writer == Writer::Running;
        // A gap may continue from the previous chunk.
        let mut at = if span.is_in_gap {
            self.next_record(0)
        } else {
            0
        };
        let goes_on = loop {
            if *left == 0 {
                break false;
            }
            match self.at(at) {
                Found::Record { record, len } => {
                    take(&record);
                    *left -= 1;
                    at += len;
                    span.end = self.base + at as u64;
                    span.is_in_gap = false;
                }
                Found::Nothing { state, len } => {
                    if is_running && state == RecordState::Open {
                        span.is_blocked = true;
                        break false;
                    }
                    at += len;
                    if state == RecordState::Void {
                        span.end = self.base + at as u64;
                    }
                    span.is_in_gap = false;
                }
                Found::Sealed => {
                    span.is_complete = true;
                    break false;
                }
                Found::Cut if self.is_last => {
                    // The rest of the segment was too small for another record.
                    span.is_complete = true;
                    break false;
                }
                Found::Cut => {
                    // Reading continues at `at`, unless no progress was made.
                    break at > 0;
                }
                // A record that is being written can look damaged for a moment.
                found @ (Found::Empty | Found::Damaged) if is_running => {
                    span.is_blocked = matches!(found, Found::Damaged);
                    break false;
                }
                found @ (Found::Empty | Found::Damaged) => {
                    // If the machine crashed, pages of the file may be lost although later pages are not. Only a record
                    // with a matching CRC ends such a gap.
                    if matches!(found, Found::Damaged) && !span.is_in_gap {
                        span.damaged += 1;
                    }
                    span.is_in_gap = true;
                    at = self.next_record(at + WORD);
                }
            }
        };
        goes_on.then_some(at)
    }

    /// Returns the next position with a complete record. If there is no complete record, returns where the next chunk
    /// must start: at a record that continues beyond this chunk, or at the end of this chunk.
    fn next_record(&self, from: usize) -> usize {
        let mut at = from;
        while at + WORD <= self.bytes.len() {
            // The rest of a segment is usually empty, so the header is checked before the whole record.
            let is_header = self
                .word(at)
                .and_then(Header::parse)
                .is_some_and(|it| it.state == RecordState::Done);
            if is_header {
                match self.at(at) {
                    Found::Record { .. } => return at,
                    Found::Cut if !self.is_last && at > 0 => return at,
                    _ => {}
                }
            }
            at += WORD;
        }
        self.bytes.len()
    }
}
