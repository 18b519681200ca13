//! The desktop app: `cargo xtask desktop` starts it, `cargo xtask bundle` packages it.

use std::{
    collections::BTreeMap,
    env,
    ffi::OsString,
    fs,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, bail};

use crate::{cargo, console, machine, read, root, say, succeed, system, test_server};

/// The address of a server that `cargo xtask run` started.
const RUNNING: &str = "http://localhost:8080";

/// The programs and libraries required to compile the app.
pub(crate) const NEEDS: [machine::Need; 1] = [machine::WEBKIT];

/// The programs and libraries that the desktop app's end-to-end test needs.
pub(crate) const JOURNEY_NEEDS: [machine::Need; 5] = [
    machine::WEBKIT,
    machine::WEBKIT_DRIVER,
    machine::XVFB,
    machine::DBUS,
    machine::KEYRING,
];

/// The crates that use the app's libraries.
const PACKAGES: [&str; 2] = ["quota-desktop", "xtask-desktop"];

/// Returns arguments that select all crates except [`PACKAGES`].
pub(crate) fn without<'a>(all: &'a str, more: &'a str) -> Vec<&'a str> {
    let mut arguments = vec![all];
    arguments.extend(PACKAGES.iter().flat_map(|it| ["--exclude", *it]));
    arguments.push(more);
    arguments.retain(|it| !it.is_empty());
    arguments
}

/// Returns arguments that select only [`PACKAGES`].
pub(crate) fn alone(more: &str) -> Vec<&str> {
    let mut arguments: Vec<&str> = PACKAGES.iter().flat_map(|it| ["--package", *it]).collect();
    arguments.push(more);
    arguments.retain(|it| !it.is_empty());
    arguments
}

pub(crate) fn start(arguments: &[OsString]) -> Result<ExitCode> {
    machine::install(&NEEDS)?;
    console::build_for_desktop()?;
    say("building the desktop app (a first build takes a few minutes)");
    let mut command = cargo();
    command.args(["run", "--quiet", "--package", "quota-desktop", "--"]);
    if arguments.is_empty() {
        let running = env::var_os("QUOTA_PUBLIC_URL").unwrap_or_else(|| RUNNING.into());
        command.arg("--server").arg(running);
    }
    let error = command.args(arguments).exec();
    Err(error).context("cannot run cargo")
}

fn build_release(targets: &[&str]) -> Result<()> {
    say("building the desktop app for release (a first build takes a few minutes)");
    let options = ["--quiet", "--release", "--package", "quota-desktop"];
    succeed(cargo().arg("build").args(options).args(targets))
}

/// The programs required to test the packages.
const PACKAGE_NEEDS: [machine::Need; 2] = [machine::RPM2CPIO, machine::CPIO];

/// Builds the packages. With `debug`, the app is not optimized. With `test`, also installs, starts and removes the
/// `.deb`, and compares its files with those of the `.rpm`.
pub(crate) fn bundle(test: bool, debug: bool) -> Result<()> {
    machine::install(&NEEDS)?;
    if test {
        machine::install(&[&[machine::POSTGRES], &JOURNEY_NEEDS[..], &PACKAGE_NEEDS].concat())?;
    }
    console::build_for_desktop()?;
    let profile = if debug {
        say("building the desktop app (a first build takes a few minutes)");
        succeed(cargo().args(["build", "--quiet", "--package", "quota-desktop"]))?;
        "debug"
    } else {
        build_release(&[])?;
        "release"
    };
    let built = console::target_directory()?;
    let out = built.join("bundle");
    fs::create_dir_all(&out)?;
    // `strip` is installed along with the C compiler.
    let program = out.join("quota-desktop");
    succeed(
        Command::new("strip")
            .arg("--strip-all")
            .arg("-o")
            .arg(&program)
            .arg(built.join(profile).join("quota-desktop")),
    )?;
    let libc = read(Command::new("getconf").arg("GNU_LIBC_VERSION"))?;
    let libc = libc.trim().trim_start_matches("glibc ");
    succeed(
        cargo()
            .args(["run", "--quiet", "--package", "xtask-bundle", "--"])
            .arg(&program)
            .arg(root().join("desktop/shell"))
            .arg(libc)
            .arg(&out),
    )?;
    if test { test_packages(&out) } else { Ok(()) }
}

/// The package's name and the path of its program.
const PACKAGE: &str = "quota-desktop";
const PROGRAM: &str = "usr/bin/quota-desktop";

/// Returns the newest file with the given extension.
fn newest(folder: &Path, extension: &str) -> Result<PathBuf> {
    let files = fs::read_dir(folder)?.filter_map(Result::ok);
    files
        .map(|it| it.path())
        .filter(|path| path.extension().is_some_and(|it| it == extension))
        .max_by_key(|path| path.metadata().and_then(|it| it.modified()).ok())
        .with_context(|| format!("no .{extension} in {}", folder.display()))
}

/// Tests both packages. `dpkg` installs the `.deb`. The installed app starts, creates an account, and quits. Then
/// `dpkg` removes the package. The `.rpm` must contain the same files.
fn test_packages(out: &Path) -> Result<()> {
    let (deb, rpm) = (newest(out, "deb")?, newest(out, "rpm")?);
    let unpacked = out.join("unpacked");
    let _ = fs::remove_dir_all(&unpacked);
    let (from_deb, from_rpm) = (unpacked.join("deb"), unpacked.join("rpm"));
    fs::create_dir_all(&from_rpm)?;
    succeed(
        Command::new("dpkg-deb")
            .arg("--extract")
            .args([&deb, &from_deb]),
    )?;
    succeed(
        Command::new("sh")
            .current_dir(&from_rpm)
            .args([
                "-c",
                "rpm2cpio \"$1\" | cpio --extract --make-directories --quiet",
                "sh",
            ])
            .arg(&rpm),
    )?;
    succeed(
        Command::new("diff")
            .arg("--recursive")
            .args([&from_deb, &from_rpm]),
    )?;
    let (files, files_of_rpm) = (permissions(&from_deb)?, permissions(&from_rpm)?);
    if files != files_of_rpm {
        bail!("the packages have different permissions: {files:?}, {files_of_rpm:?}");
    }
    say(&format!(
        "the .rpm contains the same {} files as the .deb",
        files.len()
    ));

    succeed(cargo().args(["build", "--quiet", "--package", "xtask-desktop"]))?;
    succeed(as_root(&["dpkg", "--install"]).arg(&deb))?;
    let program = Path::new("/").join(PROGRAM);
    let started = test_server::on_server(|server| {
        let tester = console::target_directory()?.join("debug/xtask-desktop");
        succeed(Command::new(tester).arg("start").arg(&program).arg(server))
    });
    // The package is removed even if the app did not start.
    let removed = succeed(as_root(&["dpkg", "--purge"]).arg(PACKAGE));
    started?;
    removed?;
    for (file, _) in files {
        if Path::new("/").join(&file).exists() {
            bail!("/{file} is left after removing the package");
        }
    }
    say("the .deb was installed, started and removed");
    Ok(())
}

/// Returns the path and the permissions of each file in a folder.
fn permissions(folder: &Path) -> Result<BTreeMap<String, String>> {
    let list = read(
        Command::new("find")
            .arg(folder)
            .args(["-type", "f", "-printf", "%m %P\\n"]),
    )?;
    let files = list.lines().filter_map(|line| line.split_once(' '));
    Ok(files
        .map(|(mode, path)| (path.into(), mode.into()))
        .collect())
}

fn as_root(words: &[&str]) -> Command {
    let (program, arguments) = if system::is_root() {
        (words[0], &words[1..])
    } else {
        ("sudo", words)
    };
    let mut command = Command::new(program);
    command.args(arguments);
    command
}

/// Runs the app's end-to-end test against a running server. Returns `false` if the test failed. The test itself reports
/// the reason.
pub(crate) fn journey(server: &str) -> Result<bool> {
    console::build_for_desktop()?;
    say("building the desktop app (a first build takes a few minutes)");
    succeed(cargo().args(["build", "--quiet"]).args(alone("--bins")))?;
    say("running the end-to-end tests in the desktop app");
    let built = console::target_directory()?.join("debug");
    let status = Command::new(built.join("xtask-desktop"))
        .arg("journey")
        .arg(built.join("quota-desktop"))
        .arg(server)
        .args(env::var_os("QUOTA_SCREENSHOTS"))
        .status()
        .context("cannot run the journey")?;
    Ok(status.success())
}

/// Measures the memory and startup time of the app, compared with those of an empty window.
pub(crate) fn bench(server: &str, arguments: &[OsString]) -> Result<ExitCode> {
    console::build_for_desktop()?;
    build_release(&["--bin", "quota-desktop", "--example", "blank"])?;
    succeed(cargo().args(["build", "--quiet", "--package", "xtask-desktop"]))?;
    let built = console::target_directory()?;
    let status = Command::new(built.join("debug/xtask-desktop"))
        .arg("bench")
        .arg(built.join("release/quota-desktop"))
        .arg(built.join("release/examples/blank"))
        .arg(server)
        .args(arguments)
        .status()
        .context("cannot run the measurement")?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}
