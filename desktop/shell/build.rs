//! Embeds the console, and declares the commands that the console may call.

fn main() {
    // `cargo xtask desktop` builds the console into this folder.
    println!("cargo:rerun-if-changed=dist");
    let commands = tauri_build::AppManifest::new().commands(&[
        "call",
        "try_key",
        "open_billing",
        "copy",
        "save_file",
        "notify",
        "host_status",
        "add_server",
        "use_server",
        "forget_server",
        "ready",
        "quit",
    ]);
    let attributes = tauri_build::Attributes::new().app_manifest(commands);
    if let Err(error) = tauri_build::try_build(attributes) {
        println!("cargo:warning={error:#}");
        std::process::exit(1);
    }
}
