//! Splits the compiled console into the module that every visit loads, and modules for groups of pages.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, anyhow, bail};
use walrus::ModuleConfig;
use wasm_split_cli_support::{Options, transform};

/// The script that loads the other modules.
pub const LOADER: &str = "__wasm_split.js";

/// The main module's script. This script and the loader import each other.
pub const GLUE: &str = "quota-ui.js";

/// The prefix of the other modules' published names.
pub const PREFIX: &str = "pages-";

/// Writes the main module to `main`, and the loader and the other modules to `folder`. Returns the file names of the
/// other modules.
pub fn split(wasm: &Path, folder: &Path, main: &Path) -> Result<Vec<String>> {
    let input = fs::read(wasm).with_context(|| format!("cannot read {}", wasm.display()))?;
    fs::create_dir_all(folder)?;
    let link_name = format!("./{LOADER}");
    let mut options = Options::new(&input);
    options.output_dir = folder;
    options.main_out_path = main;
    options.link_name = &link_name;
    let main_module = format!("./{GLUE}");
    options.main_module = &main_module;
    let output =
        transform(options).map_err(|error| anyhow!("cannot split the console: {error:#}"))?;
    let names = output.split_modules.iter().map(|path| {
        let name = path.file_name().context("a module without a name")?;
        Ok(name.to_string_lossy().into_owned())
    });
    names.collect()
}

/// Removes the names of functions and tools from a module.
pub fn without_names(wasm: &[u8]) -> Result<Vec<u8>> {
    let mut config = ModuleConfig::new();
    config.generate_name_section(false);
    config.generate_producers_section(false);
    Ok(config.parse(wasm)?.emit_wasm())
}

/// Changes the path from which a script loads an adjacent file. The name that the compiled module uses for the file is
/// an object key in the script, and stays the same.
pub fn renamed(script: &str, name: &str, to: &str) -> Result<String> {
    let mut out = script.to_owned();
    for before in ["from ", "new URL("] {
        let path = |name: &str| format!("{before}\"./{name}\"");
        out = out.replace(&path(name), &path(to));
    }
    if out == script {
        bail!("no script loads {name}");
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::renamed;

    #[test]
    fn only_paths_are_renamed() {
        let script = "import * as a from \"./l.js\"\nreturn {\"./l.js\": a}; fetch(new URL(\"./c.wasm\", x))";
        let renamed_once = renamed(script, "l.js", "l-1.js").expect("a path");
        let renamed_twice = renamed(&renamed_once, "c.wasm", "c-2.wasm").expect("a path");
        assert_eq!(
            renamed_twice,
            "import * as a from \"./l-1.js\"\nreturn {\"./l.js\": a}; fetch(new URL(\"./c-2.wasm\", x))"
        );
        assert!(renamed(script, "other.js", "o.js").is_err());
    }
}
