//! What the page wants of the computer.

use parking_lot::Mutex;
use quota_common::shell::Refusal;

use crate::BEGAN;

/// Kept as long as the app: on X11 and Wayland what was copied is there while its owner is.
static CLIPBOARD: Mutex<Option<arboard::Clipboard>> = Mutex::new(None);

/// Longer text is none of ours.
const LONGEST_COPY: usize = 64 * 1024;

#[tauri::command]
pub async fn copy(text: String) -> Result<(), Refusal> {
    if text.len() > LONGEST_COPY {
        return Err(Refusal::Unreadable);
    }
    let mut clipboard = CLIPBOARD.lock();
    let copied = match &mut *clipboard {
        Some(it) => it.set_text(text),
        None => arboard::Clipboard::new().and_then(|it| clipboard.insert(it).set_text(text)),
    };
    copied.map_err(|error| {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "nothing was copied"
        );
        Refusal::Unreadable
    })
}

/// The page says that a person can begin.
#[tauri::command]
pub async fn ready() {
    let ms = BEGAN.get().map_or(0, |began| began.elapsed().as_millis());
    tracing::info!(
        ms = u64::try_from(ms).unwrap_or(u64::MAX),
        "the first page is painted"
    );
}
