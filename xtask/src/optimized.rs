//! `cargo xtask build` and `cargo xtask profile`: the server as the Debian package and the image contain it.
//!
//! The compiler optimizes the server with a profile, which states how often each part of a function runs while the
//! server processes check requests. The profile is in the repository, so building the server requires neither a
//! database nor a run under load. It only affects speed: a function that has been changed since the profile
//! was recorded is compiled without it. The compiler finds functions by names that contain a hash of the compiler's
//! version, the platform, and the versions of the function's crate and its dependencies.

use std::{
    env, fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use crate::{cargo, console, machine, read, root, say, succeed, target};

/// The profile, relative to the root of the repository.
const PROFILE: &str = "deploy/profile/quota.profdata";
/// What the names of the server's functions depend on: the compiler, the platform, and the versions of all crates.
const RECORDED_WITH: &str = "deploy/profile/recorded-with";
/// Functions that ran less often are omitted from the profile. They are most of the server's functions, but do not
/// matter for its speed.
const RUNS_MIN: u64 = 10_000;

/// How the server is linked to the C library.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Linking {
    /// For the image, which contains no libraries.
    Static,
    Dynamic,
}

struct Rust {
    /// The output of `rustc -vV`.
    about: String,
    /// The platform that it compiles for.
    host: String,
}

impl Rust {
    fn current() -> Result<Self> {
        let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let about = read(Command::new(rustc).current_dir(root()).arg("-vV"))?;
        let host = about.lines().find_map(|line| line.strip_prefix("host: "));
        let host = host.context("`rustc -vV` does not print the host")?;
        Ok(Self {
            host: host.to_owned(),
            about,
        })
    }

    /// Describes everything that the names of functions depend on.
    fn names(&self) -> Result<String> {
        let lock = fs::read(root().join("Cargo.lock"))?;
        Ok(format!("{}Cargo.lock: {:016x}\n", self.about, hash(&lock)))
    }
}

/// Builds the console and the server. Copies the server to `output`, and prints its path.
pub(crate) fn build_to(output: Option<&Path>, is_static: bool) -> Result<()> {
    // The server embeds the console.
    console::build()?;
    let linking = if is_static {
        Linking::Static
    } else {
        Linking::Dynamic
    };
    let built = build(linking)?;
    if let Some(output) = output {
        if let Some(directory) = output.parent() {
            fs::create_dir_all(directory)?;
        }
        fs::copy(&built, output).with_context(|| format!("cannot write {}", output.display()))?;
    }
    println!("{}", output.unwrap_or(&built).display());
    Ok(())
}

/// Builds the server, and returns its path.
pub(crate) fn build(linking: Linking) -> Result<PathBuf> {
    let rust = Rust::current()?;
    say("building the server with all optimizations (a first build takes about ten minutes)");
    let recorded_with = fs::read_to_string(root().join(RECORDED_WITH))
        .with_context(|| format!("cannot read {RECORDED_WITH}"))?;
    if recorded_with != rust.names()? {
        say(
            "warning: the profile was recorded with another version of Rust, on another platform, or with another Cargo.lock, so the server may be slower; `cargo xtask profile` records it again",
        );
    }
    let profile = copy_of_profile()?;
    let flags = [
        format!("-Cprofile-use={}", profile.display()),
        // Changed functions are expected; see above.
        "-Cllvm-args=-no-pgo-warn-mismatch".to_owned(),
        // The profile does not contain functions that rarely run, so the compiler cannot tell that calls in them are
        // rare. With its usual limits, it would inline too many of them, and the program would be 5 MB larger. Other
        // limits apply to calls that the profile shows to be frequent.
        "-Cllvm-args=-inline-threshold=60".to_owned(),
        "-Cllvm-args=-inlinehint-threshold=100".to_owned(),
    ];
    compile(&rust, flags.to_vec(), linking, &target())
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

/// Copies the profile to a path that depends on its content. cargo compares the compiler's arguments, but not the
/// profile, to find out what must be compiled again.
fn copy_of_profile() -> Result<PathBuf> {
    let profile =
        fs::read(root().join(PROFILE)).with_context(|| format!("cannot read {PROFILE}"))?;
    let directory = target().join("profile");
    fs::create_dir_all(&directory)?;
    let copy = directory.join(format!("{:016x}.profdata", hash(&profile)));
    fs::write(&copy, profile)?;
    Ok(copy)
}

/// Compiles the server, with these flags and those in `RUSTFLAGS` for all crates except build scripts and procedural
/// macros.
fn compile(
    rust: &Rust,
    mut flags: Vec<String>,
    linking: Linking,
    directory: &Path,
) -> Result<PathBuf> {
    let host = &rust.host;
    if let Ok(given) = env::var("CARGO_ENCODED_RUSTFLAGS") {
        flags.extend(given.split('\x1f').map(str::to_owned));
    } else if let Ok(given) = env::var("RUSTFLAGS") {
        flags.extend(given.split_whitespace().map(str::to_owned));
    }
    let mut build = cargo();
    build
        .args(["rustc", "--quiet", "--locked", "--profile", "image"])
        .args(["--package", "quota-server", "--bin", "quota"])
        .arg("--target-dir")
        .arg(directory)
        // Only with a target do the flags not apply to build scripts.
        .args(["--target", host])
        .arg("--config")
        .arg(format!("target.{host}.rustflags = {flags:?}"))
        // These variables would replace the flags.
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTFLAGS");
    if linking == Linking::Static {
        build.args(["--", "-Ctarget-feature=+crt-static"]);
        // Relocations are packed.
        build.arg("-Clink-arg=-Wl,-z,pack-relative-relocs");
        if host.starts_with("x86_64-") {
            // Rust's own linker, which is used on this platform, merges identical functions.
            build.arg("-Clink-arg=-Wl,--icf=all");
        }
    }
    succeed(&mut build)?;
    Ok(directory.join(host).join("image/quota"))
}

/// Records the profile: compiles a server that counts what it runs, and sends check requests to it.
pub(crate) fn record() -> Result<()> {
    machine::install(&[machine::POSTGRES, machine::REDIS])?;
    let rust = Rust::current()?;
    let llvm_profdata = llvm_profdata(&rust)?;
    let directory = target().join("profile/recorded");
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory)?;
    say("building the server and the load for recording (takes about twenty minutes)");
    let flags = [format!("-Cprofile-generate={}", directory.display())];
    // A directory of its own, so that no other task takes this slow server for the optimized one.
    let own = target().join("profile/build");
    let server = compile(&rust, flags.to_vec(), Linking::Dynamic, &own)?;
    let bench = ["--package", "quota-bench", "--bin", "quota-bench"];
    succeed(cargo().args(["build", "--release", "--quiet"]).args(bench))?;
    say("recording");
    succeed(
        Command::new(target().join("release/quota-bench"))
            .arg("run")
            .arg(server)
            .args(["--rounds", "3", "--millis", "400"])
            .env("LLVM_PROFILE_FILE", directory.join("%p.profraw"))
            // The table would show the times of a server that counts what it runs.
            .stdout(Stdio::null()),
    )?;
    let text = directory.join("all.txt");
    merge(&llvm_profdata, &["--text"], &files(&directory)?, &text)?;
    let often = directory.join("often.txt");
    fs::write(&often, often_run(&fs::read_to_string(&text)?)?)?;
    let profile = root().join(PROFILE);
    merge(&llvm_profdata, &[], &[often], &profile)?;
    fs::write(root().join(RECORDED_WITH), rust.names()?)?;
    println!("{}: {} bytes", PROFILE, fs::metadata(profile)?.len());
    Ok(())
}

/// Returns the path of a program that comes with Rust. Installs it if it is missing.
fn llvm_profdata(rust: &Rust) -> Result<PathBuf> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let sysroot = read(
        Command::new(rustc)
            .current_dir(root())
            .args(["--print", "sysroot"]),
    )?;
    let program = Path::new(sysroot.trim())
        .join("lib/rustlib")
        .join(&rust.host)
        .join("bin/llvm-profdata");
    if !program.is_file() {
        say("rustup component add llvm-tools");
        succeed(Command::new("rustup").current_dir(root()).args([
            "component",
            "add",
            "llvm-tools",
        ]))
        .context(
            "recording requires `llvm-profdata`, which is in rustup's component `llvm-tools`",
        )?;
    }
    Ok(program)
}

fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|it| it == "profraw") {
            files.push(path);
        }
    }
    ensure!(!files.is_empty(), "the server has not recorded anything");
    Ok(files)
}

fn merge(llvm_profdata: &Path, options: &[&str], from: &[PathBuf], to: &Path) -> Result<()> {
    succeed(
        Command::new(llvm_profdata)
            .args(["merge", "--sparse"])
            .args(options)
            .arg("--output")
            .arg(to)
            .args(from),
    )
}

/// Returns a profile in LLVM's text format without the functions that rarely ran. The format is a header of lines that
/// begin with `:` or `#`, and an entry for each function; entries end with an empty line. An entry lists the number of
/// its counters, and their values.
fn often_run(profile: &str) -> Result<String> {
    let starts_header = |line: &&str| line.starts_with([':', '#']);
    let header: Vec<&str> = profile.lines().take_while(starts_header).collect();
    let entries = profile.lines().skip(header.len()).collect::<Vec<_>>();
    let mut kept = header.join("\n");
    kept.push('\n');
    for entry in entries.split(|line| line.is_empty()) {
        if entry.is_empty() {
            continue;
        }
        let after = |title: &str| {
            let at = entry.iter().position(|line| *line == title);
            at.map(|at| &entry[at + 1..])
                .with_context(|| format!("an entry of the profile has no line {title:?}"))
        };
        let count = after("# Num Counters:")?.first().unwrap_or(&"");
        let count: usize = count.parse().context("a number of counters is invalid")?;
        let mut most = 0;
        for value in after("# Counter Values:")?.iter().take(count) {
            most = most.max(value.parse::<u64>().context("a counter is invalid")?);
        }
        if most >= RUNS_MIN {
            kept.push_str(&entry.join("\n"));
            kept.push_str("\n\n");
        }
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::often_run;

    const HEADER: &str = "# IR level Instrumentation Flag\n:ir\n";

    fn entry(name: &str, counters: &[u64]) -> String {
        let values: Vec<String> = counters.iter().map(u64::to_string).collect();
        format!(
            "{name}\n# Func Hash:\n90000\n# Num Counters:\n{}\n# Counter Values:\n{}\n",
            counters.len(),
            values.join("\n")
        )
    }

    #[test]
    fn functions_that_rarely_run_are_omitted() {
        let (often, rarely) = (entry("often", &[0, 10_000]), entry("rarely", &[9_999, 7]));
        let kept = often_run(&format!("{HEADER}{rarely}\n{often}\n")).unwrap();
        assert_eq!(kept, format!("{HEADER}{often}\n"));
    }

    #[test]
    fn the_values_after_the_counters_do_not_count() {
        let values = "# Num Value Kinds:\n1\n# ValueKind = IPVK_MemOPSize:\n1\n# NumValueSites:\n1\n1\n8:50000\n";
        let rarely = format!("{}{values}", entry("rarely", &[3]));
        let kept = often_run(&format!("{HEADER}{rarely}\n")).unwrap();
        assert_eq!(kept, HEADER);
    }

    #[test]
    fn an_unknown_format_is_an_error() {
        assert!(often_run(&format!("{HEADER}name\n1\n2\n\n")).is_err());
    }
}
