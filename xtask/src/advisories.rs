//! Checks the [lock files](lock::FILES) for known vulnerabilities, using a copy of the RustSec advisory database.
//!
//! Runs only if `QUOTA_ADVISORY_DB` contains the path of such a copy: a directory or a `.tar.gz`. Downloads nothing.
//! Prints the date and age of the newest advisory in the copy. Vulnerabilities fail the check; other notices (such as
//! unmaintained or unsound) are printed. `.config/advisories.toml` lists advisories to ignore, each with an expiration
//! date.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail};
use semver::{Comparator, Op, Version, VersionReq};
use toml::{Table, Value};

use crate::{lock, root, say, succeed};

const ACCEPTED: &str = ".config/advisories.toml";

struct Advisory {
    id: String,
    package: String,
    date: String,
    /// The kind of notice: `unmaintained`, `unsound` or `notice`. Absent for vulnerabilities.
    informational: Option<String>,
    withdrawn: bool,
    patched: Vec<VersionReq>,
    unaffected: Vec<VersionReq>,
    title: String,
}

pub(crate) fn check() -> Result<()> {
    let Some(database) = env::var_os("QUOTA_ADVISORY_DB").filter(|path| !path.is_empty()) else {
        say(
            "skipping the advisory check: QUOTA_ADVISORY_DB does not name a copy of the RustSec database",
        );
        return Ok(());
    };
    let advisories = read_database(Path::new(&database))?;
    let newest = advisories
        .iter()
        .map(|advisory| advisory.date.as_str())
        .max()
        .unwrap_or_default();
    let age = age_in_days(newest).map_or_else(String::new, |days| format!(", {days} days ago"));
    say(&format!(
        "{} advisories, the newest of {newest}{age}",
        advisories.len()
    ));

    let mut packages = BTreeSet::new();
    for file in lock::FILES {
        packages.extend(lock::locked(&fs::read_to_string(root().join(file))?)?);
    }
    let mut accepted = Accepted::read(&fs::read_to_string(root().join(ACCEPTED))?)?;
    let mut faults = Vec::new();
    for (package, version) in packages {
        for advisory in advisories
            .iter()
            .filter(|advisory| advisory.hits(&package, &version))
        {
            let hit = format!("{package} {version}: {} {}", advisory.id, advisory.title);
            match &advisory.informational {
                Some(kind) => say(&format!("{kind}: {hit}")),
                None if accepted.takes(advisory) => say(&format!("accepted: {hit}")),
                None => faults.push(format!("vulnerable: {hit}")),
            }
        }
    }
    faults.extend(accepted.faults());
    if !faults.is_empty() {
        bail!(
            "{} and {ACCEPTED}\n{}",
            lock::FILES.join(", "),
            faults.join("\n")
        );
    }
    Ok(())
}

/// The content of `.config/advisories.toml`.
#[derive(Debug)]
struct Accepted(Vec<Acceptance>);

#[derive(Debug)]
struct Acceptance {
    id: String,
    package: String,
    until: String,
    used: bool,
}

impl Accepted {
    fn read(text: &str) -> Result<Self> {
        let table: Table = text.parse().context(ACCEPTED)?;
        let list = table.get("accepted").and_then(Value::as_array);
        let list = list.into_iter().flatten().map(|entry| {
            let field = |name: &str| {
                let text = entry.get(name).and_then(Value::as_str);
                text.map(str::to_owned)
                    .with_context(|| format!("an entry of {ACCEPTED} has no {name}"))
            };
            field("reason")?;
            Ok(Acceptance {
                id: field("id")?,
                package: field("package")?,
                until: field("until")?,
                used: false,
            })
        });
        list.collect::<Result<_>>().map(Self)
    }

    fn takes(&mut self, advisory: &Advisory) -> bool {
        let found = self
            .0
            .iter_mut()
            .find(|accepted| accepted.id == advisory.id && accepted.package == advisory.package);
        found.map(|accepted| accepted.used = true).is_some()
    }

    /// Describes the entries that have expired, have an invalid date, or match no advisory.
    fn faults(&self) -> Vec<String> {
        self.0
            .iter()
            .filter_map(|accepted| {
                let Acceptance {
                    id, until, used, ..
                } = accepted;
                match age_in_days(until) {
                    None => Some(format!("{id}: `until` is not a date: {until}")),
                    Some(age) if age > 0 => Some(format!("{id}: was accepted only until {until}")),
                    Some(_) if !used => Some(format!("{id}: accepted, but matches nothing")),
                    Some(_) => None,
                }
            })
            .collect()
    }
}

impl Advisory {
    /// Parses an advisory: a Markdown file that begins with a fenced block of TOML.
    fn parse(text: &str) -> Result<Self> {
        let (head, body) = text
            .strip_prefix("```toml\n")
            .and_then(|rest| rest.split_once("\n```"))
            .context("the advisory does not begin with a block of TOML")?;
        let head: Table = head.parse()?;
        let advisory = head
            .get("advisory")
            .and_then(Value::as_table)
            .context("no [advisory]")?;
        let field = |name: &str| {
            advisory
                .get(name)
                .and_then(Value::as_str)
                .map(str::to_owned)
        };
        let versions = |name: &str| -> Result<Vec<VersionReq>> {
            let list = head
                .get("versions")
                .and_then(|versions| versions.get(name))
                .and_then(Value::as_array);
            list.into_iter()
                .flatten()
                .map(|req| {
                    VersionReq::parse(req.as_str().unwrap_or_default())
                        .context("no version requirement")
                })
                .collect()
        };
        Ok(Self {
            id: field("id").context("no id")?,
            package: field("package").context("no package")?,
            date: field("date").context("no date")?,
            informational: field("informational"),
            withdrawn: advisory.contains_key("withdrawn"),
            patched: versions("patched")?,
            unaffected: versions("unaffected")?,
            title: body
                .lines()
                .find_map(|line| line.strip_prefix("# "))
                .unwrap_or_default()
                .trim()
                .to_owned(),
        })
    }

    fn hits(&self, package: &str, version: &Version) -> bool {
        let safe = self
            .patched
            .iter()
            .chain(&self.unaffected)
            .any(|req| matches(req, version));
        !self.withdrawn && self.package == package && !safe
    }
}

/// Returns whether a version matches a requirement. RustSec compares versions only by their order, in which a pre-release
/// is between two releases. In `semver`, a pre-release matches only if a comparator contains a pre-release of the same
/// release. Therefore, this function adds a comparator that the version itself matches.
fn matches(req: &VersionReq, version: &Version) -> bool {
    let mut req = req.clone();
    for comparator in &mut req.comparators {
        // For a pre-release, `semver` does not treat `>= 2` and `< 2` like `>= 2.0.0` and `< 2.0.0`.
        if matches!(comparator.op, Op::GreaterEq | Op::Less) {
            comparator.minor.get_or_insert(0);
            comparator.patch.get_or_insert(0);
        }
    }
    req.comparators.push(Comparator {
        op: Op::Exact,
        major: version.major,
        minor: Some(version.minor),
        patch: Some(version.patch),
        pre: version.pre.clone(),
    });
    req.matches(version)
}

fn read_database(path: &Path) -> Result<Vec<Advisory>> {
    if path.is_dir() {
        return read_directory(path);
    }
    let dir = env::temp_dir().join(format!("quota-advisories-{}", std::process::id()));
    fs::create_dir(&dir)?;
    let advisories = succeed(
        Command::new("tar")
            .arg("-xzf")
            .arg(path)
            .arg("-C")
            .arg(&dir),
    )
    .and_then(|()| read_directory(&dir));
    fs::remove_dir_all(&dir)?;
    advisories
}

fn read_directory(path: &Path) -> Result<Vec<Advisory>> {
    let mut files = Vec::new();
    for package in fs::read_dir(path.join("crates"))
        .with_context(|| format!("{} has no crates/", path.display()))?
    {
        for file in fs::read_dir(package?.path())? {
            files.push(file?.path());
        }
    }
    files.retain(|file: &PathBuf| file.extension().is_some_and(|extension| extension == "md"));
    if files.is_empty() {
        bail!("{} has no advisories", path.display());
    }
    files
        .iter()
        .map(|file| {
            Advisory::parse(&fs::read_to_string(file)?).with_context(|| file.display().to_string())
        })
        .collect()
}

/// Returns the number of days from `date` (`2026-08-21`) to today.
fn age_in_days(date: &str) -> Option<i64> {
    let mut parts = date.split('-').map(|part| part.parse::<i64>().ok());
    let (year, month, day) = (parts.next()??, parts.next()??, parts.next()??);
    // Days since 1970-01-01 in the proleptic Gregorian calendar, with years that begin in March.
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let date =
        365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 719_469;
    let today = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs() / 86_400;
    Some(i64::try_from(today).ok()? - date)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADVISORY: &str = "```toml\n[advisory]\nid = \"RUSTSEC-2020-0001\"\npackage = \"thing\"\n\
                            date = \"2020-01-02\"\n\n[versions]\npatched = [\">= 1.2.3\"]\n\
                            unaffected = [\"< 1.0.0\"]\n```\n\n# It leaks\n\nA lot.\n";

    fn hits(version: &str) -> bool {
        let advisory = Advisory::parse(ADVISORY).expect("a valid advisory");
        advisory.hits("thing", &Version::parse(version).expect("a version"))
    }

    #[test]
    fn only_versions_between_unaffected_and_patched_match() {
        assert!(hits("1.0.0"));
        assert!(hits("1.2.2"));
        assert!(!hits("0.9.9"));
        assert!(!hits("1.2.3"));
        assert!(!hits("2.0.0"));
        assert!(hits("1.2.3-rc.1"));
        assert!(!hits("1.2.4-rc.1"));
    }

    #[test]
    fn prerelease_is_compared_by_its_place_in_the_order() {
        for (requirement, version, expected) in [
            (">= 1.2.3", "2.0.0-rc.1", true),
            (">= 1.2.3", "1.3.0-rc.1", true),
            (">= 2.0.0", "2.0.0-rc.1", false),
            (">= 2.0.0-rc.1", "2.0.0-rc.2", true),
            (">= 2", "2.1.0-rc.1", true),
            (">= 2", "2.0.0-rc.1", false),
            ("< 2.0.0", "2.0.0-rc.1", true),
            ("< 2", "2.0.0-rc.1", true),
            ("< 1.2.3", "1.3.0-rc.1", false),
            ("> 1.2.4", "1.2.5-rc.1", true),
            ("<= 1.2.4", "1.2.5-rc.1", false),
            ("= 1.2.4", "1.2.5-rc.1", false),
            // A pre-release of the next incompatible version is not a compatible update.
            ("^1.2.3", "1.3.0-rc.1", true),
            ("^1.2.3", "2.0.0-rc.1", false),
            ("~1.2.3", "1.3.0-rc.1", false),
            (">= 1.2.3, < 2.0.0", "1.9.0-rc.1", true),
        ] {
            let req = VersionReq::parse(requirement).expect("a requirement");
            let found = matches(&req, &Version::parse(version).expect("a version"));
            assert_eq!(found, expected, "{version} {requirement}");
        }
    }

    #[test]
    fn another_package_and_a_withdrawn_advisory_do_not_match() {
        let version = Version::new(1, 0, 0);
        let advisory = Advisory::parse(ADVISORY).expect("a valid advisory");
        assert_eq!(advisory.title, "It leaks");
        assert!(!advisory.hits("other", &version));
        let withdrawn = ADVISORY.replace(
            "\n\n[versions]",
            "\nwithdrawn = \"2020-02-01\"\n\n[versions]",
        );
        assert!(
            !Advisory::parse(&withdrawn)
                .expect("a valid advisory")
                .hits("thing", &version)
        );
    }

    #[test]
    fn ages_count_days() {
        let day = |date| age_in_days(date).expect("a date");
        assert_eq!(day("2024-02-28") - day("2024-03-01"), 2);
        assert_eq!(day("2023-12-31") - day("2024-01-01"), 1);
        let today = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .expect("later")
            .as_secs()
            / 86_400;
        assert_eq!(day("1970-01-01"), i64::try_from(today).expect("small"));
    }

    #[test]
    fn workspace_members_are_not_looked_up() {
        let lock = "[[package]]\nname = \"own\"\nversion = \"0.1.0\"\n\n[[package]]\nname = \"thing\"\n\
                    version = \"1.0.0\"\nsource = \"registry+https://example.org\"\n";
        assert_eq!(
            lock::locked(lock).expect("a lock"),
            [("thing".to_owned(), Version::new(1, 0, 0))]
        );
    }

    #[test]
    fn an_acceptance_needs_a_reason_and_a_match_and_a_date_in_the_future() {
        let entry = |until| {
            format!(
                "[[accepted]]\nid = \"RUSTSEC-2020-0001\"\npackage = \"thing\"\nreason = \"none\"\n\
                 until = \"{until}\"\n"
            )
        };
        let advisory = Advisory::parse(ADVISORY).expect("a valid advisory");
        let mut accepted = Accepted::read(&entry("9999-01-01")).expect("entries");
        assert_eq!(accepted.faults().len(), 1, "the entry matches nothing");
        assert!(accepted.takes(&advisory));
        assert_eq!(accepted.faults(), Vec::<String>::new());

        let mut accepted = Accepted::read(&entry("2020-01-01")).expect("entries");
        assert!(accepted.takes(&advisory));
        assert_eq!(accepted.faults().len(), 1, "the entry has expired");
        assert!(Accepted::read(&entry("2020-01-01").replace("reason", "why")).is_err());
    }
}
