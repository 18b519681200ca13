//! Lists the files of the compiled console, if it exists, for the server to embed.

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
    println!("cargo:rerun-if-changed=../desktop/ui/dist");
    let mut files = Vec::new();
    if built.is_dir() {
        collect(&built, &built, &mut files)?;
    }
    files.sort();
    let mut table = String::from("const FILES: &[File] = &[\n");
    for (name, path) in &files {
        // Hidden files and the compressed copies themselves are not compressed.
        let (brotli, gzip) = (format!("{path}.br"), format!("{path}.gz"));
        if !Path::new(&brotli).exists() || !Path::new(&gzip).exists() {
            continue;
        }
        let _ = writeln!(
            table,
            "    File {{ name: {name:?}, plain: include_bytes!({path:?}), brotli: include_bytes!({brotli:?}), \
             gzip: include_bytes!({gzip:?}) }},"
        );
    }
    table.push_str("];\n");
    fs::write(folder("OUT_DIR").join("console.rs"), table)
}

fn collect(root: &Path, folder: &Path, files: &mut Vec<(String, String)>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(root, &path, files)?;
        } else if let (Ok(name), Some(full)) = (path.strip_prefix(root), path.to_str()) {
            files.push((name.to_string_lossy().into_owned(), full.to_owned()));
        }
    }
    Ok(())
}
