//! Packages the compiled console into the files that the server or the desktop app embeds.
//!
//! Called by `cargo xtask console` with the compiled wasm, the folder of the console's sources and the output folder.
//! Every path except `index.html` contains a hash, so that browsers can cache these files for a year. For the server,
//! every file also has two compressed copies: brotli for browsers, and gzip for clients that do not accept brotli, such
//! as browsers over plain HTTP. The desktop app compresses files itself and looks them up by their full path.
//! For the desktop app, all files except `index.html` are in a `console/` folder beside it, so that their paths match
//! their URLs. The app serves `index.html` for every path that is not a file.

mod split;

use std::{
    collections::BTreeMap,
    env,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use brotli::enc::BrotliEncoderParams;
use sha2::{Digest as _, Sha256};
use wasm_bindgen_cli_support::Bindgen;

/// The maximum total size of the files that a first visit transfers, compressed with brotli, in bytes.
const MAX_SIZE: usize = 300_000;

/// The name prefixes of files that a first visit does not load.
const ON_DEMAND: [&str; 2] = [GATEWAYS, split::PREFIX];

/// The name of the file with the gateway configurations.
const GATEWAYS: &str = "gateways";

fn main() -> Result<()> {
    let arguments: Vec<PathBuf> = env::args_os().skip(1).map(PathBuf::from).collect();
    let (wasm, source, out, for_desktop) = match &arguments[..] {
        [wasm, source, out] => (wasm, source, out, false),
        [wasm, source, out, last] if last.as_os_str() == "desktop" => (wasm, source, out, true),
        _ => bail!("usage: xtask-console WASM SOURCE OUT [desktop]"),
    };
    let work = out.with_extension("work");
    let _ = fs::remove_dir_all(&work);
    let main = work.join("main.wasm");
    let chunks = split::split(wasm, &work, &main)?;
    let mut bindgen = Bindgen::new();
    bindgen
        .web(true)?
        .input_path(&main)
        // The other modules share the main module's memory and tables.
        .keep_lld_exports(true)
        .out_name("quota-ui")
        .typescript(false)
        .remove_name_section(true)
        .remove_producers_section(true)
        .generate(&work)
        .context("wasm-bindgen")?;

    let mut files = BTreeMap::new();
    let mut module = walrus::Module::from_file(work.join("quota-ui_bg.wasm"))?;
    remove_streams(&mut module);
    let glue = without_comments(&read_text(&work.join("quota-ui.js"))?)?;
    let glue = shorten_names(&mut module, &glue);
    let mut loader = without_comments(&read_text(&work.join(split::LOADER))?)?;
    for name in chunks {
        let stem = name.trim_end_matches(".wasm");
        let bytes = split::without_names(&read(&work.join(&name))?)?;
        let hashed = format!("{}{stem}", split::PREFIX);
        let hashed = add_hashed(&mut files, &hashed, "wasm", &bytes);
        loader = split::renamed(&loader, &name, &hashed)?;
    }
    let wasm = add_hashed(&mut files, "quota-ui", "wasm", &module.emit_wasm());
    // The two scripts import each other, so their names contain a hash of both scripts.
    let both = hash_of(format!("{glue}{loader}"));
    let names = [format!("quota-ui-{both}.js"), format!("loader-{both}.js")];
    files.insert(
        names[0].clone(),
        split::renamed(&glue, split::LOADER, &names[1])?.into_bytes(),
    );
    files.insert(
        names[1].clone(),
        split::renamed(&loader, split::GLUE, &names[0])?.into_bytes(),
    );
    let [glue, loader] = names;
    add_snippets(&mut files, &work, &work.join("snippets"))?;
    let style = add_hashed(
        &mut files,
        "console",
        "css",
        compact_css(&read_text(&source.join("style/console.css"))?).as_bytes(),
    );
    let icon = add_hashed(&mut files, "icon", "svg", &read(&source.join("icon.svg"))?);
    // These files are loaded only when a page shows them.
    let gateways = gateway_files(&source.join("../../deploy/gateways"))?;
    let gateways = add_hashed(&mut files, GATEWAYS, "txt", gateways.as_bytes());
    let names = [
        ("{{gateways}}", &gateways),
        ("{{wasm}}", &wasm),
        ("{{glue}}", &glue),
        ("{{loader}}", &loader),
        ("{{style}}", &style),
        ("{{icon}}", &icon),
    ];
    let theme = add_hashed(&mut files, "theme", "js", &read(&source.join("theme.js"))?);
    let boot = fill_template(&source.join("boot.js"), &names)?;
    let boot = add_hashed(&mut files, "boot", "js", boot.as_bytes());
    let names = [&names[..], &[("{{boot}}", &boot), ("{{theme}}", &theme)]].concat();
    let index = fill_template(&source.join("index.html"), &names)?;
    files.insert("index.html".to_owned(), index.into_bytes());
    fs::remove_dir_all(&work).context("cannot remove the working folder")?;
    if for_desktop {
        let place = |(name, bytes): (String, Vec<u8>)| match name.as_str() {
            "index.html" => (name, bytes),
            _ => (format!("console/{name}"), bytes),
        };
        return write(out, &files.into_iter().map(place).collect());
    }

    let mut compressed = BTreeMap::new();
    let (mut brotli_size, mut gzip_size) = (0, 0);
    for (name, bytes) in &files {
        let (brotli, gzip) = (compress_brotli(bytes)?, compress_gzip(bytes)?);
        if !ON_DEMAND.iter().any(|prefix| name.starts_with(prefix)) {
            brotli_size += brotli.len();
            gzip_size += gzip.len();
        }
        compressed.insert(format!("{name}.br"), brotli);
        compressed.insert(format!("{name}.gz"), gzip);
    }
    if brotli_size > MAX_SIZE {
        bail!("the console is {brotli_size} bytes compressed, above the limit of {MAX_SIZE}");
    }
    files.append(&mut compressed);
    write(out, &files)?;
    println!(
        "a first visit to the console loads {} kB compressed with brotli, {} kB with gzip",
        brotli_size.div_ceil(1000),
        gzip_size.div_ceil(1000)
    );
    Ok(())
}

/// Compresses at the highest quality. That is slow, but files are compressed once and sent often.
fn compress_brotli(mut bytes: &[u8]) -> Result<Vec<u8>> {
    let parameters = BrotliEncoderParams {
        quality: 11,
        // The largest window that browsers accept.
        lgwin: 24,
        size_hint: bytes.len(),
        ..BrotliEncoderParams::default()
    };
    let mut out = Vec::new();
    brotli::BrotliCompress(&mut bytes, &mut out, &parameters)?;
    Ok(out)
}

fn compress_gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    let options = zopfli::Options::default();
    zopfli::compress(options, zopfli::Format::Gzip, bytes, &mut out)?;
    Ok(out)
}

/// Removes exported classes of the streams crate, a dependency of Leptos. The console never constructs these classes,
/// but their code stays in the module because they are exported.
fn remove_streams(module: &mut walrus::Module) {
    let unused: Vec<_> = module
        .exports
        .iter()
        .filter(|export| export.name.contains("intounderlying"))
        .map(walrus::Export::id)
        .collect();
    for export in unused {
        module.exports.delete(export);
    }
    walrus::passes::gc::run(module);
}

/// Shortens the names that the module and its glue script use for each other. Most of these names contain a hash, which
/// compresses poorly.
fn shorten_names(module: &mut walrus::Module, script: &str) -> String {
    let is_generated = |name: &str| name.starts_with("__wb") || name.starts_with("wasm_bindgen__");
    let mut short = BTreeMap::new();
    let mut shorten = |name: &mut String| {
        if is_generated(name) {
            let next = format!("w{}", short.len());
            let entry = short.entry(std::mem::take(name));
            name.clone_from(entry.or_insert(next));
        }
    };
    for import in module.imports.iter_mut() {
        shorten(&mut import.name);
    }
    for export in module.exports.iter_mut() {
        shorten(&mut export.name);
    }
    replace_names(script, &short)
}

/// Replaces whole identifiers.
fn replace_names(script: &str, names: &BTreeMap<String, String>) -> String {
    let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '$');
    let mut out = String::with_capacity(script.len());
    let mut rest = script;
    while let Some(start) = rest.find(is_part) {
        out.push_str(&rest[..start]);
        rest = &rest[start..];
        let end = rest.find(|c| !is_part(c)).unwrap_or(rest.len());
        let name = &rest[..end];
        out.push_str(names.get(name).map_or(name, String::as_str));
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

/// Removes comments, indentation, and the classes whose exports [`remove_streams`] removes.
fn without_comments(script: &str) -> Result<String> {
    let mut out = String::new();
    let mut unused_class = false;
    for line in script.lines() {
        if line.matches('`').count() % 2 != 0 {
            bail!("the glue script has a template literal over several lines");
        }
        unused_class |= line.starts_with("export class IntoUnderlying");
        let text = line.trim();
        let is_comment = ["/*", "*", "//"].iter().any(|it| text.starts_with(it));
        let is_unused = unused_class || text.starts_with("if (Symbol.dispose) IntoUnderlying");
        if !(text.is_empty() || is_comment || is_unused) {
            out.push_str(text);
            out.push('\n');
        }
        unused_class &= line != "}";
    }
    Ok(out)
}

/// Removes comments and most whitespace. The style sheet has one rule per line, and comments on separate lines.
fn compact_css(css: &str) -> String {
    css.lines()
        .map(str::trim)
        .filter(|line| !line.starts_with("/*"))
        .map(|line| {
            let line = line
                .replace(" { ", "{")
                .replace("; ", ";")
                .replace(";}", "}")
                .replace(" {", "{")
                .replace(", ", ",");
            // In a line with a string, spaces after colons are kept.
            if line.contains('"') {
                line
            } else {
                line.replace(": ", ":")
            }
        })
        .collect::<Vec<_>>()
        .join("\n")
}

/// Returns the gateway configurations in one file, each after a line with its name.
fn gateway_files(folder: &Path) -> Result<String> {
    let names = [
        "Caddyfile",
        "nginx.conf",
        "haproxy.cfg",
        "quota.lua",
        "traefik.yml",
        "envoy.yaml",
    ];
    let mut all = String::new();
    for name in names {
        let text = read_text(&folder.join(name))?;
        let _ = writeln!(all, "=== {name}\n{}", text.trim_end());
    }
    Ok(all)
}

fn read_text(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

fn hash_of(bytes: impl AsRef<[u8]>) -> String {
    let digest = Sha256::digest(bytes);
    let hash = u64::from_be_bytes(*digest.first_chunk().expect("SHA-256 has 32 bytes"));
    format!("{hash:016x}")
}

/// Adds a file whose name contains a hash of its content. Returns the name.
fn add_hashed(
    files: &mut BTreeMap<String, Vec<u8>>,
    stem: &str,
    extension: &str,
    bytes: &[u8],
) -> String {
    let name = format!("{stem}-{}.{extension}", hash_of(bytes));
    files.insert(name.clone(), bytes.to_vec());
    name
}

/// Adds the scripts of dependencies. wasm-bindgen puts a hash in the name of their folder.
fn add_snippets(files: &mut BTreeMap<String, Vec<u8>>, work: &Path, folder: &Path) -> Result<()> {
    if !folder.is_dir() {
        return Ok(());
    }
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            add_snippets(files, work, &path)?;
        } else {
            let name = path.strip_prefix(work)?.to_string_lossy().into_owned();
            files.insert(name, read(&path)?);
        }
    }
    Ok(())
}

fn fill_template(path: &Path, names: &[(&str, &String)]) -> Result<String> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let text = names.iter().fold(text, |text, (placeholder, name)| {
        text.replace(placeholder, name)
    });
    if text.contains("{{") {
        bail!("{} has an unknown placeholder", path.display());
    }
    Ok(text)
}

/// Writes changed files and removes stale ones. Unchanged files are not touched, so that the server is not rebuilt.
fn write(out: &Path, files: &BTreeMap<String, Vec<u8>>) -> Result<()> {
    fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{compact_css, compress_brotli, replace_names, without_comments, write};

    #[test]
    fn brotli_restores_the_file() {
        let text = "the same words, the same words, the same words".repeat(20);
        let compressed = compress_brotli(text.as_bytes()).unwrap();
        assert!(compressed.len() < text.len() / 5, "{}", compressed.len());
        let mut restored = Vec::new();
        brotli::BrotliDecompress(&mut &compressed[..], &mut restored).unwrap();
        assert_eq!(restored, text.as_bytes());
    }

    #[test]
    fn css_loses_comments_and_spaces_but_not_strings() {
        let css =
            "/* Cards */\n  .card { color: red; margin: 0 auto; }\n.x::after { content: \": a\"; }";
        assert_eq!(
            compact_css(css),
            ".card{color:red;margin:0 auto}\n.x::after{content: \": a\"}"
        );
    }

    #[test]
    fn only_whole_names_are_replaced() {
        let names = [("__wbg_log_1f", "w0"), ("__wbg_log_1f2", "w1")]
            .map(|(long, short)| (long.to_owned(), short.to_owned()));
        assert_eq!(
            replace_names(
                "a.__wbg_log_1f2(__wbg_log_1f, x__wbg_log_1f); \"é\"",
                &names.into()
            ),
            "a.w1(w0, x__wbg_log_1f); \"é\""
        );
    }

    #[test]
    fn glue_loses_comments_and_unused_classes() {
        let script = "/**\n * A comment\n */\nexport class IntoUnderlyingSink {\n  free() {}\n}\n\n  let a = 1;\n";
        assert_eq!(without_comments(script).unwrap(), "let a = 1;\n");
        assert!(without_comments("const a = `first\nsecond`;").is_err());
    }

    #[test]
    fn folder_is_created() {
        let parent = std::env::temp_dir().join(format!("xtask-console-new-{}", std::process::id()));
        let out = parent.join("dist");
        let files = [("a.js".to_owned(), b"a".to_vec())].into();
        write(&out, &files).unwrap();
        let written = fs::read_to_string(out.join("a.js")).unwrap();
        fs::remove_dir_all(&parent).unwrap();
        assert_eq!(written, "a");
    }

    #[test]
    fn stale_files_are_removed_and_unchanged_ones_kept() {
        let out = std::env::temp_dir().join(format!("xtask-console-{}", std::process::id()));
        fs::create_dir_all(out.join("old")).unwrap();
        fs::write(out.join("old/gone.js"), "gone").unwrap();
        fs::write(out.join(".gitignore"), "*").unwrap();
        let files = [("a.js", "a"), ("console/b.js", "b")]
            .map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec()))
            .into();
        write(&out, &files).unwrap();
        let modified = |name: &str| fs::metadata(out.join(name)).unwrap().modified().unwrap();
        let before = modified("a.js");
        write(&out, &files).unwrap();
        assert_eq!(modified("a.js"), before);
        assert_eq!(fs::read(out.join("console/b.js")).unwrap(), b"b");
        assert!(!out.join("old/gone.js").exists());
        assert!(out.join(".gitignore").exists());
        fs::remove_dir_all(&out).unwrap();
    }
}
