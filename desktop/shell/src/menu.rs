use std::sync::atomic::{AtomicU32, Ordering};

use tauri::{
    AppHandle, Manager as _,
    menu::{AboutMetadataBuilder, Menu, MenuBuilder, MenuItemBuilder, SubmenuBuilder},
};
use tauri_plugin_opener::open_path;

use crate::window;

/// Paths, names, and keyboard shortcuts of the console's pages.
const PAGES: [(&str, &str, &str); 10] = [
    ("/console", "Home", "CmdOrCtrl+1"),
    ("/console/usage", "Usage", "CmdOrCtrl+2"),
    ("/console/alerts", "Alerts", "CmdOrCtrl+3"),
    ("/console/audit", "Audit log", "CmdOrCtrl+4"),
    ("/console/plans", "Plans", "CmdOrCtrl+5"),
    ("/console/api-keys", "API keys", "CmdOrCtrl+6"),
    ("/console/service-tokens", "Service tokens", "CmdOrCtrl+7"),
    ("/console/webhooks", "Webhooks", "CmdOrCtrl+8"),
    ("/console/billing", "Billing", "CmdOrCtrl+9"),
    ("/console/settings", "Settings", "CmdOrCtrl+,"),
];

// The ID, name, and keyboard shortcut of each of the other menu entries.
const RELOAD: (&str, &str, &str) = ("reload", "Reload", "CmdOrCtrl+R");
const QUIT: (&str, &str, &str) = ("quit", "Quit", "CmdOrCtrl+Q");
const BACK: (&str, &str, &str) = ("back", "Back", "Alt+Left");
const FORWARD: (&str, &str, &str) = ("forward", "Forward", "Alt+Right");
const ZOOM_IN: (&str, &str, &str) = ("zoom-in", "Zoom in", "CmdOrCtrl+=");
const ZOOM_OUT: (&str, &str, &str) = ("zoom-out", "Zoom out", "CmdOrCtrl+-");
const ACTUAL_SIZE: (&str, &str, &str) = ("actual-size", "Actual size", "CmdOrCtrl+0");
const FULL_SCREEN: (&str, &str, &str) = ("full-screen", "Full screen", "F11");
const DOCS: (&str, &str, &str) = ("docs", "API docs", "F1");
const LOGS: (&str, &str, &str) = ("logs", "Show log files", "CmdOrCtrl+Shift+L");

/// The zoom level in percent.
static ZOOM: AtomicU32 = AtomicU32::new(100);

pub fn set(app: &AppHandle) -> tauri::Result<()> {
    app.set_menu(build(app)?)?;
    app.on_menu_event(|app, event| on_selected(app, event.id().as_ref()));
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
        .comments(Some("Self-hosted API keys, plans, rate limits and quotas"))
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
        .item(&item(ZOOM_IN)?)
        .item(&item(ZOOM_OUT)?)
        .item(&item(ACTUAL_SIZE)?)
        .separator()
        .item(&item(FULL_SCREEN)?)
        .build()?;
    let help = SubmenuBuilder::new(app, "Help")
        .item(&item(DOCS)?)
        .item(&item(LOGS)?)
        .separator()
        .about(Some(about))
        .build()?;
    let mut menu = MenuBuilder::new(app).item(&quota);
    // On macOS, the shortcuts for copy and paste require menu entries. On other systems, the web view handles these
    // shortcuts.
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

fn on_selected(app: &AppHandle, id: &str) {
    if let Some((path, ..)) = PAGES.into_iter().find(|(path, ..)| *path == id) {
        return window::show(app, path);
    }
    match id {
        "reload" => window::if_unlocked(app, |window| {
            let _ = window.reload();
        }),
        "quit" => window::quit(app),
        "back" => window::run(app, "history.back()"),
        "forward" => window::run(app, "history.forward()"),
        "zoom-in" => zoom(app, |percent| percent + 10),
        "zoom-out" => zoom(app, |percent| percent - 10),
        "actual-size" => zoom(app, |_| 100),
        "full-screen" => toggle_full_screen(app),
        "docs" => window::open_on_server(app, "/docs"),
        "logs" => open_logs(app),
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

fn toggle_full_screen(app: &AppHandle) {
    if let Some(window) = app.get_webview_window(window::LABEL) {
        let is_full = window.is_fullscreen().unwrap_or_default();
        let _ = window.set_fullscreen(!is_full);
    }
}

fn open_logs(app: &AppHandle) {
    let Ok(folder) = app.path().app_log_dir() else {
        return;
    };
    let opened = open_path(folder, None::<&str>);
    if let Err(error) = opened {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "cannot open the log folder"
        );
    }
}
