//! The app's window. Its page cannot navigate outside the console.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use gtk::prelude::GtkWindowExt as _;
use tauri::{
    AppHandle, Manager as _, Theme, Url, WebviewUrl, WebviewWindow, WebviewWindowBuilder,
    WindowEvent, webview::NewWindowResponse,
};
use tauri_plugin_opener::open_url;

use crate::{server::Server, state::App};

pub const LABEL: &str = "main";
/// The path of the console's first page.
const FIRST_PAGE: &str = "console";

pub fn open(app: &AppHandle) -> tauri::Result<WebviewWindow> {
    let window = WebviewWindowBuilder::new(app, LABEL, WebviewUrl::App(FIRST_PAGE.into()))
        .title("Quota")
        .inner_size(1280.0, 840.0)
        .min_inner_size(360.0, 480.0)
        .on_navigation(is_console)
        .on_new_window(|_, _| NewWindowResponse::Deny)
        .on_download(|_, _| false)
        .on_page_load(|window, _| {
            if let Ok(theme) = window.theme() {
                report_theme(&window, theme);
            }
        })
        .build()?;
    let target = window.clone();
    window.on_window_event(move |event| match event {
        WindowEvent::ThemeChanged(theme) => report_theme(&target, *theme),
        WindowEvent::CloseRequested { api, .. } => {
            api.prevent_close();
            quit(target.app_handle());
        }
        _ => {}
    });
    tracing::info!(theme = ?window.theme().ok(), "window opened");
    Ok(window)
}

/// Reports a dark system theme to the page, because WebKit does not always detect such a theme. If Tauri reports a
/// light theme, the page relies on WebKit.
fn report_theme(window: &WebviewWindow, theme: Theme) {
    let dark = theme == Theme::Dark;
    run_in(
        window,
        &format!("document.documentElement?.toggleAttribute('data-system-dark', {dark})"),
    );
}

/// Returns whether a URL is a page of the embedded console.
fn is_console(url: &Url) -> bool {
    let is_embedded = match url.scheme() {
        "tauri" => url.host_str() == Some("localhost"),
        // Tauri uses this origin on Windows and Android.
        "http" | "https" => url.host_str() == Some("tauri.localhost"),
        _ => false,
    };
    let path = url.path();
    is_embedded && (path == "/console" || path.starts_with("/console/"))
}

/// Opens a page of the console, as if the user had clicked a link.
pub fn show(app: &AppHandle, path: &'static str) {
    run(
        app,
        &format!(
            "history.pushState(null, '', '{path}'); dispatchEvent(new PopStateEvent('popstate'))"
        ),
    );
}

/// Brings the window to the front and opens a page of the console. If a locked dialog is open, does not open the page,
/// because that would discard the dialog. Some desktop environments let a window take the focus only with the
/// activation token of a click, which `token` contains.
pub fn reveal(app: &AppHandle, path: &'static str, token: Option<String>) {
    let Some(window) = app.get_webview_window(LABEL) else {
        return;
    };
    if let Some(token) = token {
        let target = window.clone();
        let _ = window.run_on_main_thread(move || {
            if let Ok(window) = target.gtk_window() {
                window.set_startup_id(&token);
            }
        });
    }
    let _ = window.unminimize();
    let _ = window.set_focus();
    if_unlocked(app, move |window| show(window.app_handle(), path));
}

pub fn run(app: &AppHandle, script: &str) {
    if let Some(window) = app.get_webview_window(LABEL) {
        run_in(&window, script);
    }
}

fn run_in(window: &WebviewWindow, script: &str) {
    if let Err(error) = window.eval(script) {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "cannot run a script in the page"
        );
    }
}

/// A script that checks for an open locked dialog. Closing or reloading the page would discard the dialog's content.
const IS_LOCKED: &str = "!!document.querySelector('dialog[open][data-locked]')";

/// A script that checks for a new secret that has not been saved or is still being created. If the secret has not been
/// saved, the script also makes the page show a warning.
const WARNS: &str = "document.querySelector('[data-unsaved]') ? (dispatchEvent(new Event('quota-quit')), true) : \
                     !!document.querySelector('dialog[open][data-locked]:not(:has(#secret))')";

/// How long to wait for a response from the page. If the page takes longer, it is considered hung.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(3);

/// Quits the app, unless a new secret has not been saved or is still being created. In that case, the page can ask the
/// user. Also quits if the page does not respond.
pub fn quit(app: &AppHandle) {
    let is_waiting = Arc::new(AtomicBool::new(true));
    let ask = {
        let (app, is_waiting) = (app.clone(), Arc::clone(&is_waiting));
        move |warns: bool| {
            // Do nothing if the app is already quitting because the page did not respond.
            if is_waiting.swap(false, Ordering::AcqRel) && !warns {
                app.exit(0);
            }
        }
    };
    if !evaluate(app, WARNS, ask) {
        return app.exit(0);
    }
    let app = app.clone();
    tauri::async_runtime::spawn(async move {
        tokio::time::sleep(RESPONSE_TIMEOUT).await;
        if is_waiting.swap(false, Ordering::AcqRel) {
            tracing::warn!("the page did not respond; quitting");
            app.exit(0);
        }
    });
}

/// Calls `then` with the window, unless a locked dialog is open.
pub fn if_unlocked(app: &AppHandle, then: impl Fn(&WebviewWindow) + Send + 'static) {
    let target = app.clone();
    evaluate(app, IS_LOCKED, move |is_locked| {
        if let Some(window) = target.get_webview_window(LABEL).filter(|_| !is_locked) {
            then(&window);
        }
    });
}

/// Evaluates a condition in the page, and passes the result to `then`. Returns `false` if the evaluation cannot be
/// started, for example because there is no window.
fn evaluate(
    app: &AppHandle,
    condition: &'static str,
    then: impl Fn(bool) + Send + 'static,
) -> bool {
    let Some(window) = app.get_webview_window(LABEL) else {
        return false;
    };
    window
        .eval_with_callback(condition, move |result| then(result == "true"))
        .is_ok()
}

/// Handles a second launch of the app: focuses the window and, unless a locked dialog is open, selects the server given
/// on the command line, if any.
pub fn on_second_instance(app: &AppHandle, requested: Option<Server>) {
    let Some(window) = app.get_webview_window(LABEL) else {
        return;
    };
    let _ = window.unminimize();
    let _ = window.set_focus();
    let Some(server) = requested else { return };
    if_unlocked(app, move |window| {
        if let Some(state) = window.try_state::<App>() {
            state.profiles.lock().add_and_select(&server);
            run_in(window, "location.replace('/console')");
        }
    });
}

/// Opens a page of the server in use in the default browser. Never opens any other address.
pub fn open_on_server(app: &AppHandle, path: &'static str) {
    let Some(server) = app.try_state::<App>().and_then(|it| it.server().ok()) else {
        return;
    };
    if let Err(error) = open_url(server.at(path), None::<&str>) {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "cannot open the browser"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_cannot_navigate_away_from_the_console() {
        let allowed = |text: &str| is_console(&text.parse().expect("an address"));
        assert!(allowed("tauri://localhost/console"));
        assert!(allowed("tauri://localhost/console/api-keys?search=a"));
        for other in [
            "tauri://localhost/",
            "tauri://localhost/consoles",
            "tauri://evil.example/console",
            "https://quota.example.com/console",
            "http://localhost:8080/console",
            "https://tauri.localhost.evil.example/console",
            "data:text/html,x",
            "file:///etc/passwd",
            "about:blank",
            "javascript:alert(1)",
        ] {
            assert!(!allowed(other), "{other}");
        }
    }
}
