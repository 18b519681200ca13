//! `cargo xtask test`: sets up what the tests need, runs them, and stops what it started.

use std::{
    env,
    ffi::OsString,
    io::{BufRead as _, BufReader, IsTerminal as _, Write as _, stderr, stdout},
    process::{Command, ExitCode, ExitStatus, Stdio},
};

use anyhow::{Context as _, Result};

use crate::{cargo, console, desktop, journey, machine, postgres::Throwaway, say};

pub(crate) fn test(arguments: &[OsString]) -> Result<ExitCode> {
    // With a filter, only the selected tests run.
    let with_journey = arguments.is_empty();
    let mut needs = vec![
        machine::POSTGRES,
        machine::REDIS,
        machine::CADDY,
        machine::RECENT_CADDY,
        machine::NGINX,
        machine::HAPROXY,
        machine::OPENSSL,
        machine::FAKETIME,
        machine::PIP,
        machine::NODE,
        machine::NPM,
        machine::ENVOY_AND_TRAEFIK,
    ];
    if with_journey {
        needs.extend(journey::needs());
    }
    machine::install(&needs)?;
    let untested = machine::install(&[machine::PROMTOOL]).err();
    console::build()?;
    let postgres = Throwaway::start()?;
    let has_nextest = cargo()
        .args(["nextest", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    let mut command = cargo();
    command.env("QUOTA_TEST_POSTGRES", postgres.url());
    let (status, summary) = if has_nextest {
        command.args(["nextest", "run"]);
        command.args(desktop::without("--workspace", ""));
        if env::var_os("CI").is_some_and(|ci| !ci.is_empty()) {
            command.args(["--profile", "ci"]);
        }
        command.args(arguments);
        with_nextest(command)?
    } else {
        say("cargo-nextest is not installed: using `cargo test`");
        command.arg("test");
        command
            .args(desktop::without("--workspace", ""))
            .args(arguments);
        with_cargo_test(command)?
    };
    drop(postgres);
    let went_well = !with_journey || (of_desktop(has_nextest)? & journey::run()?);
    if let Some(error) = untested {
        say(&format!(
            "skipped: the alert rules were not tested with promtool: {error:#}"
        ));
    }
    if let Some(summary) = summary {
        println!("{summary}");
    }
    if !went_well {
        return Ok(ExitCode::FAILURE);
    }
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Runs the desktop app's tests. They run separately, because the app's libraries enable features of dependencies that
/// the server also uses. If both were compiled together, these dependencies would be compiled again when the server is
/// built.
fn of_desktop(has_nextest: bool) -> Result<bool> {
    let runner: &[&str] = if has_nextest {
        &["nextest", "run"]
    } else {
        &["test"]
    };
    let status = cargo().args(runner).args(desktop::alone("")).status();
    Ok(status.context("cannot run cargo")?.success())
}

/// Runs nextest. Returns its exit status, and the counts in the last summary line that it prints on standard error,
/// such as `Summary [   1.234s] 12 tests run: 12 passed, 1 skipped`.
fn with_nextest(mut command: Command) -> Result<(ExitStatus, Option<String>)> {
    if stderr().is_terminal() {
        command.env("CARGO_TERM_COLOR", "always");
    }
    let mut runner = command
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let mut summary = None;
    let lines = BufReader::new(runner.stderr.take().context("no pipe")?);
    for line in lines.split(b'\n') {
        let line = line?;
        stderr().write_all(&line)?;
        stderr().write_all(b"\n")?;
        let text = without_colors(&String::from_utf8_lossy(&line));
        if let Some((_, counts)) = text
            .trim_start()
            .strip_prefix("Summary [")
            .and_then(|rest| rest.split_once("] "))
        {
            summary = Some(counts.trim().to_owned());
        }
    }
    Ok((runner.wait()?, summary))
}

/// Runs `cargo test`. Returns its exit status, and the total counts. For each test binary, `cargo test` prints a line
/// on standard output, such as `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
fn with_cargo_test(mut command: Command) -> Result<(ExitStatus, Option<String>)> {
    if stdout().is_terminal() {
        command.env("CARGO_TERM_COLOR", "always");
    }
    let mut runner = command
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let (mut passed, mut failed, mut seen) = (0, 0, false);
    let lines = BufReader::new(runner.stdout.take().context("no pipe")?);
    for line in lines.split(b'\n') {
        let line = line?;
        stdout().write_all(&line)?;
        stdout().write_all(b"\n")?;
        let text = without_colors(&String::from_utf8_lossy(&line));
        if let Some(counts) = text.strip_prefix("test result: ") {
            seen = true;
            passed += count(counts, "passed");
            failed += count(counts, "failed");
        }
    }
    let summary = seen.then(|| format!("{passed} passed, {failed} failed"));
    Ok((runner.wait()?, summary))
}

/// Returns the number that precedes `word` in the text.
fn count(text: &str, word: &str) -> u64 {
    let words: Vec<&str> = text
        .split([' ', ';'])
        .filter(|word| !word.is_empty())
        .collect();
    words
        .windows(2)
        .find(|pair| pair[1] == word)
        .and_then(|pair| pair[0].parse().ok())
        .unwrap_or(0)
}

/// Returns the text without ANSI color sequences (`ESC [ … m`).
fn without_colors(text: &str) -> String {
    let mut parts = text.split("\x1b[");
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        plain.push_str(part.split_once('m').map_or(part, |(_, rest)| rest));
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::{count, without_colors};

    #[test]
    fn counts_are_read_from_a_result_line() {
        let line =
            "FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.02s";
        assert_eq!((count(line, "passed"), count(line, "failed")), (12, 3));
        assert_eq!(count(line, "skipped"), 0);
    }

    #[test]
    fn colors_are_removed() {
        let line = "\x1b[32;1m     Summary\x1b[0m [   0.1s] \x1b[1m2\x1b[0m tests run";
        assert_eq!(without_colors(line), "     Summary [   0.1s] 2 tests run");
    }
}
