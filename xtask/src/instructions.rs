//! `cargo xtask bench instructions`: counts the instructions of a decision's parts, and compares the counts with those
//! in the repository. `cargo xtask check` does the same.
//!
//! Unlike times, counts do not depend on the machine's speed or on what else the machine is running. They do depend on
//! the compiler, on Valgrind, and on the processor.

use std::{collections::BTreeMap, env, ffi::OsString, fs, path::Path, process::Command};

use anyhow::{Context as _, Result, bail, ensure};
use toml::Table;

use crate::{cargo, machine, read, root, say, succeed, target};

/// The programs that counting requires.
pub(crate) const NEEDS: [machine::Need; 3] = [machine::POSTGRES, machine::REDIS, machine::VALGRIND];

const STORED: &str = "server/benches/instructions.toml";
/// How many times each operation runs.
const TIMES: u64 = 1000;
/// The permitted increase, in percent.
const INCREASE_MAX: u64 = 5;
/// The function whose instructions are counted.
const MEASURED: &str = "operations::measured";

type Counts = BTreeMap<String, u64>;

/// Returns the processor's architecture, and those of its features for which libraries have specialized functions.
fn processor() -> String {
    #[cfg(target_arch = "x86_64")]
    let features = [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("pclmulqdq", is_x86_feature_detected!("pclmulqdq")),
        ("sha", is_x86_feature_detected!("sha")),
        ("vpclmulqdq", is_x86_feature_detected!("vpclmulqdq")),
    ];
    #[cfg(not(target_arch = "x86_64"))]
    let features: [(&str, bool); 0] = [];
    let present = features.into_iter().filter(|(_, is_present)| *is_present);
    [env::consts::ARCH]
        .into_iter()
        .chain(present.map(|(name, _)| name))
        .collect::<Vec<_>>()
        .join(" ")
}

/// The factors, apart from the code, on which the counts depend.
#[derive(Debug, PartialEq, Eq)]
struct Platform {
    /// See [`processor`].
    processor: String,
    /// The compiler's version without the patch number.
    rustc: String,
    valgrind: String,
}

#[derive(Debug, PartialEq, Eq)]
struct Report {
    platform: Platform,
    counts: Counts,
}

/// Counts instructions and compares the counts with those in the repository. With `--write`, writes the counts to the
/// repository instead.
///
/// # Errors
///
/// Without `--write`, fails if an operation takes over 5% more instructions than the count in the repository, or if the
/// operations differ from those in the repository.
pub(crate) fn run(arguments: &[OsString]) -> Result<()> {
    machine::install(&NEEDS)?;
    if let Some(unknown) = arguments.iter().find(|it| *it != "--write") {
        bail!("unknown option {}", unknown.display());
    }
    if arguments.is_empty() {
        return check();
    }
    let report = Report {
        platform: Platform::current()?,
        counts: measure()?,
    };
    print(&report.counts);
    fs::write(root().join(STORED), shown(&report))
        .with_context(|| format!("cannot write {STORED}"))?;
    say(&format!("wrote {STORED}"));
    Ok(())
}

/// Compares the counts with those in the repository. On a platform to which the stored counts do not apply, prints the
/// differences between the platforms instead.
///
/// # Errors
///
/// Fails if an operation takes over 5% more instructions than the count in the repository, or if the operations differ
/// from those in the repository.
pub(crate) fn check() -> Result<()> {
    let text = fs::read_to_string(root().join(STORED));
    let before = stored(&text.with_context(|| format!("cannot read {STORED}"))?)?;
    let platform = Platform::current()?;
    let differences = before.platform.differences(&platform);
    if !differences.is_empty() {
        say(&format!(
            "instruction counts are not checked, because those in {STORED} are for {}",
            differences.join(" and ")
        ));
        return Ok(());
    }
    let counts = measure()?;
    print(&counts);
    let faults = compare(&before.counts, &counts);
    ensure!(
        faults.is_empty(),
        "{}\nIf this is intended, `cargo xtask bench instructions --write` updates {STORED}",
        faults.join("\n")
    );
    Ok(())
}

impl Platform {
    fn current() -> Result<Self> {
        let compiler = env::var_os("RUSTC").unwrap_or("rustc".into());
        let compiler = read(Command::new(compiler).arg("--version"))?;
        let rustc = compiler.split_whitespace().nth(1);
        let rustc = rustc.and_then(|it| Some(it.rsplit_once('.')?.0.to_owned()));
        let valgrind = read(Command::new("valgrind").arg("--version"))?;
        let valgrind = valgrind.trim().trim_start_matches("valgrind-");
        Ok(Self {
            processor: processor(),
            rustc: rustc.with_context(|| format!("{compiler:?} is not a version"))?,
            valgrind: valgrind.to_owned(),
        })
    }

    /// Returns how this platform differs from the current one.
    fn differences(&self, current: &Self) -> Vec<String> {
        let pairs = [
            ("", &self.processor, &current.processor),
            ("rustc ", &self.rustc, &current.rustc),
            ("Valgrind ", &self.valgrind, &current.valgrind),
        ];
        let differing = pairs.into_iter().filter(|(_, this, other)| this != other);
        differing
            .map(|(name, this, other)| format!("{name}{this} (here: {other})"))
            .collect()
    }
}

fn print(counts: &Counts) {
    for (name, count) in counts {
        println!("{count:>8} instructions: {name}");
    }
}

/// Runs all operations under Valgrind.
fn measure() -> Result<Counts> {
    let folder = target().join("instruction-counts");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    say("counting instructions");
    let bench = || {
        let mut bench = cargo();
        // Incremental compilation divides the code into different units, which changes what is inlined.
        bench
            .env("CARGO_INCREMENTAL", "0")
            .args(["bench", "--quiet", "--profile", "instructions"])
            .args(["--package", "quota-operations", "--bench", "operations"]);
        bench
    };
    succeed(bench().arg("--no-run"))?;
    let valgrind = format!(
        "valgrind --quiet --tool=callgrind --callgrind-out-file={} --toggle-collect={MEASURED} \
         --dump-after={MEASURED}",
        folder.join("out").display()
    );
    let output =
        read(
            bench()
                .env(runner()?, &valgrind)
                .args(["--", "--instructions", &TIMES.to_string()]),
        )?;
    let names = output
        .lines()
        .filter_map(|line| line.strip_prefix("operation: "));
    let mut counts = Counts::new();
    for (index, name) in names.enumerate() {
        let count = total(&folder.join(format!("out.{}", index + 1)))? / TIMES;
        ensure!(count > 0, "{name}: Valgrind counted nothing");
        counts.insert(name.to_owned(), count);
    }
    ensure!(!counts.is_empty(), "no operation was run");
    Ok(counts)
}

/// Returns the name of the environment variable that sets the program with which cargo runs compiled programs.
fn runner() -> Result<String> {
    let compiler = env::var_os("RUSTC").unwrap_or("rustc".into());
    let version = read(Command::new(compiler).arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    let host = host.context("`rustc -vV` does not name the host")?;
    let host = host.replace('-', "_").to_uppercase();
    Ok(format!("CARGO_TARGET_{host}_RUNNER"))
}

/// Returns the number of instructions in a file that Callgrind has written.
fn total(file: &Path) -> Result<u64> {
    let text = fs::read_to_string(file)
        .with_context(|| format!("Callgrind has not written {}", file.display()))?;
    let total = text.lines().find_map(|line| line.strip_prefix("summary: "));
    let total = total.with_context(|| format!("{} has no summary", file.display()))?;
    Ok(total.trim().parse()?)
}

fn shown(report: &Report) -> String {
    let head = format!(
        "# Instructions per operation. `cargo xtask bench instructions --write` writes this file.\n\n\
         processor = \"{}\"\nrustc = \"{}\"\nvalgrind = \"{}\"\n\n[instructions]\n",
        report.platform.processor, report.platform.rustc, report.platform.valgrind
    );
    let lines = report
        .counts
        .iter()
        .map(|(name, count)| format!("\"{name}\" = {count}\n"));
    std::iter::once(head).chain(lines).collect()
}

fn stored(text: &str) -> Result<Report> {
    let table: Table = toml::from_str(text).with_context(|| format!("cannot parse {STORED}"))?;
    let text_of = |name: &str| {
        let text = table.get(name).and_then(|it| it.as_str());
        let text = text.with_context(|| format!("{STORED} has no `{name}`"))?;
        anyhow::Ok(text.to_owned())
    };
    let counts = table.get("instructions").and_then(|it| it.as_table());
    let counts = counts.with_context(|| format!("{STORED} has no `instructions`"))?;
    let counts = counts
        .iter()
        .map(|(name, count)| {
            let count = count
                .as_integer()
                .and_then(|count| u64::try_from(count).ok());
            Ok((name.clone(), count.context("a count is not a number")?))
        })
        .collect::<Result<Counts>>()?;
    Ok(Report {
        platform: Platform {
            processor: text_of("processor")?,
            rustc: text_of("rustc")?,
            valgrind: text_of("valgrind")?,
        },
        counts,
    })
}

fn compare(stored: &Counts, counts: &Counts) -> Vec<String> {
    let mut faults = Vec::new();
    for (name, &count) in counts {
        match stored.get(name) {
            None => faults.push(format!("{name}: not in {STORED}")),
            Some(&stored) if count * 100 > stored * (100 + INCREASE_MAX) => faults.push(format!(
                "{name}: {count} instructions, more than {INCREASE_MAX}% above the {stored} in {STORED}"
            )),
            Some(_) => {}
        }
    }
    let missing = stored.keys().filter(|name| !counts.contains_key(*name));
    faults.extend(missing.map(|name| format!("{name}: no such operation")));
    faults
}

#[cfg(test)]
mod tests {
    use super::{Counts, Platform, Report, compare, shown, stored, total};

    fn platform(processor: &str, rustc: &str) -> Platform {
        Platform {
            processor: processor.to_owned(),
            rustc: rustc.to_owned(),
            valgrind: "3.19.0".to_owned(),
        }
    }

    fn counts(of: &[(&str, u64)]) -> Counts {
        of.iter()
            .map(|(name, count)| ((*name).to_owned(), *count))
            .collect()
    }

    #[test]
    fn only_an_increase_of_more_than_five_percent_is_a_fault() {
        let before = counts(&[("a", 1000)]);
        for fine in [10, 1000, 1049, 1050] {
            assert!(compare(&before, &counts(&[("a", fine)])).is_empty());
        }
        let faults = compare(&before, &counts(&[("a", 1051)]));
        assert_eq!(
            faults,
            [
                "a: 1051 instructions, more than 5% above the 1000 in server/benches/instructions.toml"
            ]
        );
    }

    #[test]
    fn an_operation_without_a_stored_count_is_a_fault() {
        let faults = compare(&counts(&[("a", 1)]), &counts(&[("a", 1), ("b", 1)]));
        assert_eq!(faults, ["b: not in server/benches/instructions.toml"]);
    }

    #[test]
    fn a_stored_operation_that_was_not_run_is_a_fault() {
        let faults = compare(&counts(&[("a", 1), ("b", 1)]), &counts(&[("a", 1)]));
        assert_eq!(faults, ["b: no such operation"]);
    }

    #[test]
    fn a_report_is_written_and_read() {
        let report = Report {
            platform: platform("x86_64", "1.95"),
            counts: counts(&[("key, parse and hash", 1), ("b", 2)]),
        };
        assert_eq!(stored(&shown(&report)).expect("valid TOML"), report);
        assert!(stored("a = \"b\"").is_err());
    }

    #[test]
    fn differences_name_both_versions() {
        let before = platform("x86_64", "1.95");
        assert!(before.differences(&platform("x86_64", "1.95")).is_empty());
        let differences = before.differences(&platform("aarch64", "1.96"));
        assert_eq!(
            differences,
            ["x86_64 (here: aarch64)", "rustc 1.95 (here: 1.96)"]
        );
    }

    #[test]
    fn the_total_is_that_of_the_summary() {
        let file = std::env::temp_dir().join(format!("quota-callgrind-{}", std::process::id()));
        let read = |text: &str| {
            std::fs::write(&file, text).expect("a file");
            total(&file).ok()
        };
        assert_eq!(
            read("events: Ir\nfn=(1)\n1 20\nsummary: 21\ntotals: 22\n"),
            Some(21)
        );
        assert_eq!(read("events: Ir\n"), None);
        std::fs::remove_file(&file).expect("the file");
    }
}
