//! Finds dead links in Markdown. A relative link must lead to a file in the repository, and a fragment (`#…`) must lead
//! to one of the file's headings.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, bail};

use crate::{read, root, say};

/// # Errors
///
/// Fails if a Markdown file that Git does not ignore links to something that does not exist.
pub(crate) fn check() -> Result<()> {
    say("checking links in Markdown");
    let listed = read(Command::new("git").current_dir(root()).args([
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
        "*.md",
    ]))?;
    let mut documents = HashMap::new();
    for name in listed.lines() {
        let path = root().join(name);
        if let Ok(text) = fs::read_to_string(&path) {
            documents.insert(path, text);
        }
    }
    let mut dead: Vec<String> = documents
        .iter()
        .flat_map(|(path, text)| {
            links(text)
                .into_iter()
                .filter(|link| !resolves(path, link, &documents))
                .map(|link| format!("{}: {link}", path.display()))
        })
        .collect();
    dead.sort();
    if !dead.is_empty() {
        bail!("dead links:\n  {}", dead.join("\n  "));
    }
    Ok(())
}

/// Returns the targets of `[text](target)` and `[name]: target`, outside code.
fn links(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut in_fence = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            in_fence = !in_fence;
            continue;
        }
        if in_fence {
            continue;
        }
        // Every second part is inside backticks, so skip it.
        for plain in line.split('`').step_by(2) {
            for (at, _) in plain.match_indices("](") {
                if let Some((target, _)) = plain[at + 2..].split_once(')') {
                    found.push(target.to_owned());
                }
            }
        }
        // A link whose text is code: [`file`](target).
        for (at, _) in line.match_indices("`](") {
            if let Some((target, _)) = line[at + 3..].split_once(')') {
                found.push(target.to_owned());
            }
        }
        if let Some((_, target)) = line
            .strip_prefix('[')
            .and_then(|rest| rest.split_once("]: "))
        {
            found.push(target.trim().to_owned());
        }
    }
    found.sort();
    found.dedup();
    found
}

fn resolves(from: &Path, link: &str, documents: &HashMap<PathBuf, String>) -> bool {
    if link.contains("://") || link.starts_with("mailto:") {
        return true;
    }
    let (path, heading) = link.split_once('#').unwrap_or((link, ""));
    let target = if path.is_empty() {
        from.to_owned()
    } else {
        from.parent().unwrap_or(from).join(path)
    };
    let Ok(target) = target.canonicalize() else {
        return false;
    };
    heading.is_empty()
        || documents
            .iter()
            .find(|(path, _)| path.canonicalize().is_ok_and(|it| it == target))
            .is_some_and(|(_, text)| anchors(text).any(|anchor| anchor == heading))
}

/// Returns the anchors that GitHub gives to a document's headings.
fn anchors(text: &str) -> impl Iterator<Item = String> {
    text.lines()
        .filter(|line| line.starts_with('#'))
        .map(|line| {
            line.trim_start_matches('#')
                .trim()
                .to_lowercase()
                .chars()
                .filter(|it| it.is_alphanumeric() || matches!(it, ' ' | '-' | '_'))
                .map(|it| if it == ' ' { '-' } else { it })
                .collect()
        })
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::{anchors, links, resolves};

    #[test]
    fn links_outside_code_are_found() {
        let text = "See [a](x.md) and [`b`](y.md#part), not `[c](z.md)`.\n```\n[d](w.md)\n```\n[e]: v.md\n";
        assert_eq!(links(text), ["v.md", "x.md", "y.md#part"]);
    }

    #[test]
    fn a_dead_file_or_heading_does_not_resolve() {
        let folder = std::env::temp_dir();
        let path = folder.join(format!("quota-links-{}.md", std::process::id()));
        std::fs::write(&path, "# The map\n").expect("written");
        let documents = HashMap::from([(path.clone(), "# The map\n".to_owned())]);
        assert!(resolves(&path, "#the-map", &documents));
        assert!(!resolves(&path, "#the-mop", &documents));
        assert!(!resolves(&path, "gone.md", &documents));
        assert!(resolves(&path, "https://example.com/gone", &documents));
        std::fs::remove_file(path).expect("removed");
    }

    #[test]
    fn anchors_are_those_of_github() {
        let found: Vec<String> = anchors("## When Redis is down: `share`\ntext\n").collect();
        assert_eq!(found, ["when-redis-is-down-share"]);
    }
}
