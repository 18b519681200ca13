//! The `.deb` format: an `ar` archive of two tar archives (deb(5)).

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::Result;
use flate2::{Compression, write::GzEncoder};

use crate::{DESCRIPTION, File, HOMEPAGE, NAME, SUMMARY, VERSION, architecture};

const MAINTAINER: &str = "Quota <quota-rs@users.noreply.github.com>";

pub fn pack(files: &[File], libc: &str, out: &Path) -> Result<PathBuf> {
    let (architecture, _) = architecture()?;
    let size: usize = files.iter().map(|it| it.bytes.len()).sum();
    let control = format!(
        "Package: {NAME}\nVersion: {VERSION}\nArchitecture: {architecture}\nMaintainer: {MAINTAINER}\n\
         Installed-Size: {}\nDepends: libc6 (>= {libc}), libdbus-1-3, libgtk-3-0 | libgtk-3-0t64, \
         libwebkit2gtk-4.1-0\nRecommends: gnome-keyring | kwalletmanager\nSection: devel\nPriority: optional\n\
         Homepage: {HOMEPAGE}\nDescription: {SUMMARY}\n {DESCRIPTION}\n",
        size.div_ceil(1024)
    );
    let control = [File {
        path: "control".to_owned(),
        bytes: control.into_bytes(),
        mode: 0o644,
    }];
    let path = out.join(format!("{NAME}_{VERSION}_{architecture}.deb"));
    let mut archive = ar::Builder::new(fs::File::create(&path)?);
    for (name, bytes) in [
        ("debian-binary", b"2.0\n".to_vec()),
        ("control.tar.gz", compressed(&control)?),
        ("data.tar.gz", compressed(files)?),
    ] {
        let header = ar::Header::new(name.as_bytes().to_vec(), bytes.len() as u64);
        archive.append(&header, &bytes[..])?;
    }
    archive.into_inner()?;
    Ok(path)
}

/// Returns a tar archive with fixed owners and times, so that builds are reproducible.
fn compressed(files: &[File]) -> Result<Vec<u8>> {
    let mut archive = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::best()));
    let folders: BTreeSet<&Path> = files
        .iter()
        .flat_map(|it| Path::new(&it.path).ancestors().skip(1))
        .filter(|it| !it.as_os_str().is_empty())
        .collect();
    for folder in folders {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Directory);
        header.set_mode(0o755);
        header.set_size(0);
        archive.append_data(&mut header, format!("{}/", folder.display()), &[][..])?;
    }
    for file in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(file.mode);
        header.set_size(file.bytes.len() as u64);
        archive.append_data(&mut header, &file.path, &file.bytes[..])?;
    }
    Ok(archive.into_inner()?.finish()?)
}
