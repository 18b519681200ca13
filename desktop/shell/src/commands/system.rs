//! System commands: the clipboard, and startup timing.

use parking_lot::Mutex;
use quota_common::ipc::CallError;

use crate::STARTED;

/// Kept until the app closes: on X11 and Wayland, copied text is available only while its owner runs.
static CLIPBOARD: Mutex<Option<arboard::Clipboard>> = Mutex::new(None);

/// Longer than anything the console copies.
const MAX_COPY: usize = 64 * 1024;

#[tauri::command]
pub async fn copy(text: String) -> Result<(), CallError> {
    if text.len() > MAX_COPY {
        return Err(CallError::Unreadable);
    }
    let mut clipboard = CLIPBOARD.lock();
    let copied = match &mut *clipboard {
        Some(it) => it.set_text(text),
        None => arboard::Clipboard::new().and_then(|it| clipboard.insert(it).set_text(text)),
    };
    copied.map_err(|error| {
        tracing::warn!(error = &error as &dyn std::error::Error, "cannot copy");
        CallError::Unreadable
    })
}

/// The page reports that it is usable.
#[tauri::command]
pub async fn ready() {
    let ms = STARTED
        .get()
        .map_or(0, |started| started.elapsed().as_millis());
    tracing::info!(
        ms = u64::try_from(ms).unwrap_or(u64::MAX),
        "first page painted"
    );
}
