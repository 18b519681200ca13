//! The window, and where its page may go: nowhere.

use tauri::{
    AppHandle, Manager as _, Theme, Url, WebviewUrl, WebviewWindow, WebviewWindowBuilder,
    WindowEvent, webview::NewWindowResponse,
};
use tauri_plugin_opener::OpenerExt as _;

use crate::{server::Server, state::App};

pub const LABEL: &str = "main";
/// The console's first page.
const FIRST: &str = "console";

pub fn open(app: &AppHandle) -> tauri::Result<WebviewWindow> {
    let window = WebviewWindowBuilder::new(app, LABEL, WebviewUrl::App(FIRST.into()))
        .title("Quota")
        .inner_size(1280.0, 840.0)
        .min_inner_size(360.0, 480.0)
        .on_navigation(is_own)
        .on_new_window(|_, _| NewWindowResponse::Deny)
        .on_download(|_, _| false)
        .on_page_load(|window, _| {
            if let Ok(theme) = window.theme() {
                tell_theme(&window, theme);
            }
        })
        .build()?;
    let told = window.clone();
    window.on_window_event(move |event| {
        if let WindowEvent::ThemeChanged(theme) = event {
            tell_theme(&told, *theme);
        }
    });
    tracing::info!(theme = ?window.theme().ok(), "opened");
    Ok(window)
}

/// Tells the page that the system is dark, which WebKit alone does not always learn. Where the system does not say so,
/// WebKit may know better.
fn tell_theme(window: &WebviewWindow, theme: Theme) {
    let dark = theme == Theme::Dark;
    run_in(
        window,
        &format!("document.documentElement?.toggleAttribute('data-system-dark', {dark})"),
    );
}

/// The page's own addresses: of the console, in the app.
fn is_own(url: &Url) -> bool {
    let embedded = match url.scheme() {
        "tauri" => url.host_str() == Some("localhost"),
        // On Windows and Android.
        "http" | "https" => url.host_str() == Some("tauri.localhost"),
        _ => false,
    };
    let path = url.path();
    embedded && (path == "/console" || path.starts_with("/console/"))
}

/// Shows the console's page of that path, as a link in it would.
pub fn show(app: &AppHandle, path: &'static str) {
    run(
        app,
        &format!(
            "history.pushState(null, '', '{path}'); dispatchEvent(new PopStateEvent('popstate'))"
        ),
    );
}

/// Runs a script of ours in the page.
pub fn run(app: &AppHandle, script: &str) {
    if let Some(window) = app.get_webview_window(LABEL) {
        run_in(&window, script);
    }
}

fn run_in(window: &WebviewWindow, script: &str) {
    if let Err(error) = window.eval(script) {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "the page takes no script"
        );
    }
}

/// The app was started a second time: its window comes to the front, with the server that was asked for.
pub fn started_again(app: &AppHandle, arguments: &[String]) {
    let Some(window) = app.get_webview_window(LABEL) else {
        return;
    };
    let _ = window.unminimize();
    let _ = window.set_focus();
    let asked = arguments
        .iter()
        .position(|it| it == "--server")
        .and_then(|at| arguments.get(at + 1))
        .and_then(|text| Server::parse(text).ok());
    if let (Some(server), Some(state)) = (asked, app.try_state::<App>()) {
        state.profiles.lock().add_and_choose(&server);
        run(app, "location.replace('/console')");
    }
}

/// Opens a page of the server in use in the system's browser: no other address ever.
pub fn open_on_server(app: &AppHandle, path: &'static str) {
    let Some(server) = app.try_state::<App>().and_then(|it| it.server().ok()) else {
        return;
    };
    if let Err(error) = app.opener().open_url(server.at(path), None::<&str>) {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "no browser was opened"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_goes_nowhere_but_to_the_console() {
        let own = |text: &str| is_own(&text.parse().expect("an address"));
        assert!(own("tauri://localhost/console"));
        assert!(own("tauri://localhost/console/api-keys?search=a"));
        for away in [
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
            assert!(!own(away), "{away}");
        }
    }
}
