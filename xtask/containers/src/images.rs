//! The images that the Compose files and the Dockerfile use.
//!
//! The images are pulled if a registry can be reached. Otherwise, stand-ins with the same names are built from Debian
//! packages, a Caddy from PyPI, and this machine's Rust toolchain. The stand-ins behave as the Compose files expect,
//! but are not the real images. They must not be distributed, because they trust this machine's certificate
//! authorities.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use crate::engine::{Engine, read, succeed};

/// How long a pull may take.
const PULL: Duration = Duration::from_secs(60);

/// Makes sure that all images exist. With `compiled`, they include the image in which the server is compiled.
pub fn provide(engine: &Engine, folder: &Path, compiled: bool) -> Result<()> {
    debian(engine, folder, "bookworm")?;
    if !present(engine, "postgres:17")? || !present(engine, "redis:8")? {
        debian(engine, folder, "trixie")?;
        stand_in(engine, "postgres:17", &stand_ins().join("postgres"))?;
        stand_in(engine, "redis:8", &stand_ins().join("redis"))?;
    }
    if !present(engine, "caddy:2.11")? {
        let context = tempfile::tempdir()?;
        copy_folder(&stand_ins().join("caddy"), context.path())?;
        quota_testkit::caddy::download(&context.path().join("caddy"))?;
        stand_in(engine, "caddy:2.11", context.path())?;
    }
    if compiled && !present(engine, "rust:1.95-bookworm")? {
        rust(engine, folder)?;
    }
    Ok(())
}

fn stand_ins() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("stand-ins")
}

/// Returns whether an image exists or can be pulled.
fn present(engine: &Engine, name: &str) -> Result<bool> {
    if engine.has_image(name) {
        return Ok(true);
    }
    let mut pull = engine
        .docker(&["pull", "--quiet", name])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let began = Instant::now();
    let pulled = loop {
        if let Some(status) = pull.try_wait()? {
            break status.success();
        }
        if began.elapsed() > PULL {
            pull.kill()?;
            pull.wait()?;
            break false;
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    println!(
        "{name}: {}",
        if pulled {
            "pulled"
        } else {
            "not available from a registry; building a stand-in"
        }
    );
    Ok(pulled)
}

fn stand_in(engine: &Engine, name: &str, context: &Path) -> Result<()> {
    if engine.has_image(name) {
        return Ok(());
    }
    succeed(
        engine
            .docker(&["build", "--quiet", "--network", "host", "--tag", name])
            .arg(context),
    )
}

/// Builds `debian:<suite>-slim` from this machine's package sources, unless the image exists or can be pulled.
fn debian(engine: &Engine, folder: &Path, suite: &str) -> Result<()> {
    let name = format!("debian:{suite}-slim");
    if present(engine, &name)? {
        return Ok(());
    }
    let mirror = read(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(SITE)",
        "Created-By: Packages",
    ]))?;
    let mirror = mirror
        .lines()
        .find(|line| line.ends_with("/debian") || line.ends_with("/debian/"))
        .context("no Debian package source is configured")?;
    let root = folder.join(format!("root-{suite}"));
    let _ = fs::remove_dir_all(&root);
    let script = Path::new("/usr/share/debootstrap/scripts").join(suite);
    ensure!(script.exists(), "debootstrap does not know {suite}");
    succeed(
        Command::new("debootstrap")
            .args(["--variant=minbase", "--include=ca-certificates"])
            .arg(suite)
            .arg(&root)
            .arg(mirror),
    )?;
    let inside = |path: &str| root.join(path);
    fs::copy(
        "/etc/ssl/certs/ca-certificates.crt",
        inside("etc/ssl/certs/ca-certificates.crt"),
    )?;
    for file in apt_settings()? {
        let to =
            inside("etc/apt/apt.conf.d").join(file.file_name().context("the file has no name")?);
        fs::copy(&file, to)?;
    }
    fs::write(
        inside("etc/apt/sources.list"),
        format!("deb {mirror} {suite} main\n"),
    )?;
    // Prevents services from starting when a package is installed.
    fs::write(inside("usr/sbin/policy-rc.d"), "#!/bin/sh\nexit 101\n")?;
    succeed(
        Command::new("chmod")
            .arg("755")
            .arg(inside("usr/sbin/policy-rc.d")),
    )?;
    for folder in [
        "var/cache/apt",
        "var/lib/apt/lists",
        "usr/share/doc",
        "usr/share/man",
        "usr/share/locale",
    ] {
        let _ = fs::remove_dir_all(inside(folder));
    }
    import(engine, &root, &name)?;
    fs::remove_dir_all(&root)?;
    Ok(())
}

/// Returns the files with the settings that this machine needs to reach its package sources, such as a proxy.
fn apt_settings() -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir("/etc/apt/apt.conf.d")? {
        let path = entry?.path();
        if fs::read_to_string(&path).is_ok_and(|text| text.contains("Acquire::")) {
            files.push(path);
        }
    }
    Ok(files)
}

fn import(engine: &Engine, root: &Path, name: &str) -> Result<()> {
    let mut tar = Command::new("tar")
        .arg("-C")
        .arg(root)
        .args(["--numeric-owner", "-c", "."])
        .stdout(Stdio::piped())
        .spawn()?;
    let files = tar
        .stdout
        .take()
        .context("the output of tar is not piped")?;
    let imported = engine
        .docker(&["import", "-", name])
        .stdin(files)
        .stdout(Stdio::null())
        .status()?;
    ensure!(
        tar.wait()?.success() && imported.success(),
        "cannot import {name}"
    );
    Ok(())
}

/// Builds a stand-in for `rust:1.95-bookworm` from this machine's toolchain.
fn rust(engine: &Engine, folder: &Path) -> Result<()> {
    let root = folder.join("rust");
    let _ = fs::remove_dir_all(&root);
    // Add the console's target now. Inside the image, adding the target would require a network.
    succeed(Command::new("rustup").args(["target", "add", "wasm32-unknown-unknown"]))?;
    let sysroot = read(Command::new("rustc").args(["--print", "sysroot"]))?;
    let sysroot = Path::new(sysroot.trim());
    let toolchain = "1.95.0-x86_64-unknown-linux-gnu";
    let toolchains = root.join("rustup/toolchains");
    fs::create_dir_all(&toolchains)?;
    succeed(
        Command::new("cp")
            .args(["-a", "--no-target-directory"])
            .arg(sysroot)
            .arg(toolchains.join(toolchain)),
    )?;
    let _ = fs::remove_dir_all(toolchains.join(toolchain).join("share/doc"));
    fs::write(
        root.join("rustup/settings.toml"),
        format!(
            "default_toolchain = \"{toolchain}\"\nprofile = \"minimal\"\nversion = \"12\"\n\n[overrides]\n"
        ),
    )?;
    let binaries = root.join("cargo/bin");
    fs::create_dir_all(&binaries)?;
    let rustup = read(Command::new("sh").args(["-c", "command -v rustup"]))?;
    fs::copy(rustup.trim(), binaries.join("rustup"))?;
    for proxy in ["cargo", "rustc", "rustdoc"] {
        std::os::unix::fs::symlink("rustup", binaries.join(proxy))?;
    }
    // Copy the configuration of cargo, which may contain the registry from which this machine downloads crates.
    let home = std::env::var_os("CARGO_HOME").map_or_else(
        || Path::new(&std::env::var_os("HOME").unwrap_or_default()).join(".cargo"),
        PathBuf::from,
    );
    if home.join("config.toml").exists() {
        fs::copy(home.join("config.toml"), root.join("cargo/config.toml"))?;
    }
    fs::write(
        root.join("Dockerfile"),
        "FROM debian:bookworm-slim\n\
         ENV RUSTUP_HOME=/usr/local/rustup CARGO_HOME=/usr/local/cargo \
         PATH=/usr/local/cargo/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n\
         RUN apt-get update && apt-get install -y --no-install-recommends \
         gcc g++ make libc6-dev pkg-config git && rm -rf /var/lib/apt/lists/*\n\
         COPY rustup /usr/local/rustup\nCOPY cargo /usr/local/cargo\n",
    )?;
    stand_in(engine, "rust:1.95-bookworm", &root)?;
    fs::remove_dir_all(&root)?;
    Ok(())
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        fs::copy(
            &path,
            to.join(path.file_name().context("the file has no name")?),
        )?;
    }
    Ok(())
}
