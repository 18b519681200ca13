//! Desktop notifications, according to the [Desktop Notifications Specification].
//!
//! If there is no notification service, no notification is shown, and the error is logged. The console itself also
//! announces alerts.
//!
//! [Desktop Notifications Specification]: https://specifications.freedesktop.org/notification-spec/latest/

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use futures_util::StreamExt as _;
use quota_common::ipc::CallError;
use tauri::{AppHandle, Manager as _, async_runtime::spawn};
use tokio::sync::Mutex;
use zbus::{Proxy, connection, proxy::SignalStream, zvariant::Value};

use crate::window;

/// The D-Bus name of the notification service, which is also the name of its interface.
const SERVICE: &str = "org.freedesktop.Notifications";
const PATH: &str = "/org/freedesktop/Notifications";
/// The time limit for a call to the service. The call may have to wait until the service has started.
const TIMEOUT: Duration = Duration::from_secs(30);

const TITLE: &str = "Quota alert";
/// The maximum length of a text, longer than any text that the console sends.
const MAX_TEXT: usize = 1000;
/// The name of the desktop entry and of the icon that the packages install.
const DESKTOP_ENTRY: &str = "quota-desktop";
/// The name of the action that a click on a notification triggers.
const CLICK: &str = "default";
/// The page that a click opens.
const ALERTS: &str = "/console/alerts";

struct Notifications {
    service: Proxy<'static>,
    /// The IDs of this app's notifications. The service also reports clicks on notifications of other apps.
    shown: HashSet<u32>,
}

/// `None` until the first notification, and after the session bus has closed the connection.
static NOTIFICATIONS: Mutex<Option<Notifications>> = Mutex::const_new(None);

/// Shows a notification about alerts, unless the window has focus. A click on the notification opens the alerts page.
#[tauri::command]
pub async fn notify(app: AppHandle, text: String) -> Result<(), CallError> {
    if text.is_empty() || text.len() > MAX_TEXT {
        return Err(CallError::Unreadable);
    }
    let window = app.get_webview_window(window::LABEL);
    if window.is_some_and(|it| it.is_focused().unwrap_or(false)) {
        return Ok(());
    }
    spawn(async move {
        if let Err(error) = show(app, &text).await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "cannot show a notification"
            );
        }
    });
    Ok(())
}

async fn show(app: AppHandle, text: &str) -> zbus::Result<()> {
    // Locked until the ID is stored, so that no click is handled before then.
    let mut notifications = NOTIFICATIONS.lock().await;
    let Notifications { service, shown } = match &mut *notifications {
        Some(it) => it,
        none => none.insert(connect(app).await?),
    };
    let capabilities: Vec<String> = service.call("GetCapabilities", &()).await?;
    let can = |name: &str| capabilities.iter().any(|it| it == name);
    let body = if can("body-markup") {
        escaped(text)
    } else {
        text.to_owned()
    };
    let actions: &[&str] = if can("actions") {
        &[CLICK, "View alerts"]
    } else {
        &[]
    };
    let hints = HashMap::from([("desktop-entry", Value::from(DESKTOP_ENTRY))]);
    let (replaces, default_timeout) = (0_u32, -1_i32);
    let notification = (
        "Quota",
        replaces,
        DESKTOP_ENTRY,
        TITLE,
        body,
        actions,
        hints,
        default_timeout,
    );
    shown.insert(service.call("Notify", &notification).await?);
    Ok(())
}

async fn connect(app: AppHandle) -> zbus::Result<Notifications> {
    let connection = connection::Builder::session()?
        .method_timeout(TIMEOUT)
        .build()
        .await?;
    let service = Proxy::new(&connection, SERVICE, PATH, SERVICE).await?;
    let signals = service.receive_all_signals().await?;
    spawn(handle_clicks(app, signals));
    Ok(Notifications {
        service,
        shown: HashSet::new(),
    })
}

/// Handles clicks until the connection is closed.
async fn handle_clicks(app: AppHandle, mut signals: SignalStream<'static>) {
    let mut token = None;
    while let Some(signal) = signals.next().await {
        // Ignores other signals, which have other arguments.
        let Ok((id, text)) = signal.body().deserialize::<(u32, String)>() else {
            continue;
        };
        let notifications = NOTIFICATIONS.lock().await;
        let shown = notifications.as_ref().map(|it| &it.shown);
        let is_own = shown.is_some_and(|shown| shown.contains(&id));
        drop(notifications);
        if !is_own {
            continue;
        }
        let header = signal.header();
        let is = |name: &str| header.member().is_some_and(|it| it.as_str() == name);
        if is("ActivationToken") {
            // This signal arrives before `ActionInvoked`.
            token = Some(text);
        } else if is("ActionInvoked") && text == CLICK {
            window::reveal(&app, ALERTS, token.take());
        }
    }
    *NOTIFICATIONS.lock().await = None;
}

/// Escapes characters that have a special meaning in the markup of notifications.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_contain_markup() {
        assert_eq!(escaped("<b>R&D</b>"), "&lt;b&gt;R&amp;D&lt;/b&gt;");
    }
}
