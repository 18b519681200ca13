//! The generated files in the repository. `cargo xtask generate` writes all of them, and `cargo xtask check` fails if
//! one is out of date.

use std::{fs, process::Stdio};

use anyhow::{Context as _, Result, bail};

use crate::{cargo, machine, root, say, schema};

struct Generated {
    path: &'static str,
    generate: fn() -> Result<String>,
}

/// The order matters: the server generates the other files, and is compiled with `schema.rs`.
const GENERATED: &[Generated] = &[
    Generated {
        path: "server/src/schema.rs",
        generate: schema::generate,
    },
    Generated {
        path: "openapi.json",
        generate: || printed_by_server("openapi"),
    },
    Generated {
        path: ".env.example",
        generate: || printed_by_server("env-example"),
    },
];

/// Returns the output of a subcommand of the server.
fn printed_by_server(command: &str) -> Result<String> {
    let output = cargo()
        .args(["run", "--quiet", "--package", "quota-server", "--", command])
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        bail!("`quota {command}` failed: {}", output.status);
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Writes the generated files that are out of date.
pub(crate) fn write() -> Result<()> {
    machine::install(&[machine::POSTGRES])?;
    for file in GENERATED {
        let content =
            (file.generate)().with_context(|| format!("cannot generate {}", file.path))?;
        let path = root().join(file.path);
        if fs::read_to_string(&path).is_ok_and(|committed| committed == content) {
            say(&format!("{} is up to date", file.path));
            continue;
        }
        fs::write(path, content).with_context(|| format!("cannot write {}", file.path))?;
        say(&format!("wrote {}", file.path));
    }
    Ok(())
}

/// # Errors
///
/// Fails on the first file that is out of date.
pub(crate) fn check() -> Result<()> {
    for file in GENERATED {
        say(&format!("checking whether {} is up to date", file.path));
        let expected =
            (file.generate)().with_context(|| format!("cannot generate {}", file.path))?;
        let committed = fs::read_to_string(root().join(file.path))
            .with_context(|| format!("cannot read {}", file.path))?;
        if let Some(difference) = first_difference(&committed, &expected) {
            bail!(
                "{} is out of date; run `cargo xtask generate`\n{difference}",
                file.path
            );
        }
    }
    Ok(())
}

/// Describes the first line where two files differ. Returns `None` if they are equal.
fn first_difference(committed: &str, expected: &str) -> Option<String> {
    if committed == expected {
        return None;
    }
    let same = committed
        .lines()
        .zip(expected.lines())
        .take_while(|(a, b)| a == b)
        .count();
    let line = |text: &str| text.lines().nth(same).unwrap_or("(end of file)").to_owned();
    Some(format!(
        "line {}\n  committed: {}\n  expected:  {}",
        same + 1,
        line(committed),
        line(expected)
    ))
}

#[cfg(test)]
mod tests {
    use super::first_difference;

    #[test]
    fn first_differing_line_is_shown() {
        assert_eq!(first_difference("a\nb\n", "a\nb\n"), None);
        let difference = first_difference("a\nb\n", "a\nc\n").expect("a difference");
        assert!(difference.starts_with("line 2"), "{difference}");
        let difference = first_difference("a\nb\n", "a\n").expect("a difference");
        assert!(
            difference.contains("expected:  (end of file)"),
            "{difference}"
        );
        assert!(first_difference("a", "a\n").is_some());
    }
}
