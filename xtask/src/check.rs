//! `cargo xtask check`: formatting, lints, and whether what is generated is what is committed.

use std::{fs, process::Stdio};

use anyhow::{Context as _, Result, bail};

use crate::{advisories, cargo, console, desktop, machine, root, say, schema, succeed};

/// A committed file that a program makes, and the command that makes it anew.
struct Generated {
    path: &'static str,
    generate: fn() -> Result<String>,
    refresh: &'static str,
}

const GENERATED: &[Generated] = &[
    Generated {
        path: schema::PATH,
        generate: schema::generate,
        refresh: "cargo xtask schema",
    },
    Generated {
        path: "openapi.json",
        generate: || printed("openapi"),
        refresh: "cargo run -p quota-server -- openapi > openapi.json",
    },
    Generated {
        path: ".env.example",
        generate: || printed("env-example"),
        refresh: "cargo run -p quota-server -- env-example > .env.example",
    },
];

/// What a command of the server's prints.
fn printed(command: &str) -> Result<String> {
    let output = cargo()
        .args(["run", "--quiet", "--package", "quota-server", "--", command])
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        bail!("`quota {command}` failed: {}", output.status);
    }
    Ok(String::from_utf8(output.stdout)?)
}

pub(crate) fn check() -> Result<()> {
    machine::install(&[&[machine::POSTGRES], &desktop::NEEDS[..]].concat())?;
    say("cargo fmt --check");
    succeed(cargo().args(["fmt", "--all", "--check"]))?;
    advisories::check()?;
    say("cargo clippy");
    // The desktop app apart: what its libraries want of shared ones would have those compiled anew for the server.
    clippy(&desktop::without("--workspace", "--all-targets"))?;
    say("cargo clippy, of the desktop app");
    clippy(&desktop::alone("--all-targets"))?;
    say("cargo clippy, of the console");
    console::add_target()?;
    let console = ["--package", "quota-ui", "--target", console::TARGET];
    clippy(&console)?;
    clippy(&[&console[..], &["--features", "desktop"]].concat())?;
    for generated in GENERATED {
        say(&format!("is {} fresh?", generated.path));
        let fresh =
            (generated.generate)().with_context(|| format!("cannot make {}", generated.path))?;
        let committed = fs::read_to_string(root().join(generated.path))
            .with_context(|| format!("cannot read {}", generated.path))?;
        if let Some(difference) = first_difference(&committed, &fresh) {
            bail!(
                "{} is stale; `{}` writes it\n{difference}",
                generated.path,
                generated.refresh
            );
        }
    }
    say("all checks passed");
    Ok(())
}

fn clippy(what: &[&str]) -> Result<()> {
    let lints = ["--", "-D", "warnings"];
    succeed(cargo().args(["clippy", "--quiet"]).args(what).args(lints))
}

/// The first line in which two texts differ.
fn first_difference(committed: &str, fresh: &str) -> Option<String> {
    if committed == fresh {
        return None;
    }
    let same = committed
        .lines()
        .zip(fresh.lines())
        .take_while(|(a, b)| a == b)
        .count();
    let line = |text: &str| text.lines().nth(same).unwrap_or("(the end)").to_owned();
    Some(format!(
        "line {}\n  committed: {}\n  fresh:     {}",
        same + 1,
        line(committed),
        line(fresh)
    ))
}

#[cfg(test)]
mod tests {
    use super::first_difference;

    #[test]
    fn the_first_differing_line_is_shown() {
        assert_eq!(first_difference("a\nb\n", "a\nb\n"), None);
        let difference = first_difference("a\nb\n", "a\nc\n").expect("they differ");
        assert!(difference.starts_with("line 2"), "{difference}");
        let difference = first_difference("a\nb\n", "a\n").expect("they differ");
        assert!(difference.contains("fresh:     (the end)"), "{difference}");
        assert!(first_difference("a", "a\n").is_some());
    }
}
