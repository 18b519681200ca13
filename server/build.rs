//! Copies the files of the compiled console, if it exists, for the server to embed.
//!
//! The server embeds the copies, so that it compiles even if the console is deleted, or if another checkout with the
//! same target directory has no console.

use std::{
    env,
    fmt::Write as _,
    fs, io,
    path::{Path, PathBuf},
};

#[expect(
    clippy::disallowed_methods,
    reason = "cargo speaks to build scripts through the environment"
)]
fn folder(variable: &str) -> PathBuf {
    PathBuf::from(env::var_os(variable).expect("cargo sets it"))
}

fn main() -> io::Result<()> {
    let built = folder("CARGO_MANIFEST_DIR").join("../desktop/ui/dist");
    // Give Cargo both paths of the folder. The relative path works in any checkout. The absolute path prevents Cargo
    // from mistaking another checkout for this one.
    println!("cargo:rerun-if-changed=../desktop/ui/dist");
    println!("cargo:rerun-if-changed={}", built.display());
    println!("cargo:rerun-if-changed=build.rs");
    let out = folder("OUT_DIR");
    let copies = out.join("console");
    if copies.exists() {
        fs::remove_dir_all(&copies)?;
    }
    fs::create_dir_all(&copies)?;
    let mut files = Vec::new();
    if built.is_dir() {
        collect(&built, &built, &mut files)?;
    }
    files.sort();
    let mut table = String::from("const FILES: &[File] = &[\n");
    for (name, path) in &files {
        // Skip files without compressed copies: hidden files, and the compressed copies themselves.
        let compressed = ["br", "gz"].map(|kind| with_suffix(path, kind));
        if !compressed.iter().all(|path| path.exists()) {
            continue;
        }
        let [brotli, gzip] = compressed;
        let _ = write!(table, "    File {{ name: {name:?}");
        for (field, path) in [("plain", path), ("brotli", &brotli), ("gzip", &gzip)] {
            let copy = format!("{}.{field}", name.replace('/', "~"));
            fs::copy(path, copies.join(&copy))?;
            let copy = format!("/console/{copy}");
            let _ = write!(
                table,
                ", {field}: include_bytes!(concat!(env!(\"OUT_DIR\"), {copy:?}))"
            );
        }
        table.push_str(" },\n");
    }
    table.push_str("];\n");
    fs::write(out.join("console.rs"), table)
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    name.into()
}

fn collect(root: &Path, folder: &Path, files: &mut Vec<(String, PathBuf)>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(root, &path, files)?;
        } else if let Ok(name) = path.strip_prefix(root) {
            files.push((name.to_string_lossy().into_owned(), path));
        }
    }
    Ok(())
}
