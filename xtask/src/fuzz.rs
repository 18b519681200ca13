//! `cargo xtask fuzz`: runs the server's fuzz target.

use std::{fs, path::PathBuf, process::Command};

use anyhow::Result;

use crate::{cargo, machine, read, root, say, succeed, target};

const VERSION: &str = "0.13.2";
const TARGET: &str = "plain_request";

/// # Errors
///
/// Fails if the fuzzer finds an input that violates a check in the fuzz target. The input is saved in
/// `server/fuzz/artifacts`.
pub(crate) fn run(seconds: u64) -> Result<()> {
    machine::install(&[machine::CPP])?;
    let program = program()?;
    // New inputs are written to the first corpus. The committed corpus is only read.
    let found = target().join("fuzz-corpus").join(TARGET);
    fs::create_dir_all(&found)?;
    succeed(
        Command::new(program)
            .current_dir(root().join("server"))
            // The instrumentation needs options that a stable compiler accepts only with this variable.
            .env("RUSTC_BOOTSTRAP", "1")
            .args(["fuzz", "run", "--target-dir"])
            .arg(target().join("fuzz"))
            .arg(TARGET)
            .arg(found)
            .arg(format!("fuzz/corpus/{TARGET}"))
            .args(["--", "-dict=fuzz/http.dict", "-print_final_stats=1"])
            .arg(format!("-max_total_time={seconds}")),
    )
}

/// Returns the path of cargo-fuzz, which is installed in the target directory if it is missing or has another version.
fn program() -> Result<PathBuf> {
    let tools = target().join("tools");
    let program = tools.join("bin/cargo-fuzz");
    let version = read(Command::new(&program).args(["fuzz", "--version"]));
    if !version.is_ok_and(|it| it.trim().ends_with(VERSION)) {
        say(&format!("installing cargo-fuzz {VERSION}"));
        succeed(
            cargo()
                .args(["install", "--quiet", "--locked", "--force", "cargo-fuzz"])
                .args(["--version", VERSION, "--root"])
                .arg(tools),
        )?;
    }
    Ok(program)
}
