//! Turns the compiled console into the files that the server embeds, or the desktop app.
//!
//! Called by `cargo xtask console` with the compiled wasm, the folder of the console's sources and the folder
//! to write to. Every file but `index.html` bears a hash of what is in it in its name, so that it can be kept
//! by browsers for a year; each has a compressed twin. The desktop app compresses for itself, and finds its files
//! by their whole path: for it they are in `console`, and the page, which it shows for any path, is beside that.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use sha2::{Digest as _, Sha256};
use wasm_bindgen_cli_support::Bindgen;

/// All files of the console together, compressed: what a first visit loads.
const MOST: usize = 300_000;

fn main() -> Result<()> {
    let arguments: Vec<PathBuf> = env::args_os().skip(1).map(PathBuf::from).collect();
    let (wasm, source, out, for_desktop) = match &arguments[..] {
        [wasm, source, out] => (wasm, source, out, false),
        [wasm, source, out, last] if last.as_os_str() == "desktop" => (wasm, source, out, true),
        _ => bail!("usage: xtask-console WASM SOURCE OUT [desktop]"),
    };
    let work = out.with_extension("work");
    let _ = fs::remove_dir_all(&work);
    let mut bindgen = Bindgen::new();
    bindgen
        .web(true)?
        .input_path(wasm)
        .out_name("quota-ui")
        .typescript(false)
        .remove_name_section(true)
        .remove_producers_section(true)
        .generate(&work)
        .context("wasm-bindgen")?;

    let mut files = BTreeMap::new();
    let wasm = keep(
        &mut files,
        "quota-ui",
        "wasm",
        &without_streams(&work.join("quota-ui_bg.wasm"))?,
    );
    let glue = keep(
        &mut files,
        "quota-ui",
        "js",
        &read(&work.join("quota-ui.js"))?,
    );
    snippets(&mut files, &work, &work.join("snippets"))?;
    let style = keep(
        &mut files,
        "console",
        "css",
        &read(&source.join("style/console.css"))?,
    );
    let icon = keep(&mut files, "icon", "svg", &read(&source.join("icon.svg"))?);
    let names = [
        ("{{wasm}}", &wasm),
        ("{{glue}}", &glue),
        ("{{style}}", &style),
        ("{{icon}}", &icon),
    ];
    let theme = keep(&mut files, "theme", "js", &read(&source.join("theme.js"))?);
    let boot = filled(&source.join("boot.js"), &names)?;
    let boot = keep(&mut files, "boot", "js", boot.as_bytes());
    let names = [&names[..], &[("{{boot}}", &boot), ("{{theme}}", &theme)]].concat();
    let index = filled(&source.join("index.html"), &names)?;
    files.insert("index.html".to_owned(), index.into_bytes());
    fs::remove_dir_all(&work).context("cannot clean up")?;
    if for_desktop {
        let place = |(name, bytes): (String, Vec<u8>)| match name.as_str() {
            "index.html" => (name, bytes),
            _ => (format!("console/{name}"), bytes),
        };
        return write(out, &files.into_iter().map(place).collect());
    }

    let mut compressed = 0;
    let plain: Vec<String> = files.keys().cloned().collect();
    for name in plain {
        // As small as the format allows: compressed once, sent often.
        let mut gzip = Vec::new();
        zopfli::compress(
            zopfli::Options::default(),
            zopfli::Format::Gzip,
            &files[&name][..],
            &mut gzip,
        )?;
        compressed += gzip.len();
        files.insert(format!("{name}.gz"), gzip);
    }
    if compressed > MOST {
        bail!(
            "the console is {compressed} bytes, compressed, and {MOST} are the most that a browser should load"
        );
    }
    write(out, &files)?;
    println!(
        "the console is {} kB, compressed",
        compressed.div_ceil(1000)
    );
    Ok(())
}

/// The crate of streams that comes with Leptos hands out classes which nothing here makes an object of. As exports
/// they keep all that they could need: without them it goes.
fn without_streams(path: &Path) -> Result<Vec<u8>> {
    let mut module = walrus::Module::from_file(path)?;
    let unused: Vec<_> = module
        .exports
        .iter()
        .filter(|export| export.name.contains("intounderlying"))
        .map(walrus::Export::id)
        .collect();
    for export in unused {
        module.exports.delete(export);
    }
    walrus::passes::gc::run(&mut module);
    Ok(module.emit_wasm())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Adds a file under a name that holds a hash of it, and returns that name.
fn keep(
    files: &mut BTreeMap<String, Vec<u8>>,
    stem: &str,
    extension: &str,
    bytes: &[u8],
) -> String {
    let digest = Sha256::digest(bytes);
    let hash = u64::from_be_bytes(*digest.first_chunk().expect("SHA-256 has 32 bytes"));
    let hash = format!("{hash:016x}");
    let name = format!("{stem}-{hash}.{extension}");
    files.insert(name.clone(), bytes.to_vec());
    name
}

/// Scripts that libraries bring; wasm-bindgen puts a hash into their folder's name.
fn snippets(files: &mut BTreeMap<String, Vec<u8>>, work: &Path, folder: &Path) -> Result<()> {
    if !folder.is_dir() {
        return Ok(());
    }
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            snippets(files, work, &path)?;
        } else {
            let name = path.strip_prefix(work)?.to_string_lossy().into_owned();
            files.insert(name, read(&path)?);
        }
    }
    Ok(())
}

fn filled(path: &Path, names: &[(&str, &String)]) -> Result<String> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let text = names
        .iter()
        .fold(text, |text, (place, name)| text.replace(place, name));
    if text.contains("{{") {
        bail!("{} has a place that nothing fills", path.display());
    }
    Ok(text)
}

/// Writes what has changed and removes what is no longer there: the server is built anew only when it must be.
fn write(out: &Path, files: &BTreeMap<String, Vec<u8>>) -> Result<()> {
    remove_stale(out, out, files)?;
    for (name, bytes) in files {
        let path = out.join(name);
        if fs::read(&path).is_ok_and(|present| present == *bytes) {
            continue;
        }
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn remove_stale(out: &Path, folder: &Path, files: &BTreeMap<String, Vec<u8>>) -> Result<()> {
    for entry in
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?
    {
        let path = entry?.path();
        let name = path.strip_prefix(out)?.to_string_lossy().into_owned();
        if path.is_dir() {
            remove_stale(out, &path, files)?;
        } else if name != ".gitignore" && !files.contains_key(&name) {
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}
