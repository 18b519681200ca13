//! Finds unused dependencies: those whose names do not appear in the crate that declares them.
//!
//! The compiler cannot detect unused dependencies, because a crate has several targets, and each target uses some of
//! the dependencies. A dependency that is declared only to enable one of its features is listed in the crate's
//! `package.metadata.features-only`.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, bail};
use toml::{Table, Value};

use crate::{root, say};

const KINDS: [&str; 3] = ["dependencies", "dev-dependencies", "build-dependencies"];

/// # Errors
///
/// Fails if a crate of the workspace declares a dependency that it does not use.
pub(crate) fn check() -> Result<()> {
    say("checking for unused dependencies");
    let workspace = manifest(&root())?;
    let members = workspace
        .get("workspace")
        .and_then(|it| it.get("members"))
        .and_then(Value::as_array)
        .context("the workspace has no members")?;
    let mut unused = Vec::new();
    for member in members.iter().filter_map(Value::as_str) {
        let folder = root().join(member);
        let names = declared(&manifest(&folder)?);
        let mut source = String::new();
        read_sources(&folder, &mut source)?;
        unused.extend(
            names
                .into_iter()
                .filter(|name| !mentions(&source, &name.replace('-', "_")))
                .map(|name| format!("{member}: {name}")),
        );
    }
    if !unused.is_empty() {
        bail!("unused dependencies:\n  {}", unused.join("\n  "));
    }
    Ok(())
}

fn manifest(folder: &Path) -> Result<Table> {
    let path = folder.join("Cargo.toml");
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    toml::from_str(&text).with_context(|| format!("cannot parse {}", path.display()))
}

/// Returns the dependencies of all kinds and targets, except those that are declared only to enable one of their
/// features.
fn declared(manifest: &Table) -> Vec<String> {
    let features_only: Vec<&str> = manifest
        .get("package")
        .and_then(|it| it.get("metadata"))
        .and_then(|it| it.get("features-only"))
        .and_then(Value::as_array)
        .map(|names| names.iter().filter_map(Value::as_str).collect())
        .unwrap_or_default();
    let targets = manifest.get("target").and_then(Value::as_table);
    let mut names: Vec<String> = std::iter::once(manifest)
        .chain(
            targets
                .into_iter()
                .flat_map(Table::values)
                .filter_map(Value::as_table),
        )
        .flat_map(|table| KINDS.iter().filter_map(|kind| table.get(*kind)?.as_table()))
        .flat_map(Table::keys)
        .filter(|name| !features_only.contains(&name.as_str()))
        .cloned()
        .collect();
    names.sort();
    names.dedup();
    names
}

/// Appends the contents of all Rust files in a folder to `source`, except those of nested crates. Includes files in
/// other folders that are named in a `path` attribute.
fn read_sources(folder: &Path, source: &mut String) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            if !path.join("Cargo.toml").exists() && !path.ends_with("node_modules") {
                read_sources(&path, source)?;
            }
        } else if path.extension().is_some_and(|it| it == "rs") {
            let text = fs::read_to_string(&path)?;
            for module in modules_elsewhere(&text) {
                let path = folder.join(module);
                source.push_str(
                    &fs::read_to_string(&path)
                        .with_context(|| format!("cannot read {}", path.display()))?,
                );
            }
            source.push_str(&text);
        }
    }
    Ok(())
}

/// Returns the paths in `path` attributes.
fn modules_elsewhere(text: &str) -> impl Iterator<Item = &str> {
    let attributes = text.lines().map(str::trim);
    attributes.filter_map(|it| it.strip_prefix("#[path = \"")?.strip_suffix("\"]"))
}

/// Returns whether a line of code contains `name` as a whole word.
fn mentions(source: &str, name: &str) -> bool {
    let is_word = |character: char| character.is_alphanumeric() || character == '_';
    source
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .any(|line| {
            line.match_indices(name).any(|(at, _)| {
                !line[..at].ends_with(is_word) && !line[at + name.len()..].starts_with(is_word)
            })
        })
}

#[cfg(test)]
mod tests {
    use super::{declared, mentions, modules_elsewhere};

    #[test]
    fn modules_in_other_folders_are_found() {
        let source = "#[path = \"../../a/b.rs\"]\nmod b;\nmod c;\n";
        let found: Vec<&str> = modules_elsewhere(source).collect();
        assert_eq!(found, ["../../a/b.rs"]);
    }

    #[test]
    fn a_dependency_is_used_when_code_names_it_as_a_whole_word() {
        assert!(mentions("use serde_json::Value;", "serde_json"));
        assert!(!mentions("use serde_json::Value;", "serde"));
        assert!(!mentions("// serde is not used\n", "serde"));
    }

    #[test]
    fn dependencies_of_every_kind_and_target_are_found() {
        let manifest = r#"
            [package]
            metadata.features-only = ["uuid"]
            [dependencies]
            a.workspace = true
            uuid = "1"
            [dev-dependencies]
            b = "1"
            [target.'cfg(unix)'.dependencies]
            c = { version = "1" }
        "#;
        let manifest = toml::from_str(manifest).expect("valid TOML");
        assert_eq!(declared(&manifest), ["a", "b", "c"]);
    }
}
