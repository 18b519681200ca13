//! `cargo xtask check`: formatting, lints, lock files, security advisories, documentation, unused dependencies, links,
//! generated files and instruction counts.

use anyhow::Result;

use crate::{
    advisories, cargo, console, dependencies, desktop, generate, instructions, links, lock,
    machine, say, succeed,
};

pub(crate) fn check() -> Result<()> {
    machine::install(&[&instructions::NEEDS[..], &desktop::NEEDS].concat())?;
    say("cargo fmt --check");
    succeed(cargo().args(["fmt", "--all", "--check"]))?;
    lock::check()?;
    advisories::check()?;
    dependencies::check()?;
    links::check()?;
    say("cargo clippy");
    // The desktop app is compiled separately, because its libraries enable features of dependencies that the server
    // also uses. If both were compiled together, these dependencies would be compiled again when the server is built.
    clippy(&desktop::without("--workspace", "--all-targets"))?;
    say("cargo clippy, desktop app");
    clippy(&desktop::alone("--all-targets"))?;
    say("cargo clippy, console");
    console::add_target()?;
    let console = ["--package", "quota-ui", "--target", console::TARGET];
    clippy(&console)?;
    clippy(&[&console[..], &["--features", "desktop"]].concat())?;
    say("cargo doc");
    documentation(
        &[
            &desktop::without("--workspace", "")[..],
            &["--exclude", "quota-ui"],
        ]
        .concat(),
    )?;
    documentation(&console)?;
    generate::check()?;
    instructions::check()?;
    say("all checks passed");
    Ok(())
}

fn clippy(packages: &[&str]) -> Result<()> {
    let lints = ["--", "-D", "warnings"];
    succeed(
        cargo()
            .args(["clippy", "--quiet"])
            .args(packages)
            .args(lints),
    )
}

/// Builds the documentation. Broken links in doc comments are errors.
fn documentation(packages: &[&str]) -> Result<()> {
    succeed(
        cargo()
            .env("RUSTDOCFLAGS", "-D rustdoc::broken_intra_doc_links")
            .args(["doc", "--quiet", "--no-deps", "--document-private-items"])
            .args(packages),
    )
}
