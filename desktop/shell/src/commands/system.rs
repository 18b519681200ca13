//! Commands for the clipboard, saving a file, reporting the startup time, and quitting.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
};

use parking_lot::Mutex;
use quota_common::ipc::CallError;
use tauri::{AppHandle, Manager as _};

use crate::STARTED;

/// The clipboard, which is kept until the app exits: on X11 and Wayland, copied text is available only while the
/// program that copied it is running.
static CLIPBOARD: Mutex<Option<arboard::Clipboard>> = Mutex::new(None);

/// The maximum length of a copied text, longer than any text that the console copies.
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

/// The maximum size of a saved file, far larger than any export.
const MAX_FILE: usize = 16 * 1024 * 1024;

/// Saves an export in the user's downloads folder, or in the home folder if the downloads folder is unknown. If a file
/// with this name exists, adds a number to the name. Returns the file's path.
#[tauri::command]
pub async fn save_file(app: AppHandle, name: String, text: String) -> Result<String, CallError> {
    let folder = app.path().download_dir().or_else(|_| app.path().home_dir());
    let saved = folder
        .map_err(std::io::Error::other)
        .and_then(|folder| save_new(&folder, &name, &text));
    match saved {
        Ok(path) => Ok(path.display().to_string()),
        Err(error) => {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "cannot save a file"
            );
            Err(CallError::Unreadable)
        }
    }
}

/// Saves a file in the folder and returns its path. Never overwrites a file, and never writes outside the folder.
fn save_new(folder: &Path, name: &str, text: &str) -> std::io::Result<PathBuf> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    let stem = name.strip_suffix(".csv").unwrap_or_default();
    if stem.is_empty() || stem.len() > 100 || !stem.chars().all(is_plain) || text.len() > MAX_FILE {
        return Err(std::io::ErrorKind::InvalidInput.into());
    }
    fs::create_dir_all(folder)?;
    for attempt in 1..1000 {
        let name = match attempt {
            1 => format!("{stem}.csv"),
            n => format!("{stem} ({n}).csv"),
        };
        let path = folder.join(name);
        match File::create_new(&path) {
            Ok(mut file) => return file.write_all(text.as_bytes()).map(|()| path),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(std::io::ErrorKind::AlreadyExists.into())
}

/// Logs the startup time. The console calls this command when its first page is ready for use.
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

/// Quits without asking the user.
#[tauri::command]
pub async fn quit(app: AppHandle) {
    app.exit(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn export_never_overwrites_a_file_or_leaves_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let first = save_new(folder.path(), "usage.csv", "a").unwrap();
        let second = save_new(folder.path(), "usage.csv", "b").unwrap();
        assert_eq!(fs::read_to_string(&first).unwrap(), "a");
        assert_eq!(fs::read_to_string(&second).unwrap(), "b");
        assert_eq!(second, folder.path().join("usage (2).csv"));
        for name in [
            "../usage.csv",
            "/tmp/usage.csv",
            ".csv",
            "usage.sh",
            "a/b.csv",
            ".bashrc",
            "usage",
        ] {
            assert!(save_new(folder.path(), name, "x").is_err(), "{name}");
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
