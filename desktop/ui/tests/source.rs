//! Checks the source of the console and the desktop app: their imports, and the wording of their strings.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// The modules of the console, lowest rank first. A module imports only from lower ranks, or from its own folder.
const RANKS: &[&[&str]] = &[
    &["model"],
    &["clock", "host", "preferences", "reactive"],
    &["api", "route"],
    &["component"],
    &["session"],
    &["servers"],
    &["page"],
    &["app"],
    &["main"],
];

/// Words and phrases that are not part of the product's vocabulary, or that hide the cause of an error. They are
/// matched as whole words, ignoring case.
const BANNED: &[&str] = &[
    "alone",
    "anew",
    "away",
    "answers",
    "at once",
    "breaks",
    "could not be",
    "held",
    "in hand",
    "is made",
    "lives",
    "make",
    "mend",
    "nobody",
    "opens nothing",
    "organisation",
    "refused",
    "seen to",
    "stays",
    "stored it",
    "switched off",
    "switched on",
    "such thing",
    "the own",
    "the text of",
    "tells",
    "there is no such",
    "told",
    "unused",
    "wherever",
    "whoever",
];

fn sources(folder: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder of sources") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|it| it == "rs") {
            let source = fs::read_to_string(&path).expect("a source file");
            found.push((path, source));
        }
    }
    found.sort();
    found
}

fn folder(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Splits a source file into its code, without comments and unit tests, and the string literals in this code.
fn split(source: &str) -> (String, Vec<String>) {
    let source = source
        .split("#[cfg(test)]\nmod tests {")
        .next()
        .unwrap_or_default();
    let (mut code, mut strings) = (String::new(), Vec::new());
    let mut rest = source;
    while let Some(first) = rest.chars().next() {
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if let Some(raw) = raw_string(rest) {
            strings.push(raw.to_owned());
            raw.len()
        } else if first == '"' {
            let mut end = 1;
            let bytes = rest.as_bytes();
            while end < bytes.len() && bytes[end] != b'"' {
                end += if bytes[end] == b'\\' { 2 } else { 1 };
            }
            strings.push(rest[1..end.min(rest.len())].to_owned());
            end + 1
        } else if rest.starts_with("'\"'") {
            3
        } else {
            code.push(first);
            first.len_utf8()
        };
        rest = rest.get(length..).unwrap_or_default();
    }
    (code, strings)
}

/// Returns the raw string at the start of a source, including its delimiters.
fn raw_string(source: &str) -> Option<&str> {
    let after = source.strip_prefix('r')?;
    let hashes = after.len() - after.trim_start_matches('#').len();
    let body = after[hashes..].strip_prefix('"')?;
    let end = body.find(&format!("\"{}", "#".repeat(hashes)))?;
    Some(&source[..1 + hashes + 1 + end + 1 + hashes])
}

/// Returns the identifiers that follow a prefix such as `crate::`.
fn named_after<'a>(code: &'a str, prefix: &str) -> impl Iterator<Item = &'a str> {
    code.split(prefix).skip(1).map(|rest| {
        let end = rest
            .find(|c: char| !c.is_alphanumeric() && c != '_')
            .unwrap_or(rest.len());
        &rest[..end]
    })
}

/// Returns the first identifier of each item in a `use crate::{…}` list, and the first identifier of every other
/// `crate::` path.
fn imported_modules(code: &str) -> BTreeSet<&str> {
    let mut found: BTreeSet<&str> = named_after(code, "crate::")
        .filter(|name| !name.is_empty())
        .collect();
    found.extend(list_after(code, "use crate::{"));
    found
}

/// Returns the first identifier of each item of a braced list.
fn list_after<'a>(code: &'a str, opening: &str) -> Vec<&'a str> {
    let Some((_, list)) = code.split_once(opening) else {
        return Vec::new();
    };
    let (mut depth, mut start, mut items) = (0, 0, Vec::new());
    for (at, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => {
                items.push(&list[start..at]);
                break;
            }
            '}' => depth -= 1,
            ',' if depth == 0 => {
                items.push(&list[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    items
        .into_iter()
        .map(|item| item.trim().split([':', ' ']).next().unwrap_or_default())
        .filter(|item| !item.is_empty())
        .collect()
}

fn rank(module: &str) -> Option<usize> {
    RANKS.iter().position(|modules| modules.contains(&module))
}

/// Returns the imports from other modules that do not have a lower rank.
fn upward_imports(module: &str, code: &str) -> Vec<String> {
    let own = rank(module);
    imported_modules(code)
        .into_iter()
        .filter(|target| *target != module && (own.is_none() || rank(target) >= own))
        .map(|target| format!("{module} imports {target}"))
        .collect()
}

#[test]
fn modules_import_only_from_lower_ranks() {
    let root = folder("src");
    let mut wrong = Vec::new();
    for (path, source) in sources(&root) {
        let relative = path.strip_prefix(&root).expect("a path below src");
        let module = relative.iter().next().expect("a name").to_string_lossy();
        let (code, _) = split(&source);
        for import in upward_imports(module.trim_end_matches(".rs"), &code) {
            wrong.push(format!("{}: {import}", relative.display()));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    // Verify that the checks detect violations.
    assert_eq!(
        upward_imports("component", "use crate::{api, page::Home};").len(),
        1
    );
    assert_eq!(upward_imports("route", "crate::api::me()").len(), 1);
    assert!(upward_imports("page", "use crate::{api, session::{a, page}};").is_empty());
}

/// If there is an import cycle, returns its files and all files that import them, directly or indirectly. `imports`
/// contains the files that each file imports.
fn cycle(imports: &BTreeMap<String, BTreeSet<String>>) -> Option<Vec<String>> {
    let mut left = imports.clone();
    loop {
        let names: BTreeSet<String> = left.keys().cloned().collect();
        let before = left.len();
        left.retain(|_, targets| targets.iter().any(|it| names.contains(it)));
        if left.is_empty() {
            return None;
        }
        if left.len() == before {
            return Some(left.into_keys().collect());
        }
    }
}

#[test]
fn files_of_a_folder_do_not_import_each_other_in_cycles() {
    for name in ["api", "component", "host", "model", "page", "servers"] {
        let mut imports = BTreeMap::new();
        for (path, source) in sources(&folder("src").join(name)) {
            let file = path
                .file_stem()
                .expect("a name")
                .to_string_lossy()
                .into_owned();
            if file == "mod" {
                continue;
            }
            let (code, _) = split(&source);
            let mut targets: BTreeSet<String> = named_after(&code, "super::")
                .chain(list_after(&code, "use super::{"))
                .map(str::to_owned)
                .collect();
            targets.retain(|it| !it.is_empty() && *it != "*");
            let of_folder = targets
                .iter()
                .find(|it| it.starts_with(char::is_uppercase))
                .cloned();
            assert_eq!(of_folder, None, "{name}/{file} imports from {name}/mod.rs");
            imports.insert(file, targets);
        }
        assert_eq!(cycle(&imports), None, "in {name}");
    }
    let planted = [("a", "b"), ("b", "a"), ("c", "a")]
        .map(|(from, to)| (from.to_owned(), BTreeSet::from([to.to_owned()])));
    assert!(cycle(&planted.into()).is_some());
}

/// Returns the banned words in a text.
fn banned(text: &str) -> Vec<&'static str> {
    let words = format!(
        " {} ",
        text.to_lowercase()
            .split(|c: char| !c.is_alphanumeric() && c != '\'')
            .collect::<Vec<_>>()
            .join(" ")
    );
    BANNED
        .iter()
        .copied()
        .filter(|word| words.contains(&format!(" {word} ")))
        .collect()
}

#[test]
fn texts_use_the_products_vocabulary() {
    assert_eq!(
        banned("Your organisation could not be told."),
        ["could not be", "organisation", "told"]
    );
    let mut wrong = Vec::new();
    let mut count = 0;
    for root in ["src", "../shell/src"] {
        for (path, source) in sources(&folder(root)) {
            if path.file_name().is_some_and(|it| it == "tests.rs") {
                continue;
            }
            let (_, strings) = split(&source);
            count += strings.len();
            for text in strings {
                for word in banned(&text) {
                    wrong.push(format!("{}: \"{word}\" in \"{text}\"", path.display()));
                }
            }
        }
    }
    assert!(count > 300, "only {count} texts were found");
    assert!(wrong.is_empty(), "{wrong:#?}");
}
