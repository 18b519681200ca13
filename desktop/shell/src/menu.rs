//! The menu: each of its entries has a key.

use std::sync::atomic::{AtomicU32, Ordering};

use tauri::{
    AppHandle, Manager as _,
    menu::{AboutMetadataBuilder, Menu, MenuBuilder, MenuItemBuilder, SubmenuBuilder},
};
use tauri_plugin_opener::OpenerExt as _;

use crate::window;

/// Pages of the console, and the key that shows each.
const PAGES: [(&str, &str, &str); 6] = [
    ("/console", "Home", "CmdOrCtrl+1"),
    ("/console/plans", "Plans", "CmdOrCtrl+2"),
    ("/console/api-keys", "API keys", "CmdOrCtrl+3"),
    ("/console/service-tokens", "Service tokens", "CmdOrCtrl+4"),
    ("/console/audit", "Audit", "CmdOrCtrl+5"),
    ("/console/settings", "Settings", "CmdOrCtrl+,"),
];

/// What else there is: its id, its name, its key.
const RELOAD: (&str, &str, &str) = ("reload", "Reload", "CmdOrCtrl+R");
const QUIT: (&str, &str, &str) = ("quit", "Quit", "CmdOrCtrl+Q");
const BACK: (&str, &str, &str) = ("back", "Back", "Alt+Left");
const FORWARD: (&str, &str, &str) = ("forward", "Forward", "Alt+Right");
const LARGER: (&str, &str, &str) = ("larger", "Larger", "CmdOrCtrl+=");
const SMALLER: (&str, &str, &str) = ("smaller", "Smaller", "CmdOrCtrl+-");
const ACTUAL: (&str, &str, &str) = ("actual", "Actual size", "CmdOrCtrl+0");
const FULL: (&str, &str, &str) = ("full", "Full screen", "F11");
const DOCS: (&str, &str, &str) = ("docs", "The server's API", "F1");
const LOGS: (&str, &str, &str) = ("logs", "Show log files", "CmdOrCtrl+Shift+L");

/// In percent.
static ZOOM: AtomicU32 = AtomicU32::new(100);

pub fn set(app: &AppHandle) -> tauri::Result<()> {
    app.set_menu(build(app)?)?;
    app.on_menu_event(|app, event| chosen(app, event.id().as_ref()));
    Ok(())
}

fn build(app: &AppHandle) -> tauri::Result<Menu<tauri::Wry>> {
    let item = |(id, name, key): (&str, &str, &str)| {
        MenuItemBuilder::with_id(id, name)
            .accelerator(key)
            .build(app)
    };
    let about = AboutMetadataBuilder::new()
        .name(Some("Quota"))
        .version(Some(env!("CARGO_PKG_VERSION")))
        .comments(Some(
            "API keys, plans, rate limits and quotas on your own machines",
        ))
        .license(Some(env!("CARGO_PKG_LICENSE")))
        .icon(app.default_window_icon().cloned())
        .build();
    let quota = SubmenuBuilder::new(app, "Quota")
        .item(&item(RELOAD)?)
        .separator()
        .item(&item(QUIT)?)
        .build()?;
    let mut go = SubmenuBuilder::new(app, "Go");
    for page in PAGES {
        go = go.item(&item(page)?);
    }
    let go = go
        .separator()
        .item(&item(BACK)?)
        .item(&item(FORWARD)?)
        .build()?;
    let view = SubmenuBuilder::new(app, "View")
        .item(&item(LARGER)?)
        .item(&item(SMALLER)?)
        .item(&item(ACTUAL)?)
        .separator()
        .item(&item(FULL)?)
        .build()?;
    let help = SubmenuBuilder::new(app, "Help")
        .item(&item(DOCS)?)
        .item(&item(LOGS)?)
        .separator()
        .about(Some(about))
        .build()?;
    let mut menu = MenuBuilder::new(app).item(&quota);
    // There the keys for copying come from the menu; elsewhere the page has them.
    let edit = SubmenuBuilder::new(app, "Edit")
        .undo()
        .redo()
        .separator()
        .cut()
        .copy()
        .paste()
        .select_all()
        .build()?;
    if cfg!(target_os = "macos") {
        menu = menu.item(&edit);
    }
    menu.items(&[&go, &view, &help]).build()
}

fn chosen(app: &AppHandle, id: &str) {
    if let Some((path, ..)) = PAGES.into_iter().find(|(path, ..)| *path == id) {
        return window::show(app, path);
    }
    match id {
        // What a dialog shows once is not lost to a slip of the hand.
        "reload" => window::run(
            app,
            "if (!document.querySelector('dialog[open][data-firm]')) location.reload()",
        ),
        "quit" => app.exit(0),
        "back" => window::run(app, "history.back()"),
        "forward" => window::run(app, "history.forward()"),
        "larger" => zoom(app, |percent| percent + 10),
        "smaller" => zoom(app, |percent| percent - 10),
        "actual" => zoom(app, |_| 100),
        "full" => full_screen(app),
        "docs" => window::open_on_server(app, "/docs"),
        "logs" => logs(app),
        _ => {}
    }
}

fn zoom(app: &AppHandle, change: impl Fn(u32) -> u32) {
    let percent = change(ZOOM.load(Ordering::Relaxed)).clamp(50, 300);
    ZOOM.store(percent, Ordering::Relaxed);
    if let Some(window) = app.get_webview_window(window::LABEL) {
        let _ = window.set_zoom(f64::from(percent) / 100.0);
    }
}

fn full_screen(app: &AppHandle) {
    if let Some(window) = app.get_webview_window(window::LABEL) {
        let is_full = window.is_fullscreen().unwrap_or_default();
        let _ = window.set_fullscreen(!is_full);
    }
}

fn logs(app: &AppHandle) {
    let Ok(folder) = app.path().app_log_dir() else {
        return;
    };
    let opened = app
        .opener()
        .open_path(folder.to_string_lossy(), None::<&str>);
    if let Err(error) = opened {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "the folder was not opened"
        );
    }
}
