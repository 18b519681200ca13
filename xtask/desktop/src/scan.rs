//! Searches for leaked tokens: in files, in everything a page stores or can reach, and in the memory of processes.

use std::{
    fs,
    io::{Read as _, Seek as _, SeekFrom},
    ops::Range,
    path::Path,
};

use anyhow::{Context as _, Result, ensure};

/// Returns whether the bytes contain a refresh token or a JWT, in UTF-8 or UTF-16. Does not use a regular expression,
/// which would take minutes to search the memory of a process in a debug build.
pub fn has_token(bytes: &[u8]) -> bool {
    bytes.iter().enumerate().any(|(at, first)| match first {
        b'q' => is_refresh(&bytes[at..], 1) || is_refresh(&bytes[at..], 2),
        b'e' => is_access(&bytes[at..], 1) || is_access(&bytes[at..], 2),
        _ => false,
    })
}

/// Returns the leading ASCII characters of text encoded with `width` bytes per character.
fn characters(bytes: &[u8], width: usize) -> impl Iterator<Item = u8> {
    let narrow = move |it: &&[u8]| it[1..].iter().all(|byte| *byte == 0);
    bytes.chunks_exact(width).take_while(narrow).map(|it| it[0])
}

fn is_refresh(bytes: &[u8], width: usize) -> bool {
    let mut text = characters(bytes, width);
    let begins = b"qr_".iter().all(|it| text.next() == Some(*it));
    begins && text.take(38).filter(u8::is_ascii_alphanumeric).count() == 38
}

fn is_access(bytes: &[u8], width: usize) -> bool {
    let mut text = characters(bytes, width);
    let begins = b"eyJ".iter().all(|it| text.next() == Some(*it));
    let in_base64 = |it: &u8| it.is_ascii_alphanumeric() || b"-_".contains(it);
    begins && {
        let mut header = 0;
        let end = text.find(|it| {
            header += 1;
            !in_base64(it) || header > 500
        });
        header > 10 && end == Some(b'.') && b"eyJ".iter().all(|it| text.next() == Some(*it))
    }
}

/// Returns the files in a folder that contain a token, and the number of files searched.
pub fn files(folder: &Path) -> Result<(Vec<String>, u32)> {
    let (mut found, mut count) = (Vec::new(), 0);
    for entry in
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?
    {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            let (more, below) = files(&entry.path())?;
            found.extend(more);
            count += below;
        } else if kind.is_file() {
            count += 1;
            if has_token(&fs::read(entry.path())?) {
                found.push(entry.path().display().to_string());
            }
        }
    }
    Ok((found, count))
}

/// Returns a process and its descendants.
pub fn process_tree(root: i32) -> Vec<i32> {
    let mut found = vec![root];
    let mut at = 0;
    while let Some(pid) = found.get(at).copied() {
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let children = children.unwrap_or_default();
        found.extend(
            children
                .split_whitespace()
                .filter_map(|it| it.parse::<i32>().ok()),
        );
        at += 1;
    }
    found
}

pub fn name(pid: i32) -> String {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    name.trim().to_owned()
}

const PAGE: u64 = 4096;
/// The number of pages read at a time.
const BATCH: u64 = 4096;

/// Returns whether a process has a token in its writable memory.
pub fn memory(pid: i32) -> Result<bool> {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mut memory = fs::File::open(format!("/proc/{pid}/mem"))?;
    let mut pages = fs::File::open(format!("/proc/{pid}/pagemap"))?;
    let (mut range, mut read) = (0..0, 0);
    for line in maps.lines() {
        if let Some(own) = writable(line) {
            range = own;
        } else if line.starts_with("Rss:") && !line.ends_with(" 0 kB") {
            // Most reserved memory was never touched, so reading only the pages that are present skips gigabytes.
            for run in present(&mut pages, &range)? {
                let mut bytes = Vec::new();
                memory.seek(SeekFrom::Start(run.start * PAGE))?;
                let length = (run.end - run.start) * PAGE;
                // A page may have been unmapped in the meantime.
                let _ = (&mut memory).take(length).read_to_end(&mut bytes);
                read += bytes.len();
                if has_token(&bytes) {
                    return Ok(true);
                }
            }
        }
    }
    ensure!(read > 1024 * 1024, "the memory of {pid} could not be read");
    Ok(false)
}

/// Returns the pages of the memory range that a line of `smaps` describes, or an empty range if this memory is not
/// writable. Returns `None` if the line describes no range.
fn writable(line: &str) -> Option<Range<u64>> {
    let mut words = line.split_whitespace();
    let (from, to) = words.next()?.split_once('-')?;
    let (from, to) = (
        u64::from_str_radix(from, 16).ok()?,
        u64::from_str_radix(to, 16).ok()?,
    );
    let can_be = words.next()?.starts_with("rw");
    Some(if can_be { from / PAGE..to / PAGE } else { 0..0 })
}

/// Returns the runs of consecutive pages of a range that are in memory.
fn present(pages: &mut fs::File, range: &Range<u64>) -> Result<Vec<Range<u64>>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let count = BATCH.min(range.end - at);
        let mut entries = Vec::new();
        pages.seek(SeekFrom::Start(at * 8))?;
        pages.take(count * 8).read_to_end(&mut entries)?;
        let entries = entries.chunks_exact(8).map(|it| it[7] & 0b1100_0000 != 0);
        for (page, is_there) in (at..).zip(entries) {
            match runs.last_mut() {
                _ if !is_there => {}
                Some(run) if run.end == page => run.end += 1,
                _ => runs.push(page..page + 1),
            }
        }
        at += count;
    }
    Ok(runs)
}

/// A script that searches everything a page can reach from its globals, its storage and its cookies.
pub const GLOBALS: &str = r#"
const done = arguments[0];
const isToken = (text) => /qr_[0-9A-Za-z]{38}|eyJ[\w-]{10,}\.eyJ/.test(text ?? "");
const found = [];
let texts = 0;
const look = (text, place) => { texts += 1; if (isToken(text)) found.push(place); };
const seen = new Set();
const queue = [[window, "window"]];
const add = (it, place) => {
  if (typeof it === "string") look(it, place);
  else if (it !== null && (typeof it === "object" || typeof it === "function") && !seen.has(it)) {
    seen.add(it);
    queue.push([it, place]);
  }
};
while (queue.length && seen.size < 200000) {
  const [it, place] = queue.shift();
  if (it instanceof WebAssembly.Memory) { look(new TextDecoder("latin1").decode(it.buffer), place); continue; }
  if (it instanceof ArrayBuffer) { look(new TextDecoder("latin1").decode(it), place); continue; }
  if (it instanceof Map || it instanceof Set) for (const entry of it.entries()) add(entry, `${place}.entries`);
  let names = [];
  try { names = Reflect.ownKeys(it); } catch { continue; }
  for (const name of names) {
    look(String(name), `a name in ${place}`);
    try { add(it[name], `${place}.${String(name)}`); } catch { /* inaccessible */ }
  }
}
look(document.cookie, "cookies");
look(document.documentElement.outerHTML, "the document");
for (const storage of [localStorage, sessionStorage]) {
  for (let at = 0; at < storage.length; at += 1) look(storage.getItem(storage.key(at)), storage.key(at));
}
(indexedDB.databases ? indexedDB.databases() : Promise.resolve([])).then(
  (databases) => done({ found, databases: databases.length, objects: seen.size, texts }),
  (error) => done({ error: String(error) }),
);
"#;

#[cfg(test)]
mod tests {
    use super::has_token;

    #[test]
    fn tokens_are_found_in_both_encodings() {
        let refresh = format!("qr_{}", "a1B2".repeat(10));
        let refresh = &refresh[..41];
        let access = "eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiIxIn0.c2ln";
        for token in [refresh, access] {
            let wide: Vec<u8> = token.encode_utf16().flat_map(u16::to_le_bytes).collect();
            for bytes in [token.as_bytes(), &wide] {
                let within = [b"\xff\x00..", bytes, b"..\x00\xff"].concat();
                assert!(has_token(&within), "{token}");
            }
        }
        assert!(!has_token(b"qk_0123456789 eyJ qr_short qr_!"));
    }
}
