//! The window. Its page cannot navigate outside the console.

use tauri::{
    AppHandle, Manager as _, Theme, Url, WebviewUrl, WebviewWindow, WebviewWindowBuilder,
    WindowEvent, webview::NewWindowResponse,
};
use tauri_plugin_opener::OpenerExt as _;

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
    window.on_window_event(move |event| {
        if let WindowEvent::ThemeChanged(theme) = event {
            report_theme(&target, *theme);
        }
    });
    tracing::info!(theme = ?window.theme().ok(), "window opened");
    Ok(window)
}

/// Notifies the page that the system uses a dark theme, which WebKit does not always detect. If Tauri reports a light
/// theme, the page relies on WebKit.
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
        // The origin on Windows and Android.
        "http" | "https" => url.host_str() == Some("tauri.localhost"),
        _ => false,
    };
    let path = url.path();
    is_embedded && (path == "/console" || path.starts_with("/console/"))
}

/// Opens a page of the console, like a link in the page.
pub fn show(app: &AppHandle, path: &'static str) {
    run(
        app,
        &format!(
            "history.pushState(null, '', '{path}'); dispatchEvent(new PopStateEvent('popstate'))"
        ),
    );
}

/// Runs one of the app's scripts in the page.
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

/// Handles a second launch of the app: focuses the window and selects the server named on the command line.
pub fn on_second_instance(app: &AppHandle, arguments: &[String]) {
    let Some(window) = app.get_webview_window(LABEL) else {
        return;
    };
    let _ = window.unminimize();
    let _ = window.set_focus();
    let requested = arguments
        .iter()
        .position(|it| it == "--server")
        .and_then(|at| arguments.get(at + 1))
        .and_then(|text| Server::parse(text).ok());
    if let (Some(server), Some(state)) = (requested, app.try_state::<App>()) {
        state.profiles.lock().add_and_select(&server);
        run(app, "location.replace('/console')");
    }
}

/// Opens a page of the server in use in the system's browser. Never opens another address.
pub fn open_on_server(app: &AppHandle, path: &'static str) {
    let Some(server) = app.try_state::<App>().and_then(|it| it.server().ok()) else {
        return;
    };
    if let Err(error) = app.opener().open_url(server.at(path), None::<&str>) {
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
