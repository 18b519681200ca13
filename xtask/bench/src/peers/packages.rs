//! The packages of the peers from npm and PyPI, in the versions listed in `xtask/bench/peers`. The packages are
//! installed once, into the target directory.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

/// Returns the directory with the programs and configurations of the peers.
pub(crate) fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("peers")
}

/// Installs Fastify and its packages, and returns the directory of the program.
pub(crate) fn fastify(tools: &Path) -> Result<PathBuf> {
    let files = ["package.json", "package-lock.json", "server.js"];
    installed(tools, "fastify", &files, |dir| {
        let arguments = ["ci", "--no-audit", "--no-fund", "--loglevel=error"];
        run(Command::new("npm").current_dir(dir).args(arguments))
    })
}

/// Installs FastAPI and its packages, and returns the directory of the program. The packages are in the `packages`
/// subdirectory.
pub(crate) fn fastapi(tools: &Path) -> Result<PathBuf> {
    installed(
        tools,
        "fastapi",
        &["requirements.txt", "server.py"],
        |dir| {
            run(Command::new("python3")
                .current_dir(dir)
                .args(["-m", "pip", "install", "--quiet", "--target", "packages"])
                .args(["--requirement", "requirements.txt"]))
        },
    )
}

/// Returns a directory with copies of a peer's files and its installed packages. Later runs reuse the directory unless
/// one of the files has changed.
fn installed(
    tools: &Path,
    name: &str,
    files: &[&str],
    install: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let dir = tools.join("peers").join(name);
    let stamp = dir.with_extension("stamp");
    let mut wanted = String::new();
    for file in files {
        let path = folder().join(name).join(file);
        wanted += &fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?;
    }
    if fs::read_to_string(&stamp).is_ok_and(|found| found == wanted) {
        return Ok(dir);
    }
    eprintln!("installing the packages of {name}");
    if dir.exists() {
        fs::remove_dir_all(&dir)?;
    }
    fs::create_dir_all(&dir)?;
    for file in files {
        fs::copy(folder().join(name).join(file), dir.join(file))?;
    }
    install(&dir).with_context(|| format!("cannot install the packages of {name}"))?;
    fs::write(&stamp, wanted)?;
    Ok(dir)
}

fn run(command: &mut Command) -> Result<()> {
    let output = command
        .output()
        .with_context(|| format!("cannot run {command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}
