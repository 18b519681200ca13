//! Packages the compiled desktop app as `.deb` and `.rpm`, without Debian or RPM tools and without the network.
//!
//! Called by `cargo xtask bundle` with the compiled program, the folder of the desktop app's sources, the version of
//! the C library that the program is linked with, and the output folder.

mod deb;
mod rpm;

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

const NAME: &str = "quota-desktop";
const SUMMARY: &str = "Quota console as a desktop app";
const DESCRIPTION: &str = "Manage the plans, API keys, rate limits and quotas of a Quota server. Sessions are stored in the system keychain.";
const HOMEPAGE: &str = env!("CARGO_PKG_REPOSITORY");
const VERSION: &str = env!("CARGO_PKG_VERSION");
const LICENSE: &str = env!("CARGO_PKG_LICENSE");

const ENTRY: &str = "[Desktop Entry]
Type=Application
Name=Quota
Comment=API keys, plans, rate limits and quotas
Exec=quota-desktop
Icon=quota-desktop
Terminal=false
Categories=Development;Network;
StartupWMClass=quota-desktop
";

/// A file in the package.
struct File {
    /// The file's path on the system, without the leading slash.
    path: String,
    bytes: Vec<u8>,
    mode: u32,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [program, source, libc, out] = &arguments[..] else {
        bail!("usage: xtask-bundle PROGRAM SOURCE LIBC-VERSION OUT");
    };
    let files = files(Path::new(program), Path::new(source))?;
    let out = PathBuf::from(out);
    fs::create_dir_all(&out)?;
    for package in [
        deb::pack(&files, libc, &out)?,
        rpm::pack(&files, libc, &out)?,
    ] {
        println!("{}", package.display());
    }
    Ok(())
}

fn files(program: &Path, source: &Path) -> Result<Vec<File>> {
    let read =
        |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let file = |path: String, bytes: Vec<u8>| File {
        path,
        bytes,
        mode: 0o644,
    };
    let mut files = vec![
        File {
            mode: 0o755,
            ..file(format!("usr/bin/{NAME}"), read(program)?)
        },
        file(
            format!("usr/share/applications/{NAME}.desktop"),
            ENTRY.into(),
        ),
        file(
            format!("usr/share/doc/{NAME}/copyright"),
            copyright(source, read)?,
        ),
    ];
    let icons = [
        ("32x32", "icons/32x32.png"),
        ("128x128", "icons/128x128.png"),
        ("256x256", "icons/128x128@2x.png"),
        ("512x512", "icons/icon.png"),
        ("scalable", "../ui/icon.svg"),
    ];
    for (size, icon) in icons {
        let extension = icon.rsplit('.').next().unwrap_or_default();
        let path = format!("usr/share/icons/hicolor/{size}/apps/{NAME}.{extension}");
        files.push(file(path, read(&source.join(icon))?));
    }
    Ok(files)
}

/// Returns the full text of both licenses, as the licenses require.
fn copyright(source: &Path, read: impl Fn(&Path) -> Result<Vec<u8>>) -> Result<Vec<u8>> {
    let root = source.join("../..");
    let mut text = format!("{HOMEPAGE}\n\nLicense: {LICENSE}\n\n").into_bytes();
    for license in ["LICENSE-APACHE", "LICENSE-MIT"] {
        text.extend(read(&root.join(license))?);
        text.push(b'\n');
    }
    Ok(text)
}

/// Returns the names that Debian and RPM use for the machine's architecture.
fn architecture() -> Result<(&'static str, &'static str)> {
    Ok(match env::consts::ARCH {
        "x86_64" => ("amd64", "x86_64"),
        "aarch64" => ("arm64", "aarch64"),
        other => bail!("unsupported architecture: {other}"),
    })
}

#[cfg(test)]
mod tests {
    use std::{io::Read as _, os::unix::fs::PermissionsExt as _};

    use super::*;

    #[test]
    fn both_packages_contain_every_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let program = folder.path().join("program");
        fs::write(&program, b"#!/bin/sh\n").expect("written");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).expect("set");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../desktop/shell");
        let files = files(&program, &source).expect("files");

        let deb = deb::pack(&files, "2.36", folder.path()).expect("a package");
        let mut archive = ar::Archive::new(fs::File::open(deb).expect("a package"));
        let mut members = Vec::new();
        while let Some(entry) = archive.next_entry() {
            let mut entry = entry.expect("an entry");
            let name = String::from_utf8_lossy(entry.header().identifier()).into_owned();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).expect("the entry's bytes");
            members.push((name, bytes));
        }
        let names: Vec<&str> = members.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["debian-binary", "control.tar.gz", "data.tar.gz"]);
        assert_eq!(members[0].1, b"2.0\n");
        let mut control = tar::Archive::new(flate2::read::GzDecoder::new(&members[1].1[..]));
        let mut text = String::new();
        let mut entries = control.entries().expect("entries");
        let entry = entries.next().expect("the fields").expect("an entry");
        { entry }.read_to_string(&mut text).expect("text");
        for line in text.lines() {
            assert!(!line.trim_end().ends_with(':'), "a field is empty: {line}");
        }
        let mut data = tar::Archive::new(flate2::read::GzDecoder::new(&members[2].1[..]));
        let mut inside = Vec::new();
        for entry in data.entries().expect("entries") {
            let entry = entry.expect("an entry");
            let path = entry.path().expect("a path").to_string_lossy().into_owned();
            inside.push((path, entry.header().mode().expect("a mode")));
        }
        for file in &files {
            assert!(
                inside.contains(&(file.path.clone(), file.mode)),
                "{}",
                file.path
            );
        }
        assert!(
            inside.contains(&("usr/bin/".to_owned(), 0o755)),
            "{inside:?}"
        );

        let package = rpm::pack(&files, "2.36", folder.path()).expect("a package");
        let package = ::rpm::Package::open(package).expect("a package");
        assert_eq!(package.metadata.get_name().expect("a name"), NAME);
        let inside: Vec<String> = package
            .metadata
            .get_file_paths()
            .expect("files")
            .iter()
            .map(|it| it.to_string_lossy().into_owned())
            .collect();
        for file in &files {
            assert!(inside.contains(&format!("/{}", file.path)), "{}", file.path);
        }
    }
}
