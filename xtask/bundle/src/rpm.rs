//! The `.rpm` format.

use std::path::{Path, PathBuf};

use anyhow::Result;
use rpm::{BuildConfig, CompressionWithLevel, Dependency, FileOptions, PackageBuilder};

use crate::{DESCRIPTION, File, HOMEPAGE, LICENSE, NAME, SUMMARY, VERSION, architecture};

const RELEASE: &str = "1";

pub fn pack(files: &[File], libc: &str, out: &Path) -> Result<PathBuf> {
    let (_, architecture) = architecture()?;
    let mut builder = PackageBuilder::new(NAME, VERSION, LICENSE, architecture, SUMMARY);
    builder
        .using_config(BuildConfig::default().compression(CompressionWithLevel::Gzip(9)))
        .release(RELEASE)
        .description(DESCRIPTION)
        .url(HOMEPAGE)
        .requires(Dependency::greater_eq("glibc", libc))
        .requires(Dependency::any("dbus-libs"))
        .requires(Dependency::any("gtk3"))
        .requires(Dependency::any("webkit2gtk4.1"))
        .recommends(Dependency::any("gnome-keyring"));
    for file in files {
        let options =
            FileOptions::new(format!("/{}", file.path)).permissions(u16::try_from(file.mode)?);
        builder.with_file_contents(file.bytes.clone(), options)?;
    }
    let path = out.join(format!("{NAME}-{VERSION}-{RELEASE}.{architecture}.rpm"));
    builder.build()?.write_file(&path)?;
    Ok(path)
}
