//! Builds the console, either for the browser (`cargo xtask console`) or for the desktop app. The next build of the
//! server or of the app embeds the console.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{cargo, read, root, say, succeed, system};

pub(crate) const TARGET: &str = "wasm32-unknown-unknown";

pub(crate) fn build() -> Result<()> {
    say("building the console (a first build takes a few minutes)");
    compile(&[], &root().join("desktop/ui/dist"), &[])
}

/// Builds the console for the next build of the desktop app.
pub(crate) fn build_for_desktop() -> Result<()> {
    say("building the console for the desktop app (a first build takes a few minutes)");
    let features = ["--features", "desktop"];
    compile(&features, &root().join("desktop/shell/dist"), &["desktop"])
}

fn compile(features: &[&str], out: &Path, shape: &[&str]) -> Result<()> {
    add_target()?;
    let options = ["--profile", "console", "--target", TARGET];
    succeed(
        cargo()
            .args(["rustc", "--quiet", "--package", "quota-ui"])
            .args(options)
            .args(features)
            // Splitting the module requires relocations.
            .args(["--", "-Clink-arg=--emit-relocs"]),
    )?;
    let wasm = target_directory()?
        .join(TARGET)
        .join("console/quota-ui.wasm");
    succeed(
        cargo()
            .args(["run", "--quiet", "--package", "xtask-console", "--"])
            .arg(wasm)
            .arg(root().join("desktop/ui"))
            .arg(out)
            .args(shape),
    )
}

/// Adds Rust's standard library for WebAssembly if it is missing. Fails if it is missing and Rust was installed without
/// rustup.
pub(crate) fn add_target() -> Result<()> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let library = read(Command::new(rustc).current_dir(root()).args([
        "--print",
        "target-libdir",
        "--target",
        TARGET,
    ]))?;
    if PathBuf::from(library.trim()).is_dir() {
        return Ok(());
    }
    if system::on_path("rustup").is_none() {
        bail!(
            "the console is compiled for {TARGET}, but this Rust has no library for it and was installed without rustup: install that library with your system's packages (Debian: libstd-rust-dev-wasm32), or Rust from \
             https://rustup.rs"
        );
    }
    say(&format!("rustup target add {TARGET}"));
    succeed(
        Command::new("rustup")
            .current_dir(root())
            .args(["target", "add", TARGET]),
    )
    .with_context(|| {
        format!("the console is compiled for {TARGET}; run `rustup target add {TARGET}` when the network is available")
    })
}

/// Returns cargo's target directory: `target`, unless configured otherwise.
pub(crate) fn target_directory() -> Result<PathBuf> {
    let metadata = read(cargo().args(["metadata", "--no-deps", "--format-version=1"]))?;
    // A JSON parser for a single field would make this crate slower to compile.
    let place = metadata
        .split_once("\"target_directory\":\"")
        .and_then(|(_, rest)| rest.split_once('"'))
        .map(|(place, _)| place)
        .context("cargo metadata names no target directory")?;
    Ok(PathBuf::from(place))
}
