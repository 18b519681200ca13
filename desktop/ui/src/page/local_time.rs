//! Values of `datetime-local` inputs, which use the browser's time zone.

use quota_common::Timestamp;

use crate::component::browser_time_zone;

/// Returns the hint below the field for a key's expiration time.
pub fn expiry_hint() -> String {
    format!(
        "When the key stops working, in your time zone ({}). Leave blank if it shouldn't expire.",
        browser_time_zone()
    )
}

/// Parses the value of an input. Returns `None` if the value is empty or invalid.
pub fn parse(text: &str) -> Option<Timestamp> {
    if text.is_empty() {
        return None;
    }
    let iso = js_sys::Date::new(&text.into())
        .to_iso_string()
        .as_string()?;
    iso.parse().ok()
}

/// Returns a time as the value of an input, truncated to the minute.
pub fn format(at: Timestamp) -> String {
    let date = js_sys::Date::new_0();
    #[expect(
        clippy::cast_precision_loss,
        reason = "milliseconds since the Unix epoch are exact in a double"
    )]
    date.set_time(at.inner().timestamp_millis() as f64);
    let local = date.get_time() - date.get_timezone_offset() * 60_000.0;
    date.set_time(local);
    let iso = date.to_iso_string().as_string().unwrap_or_default();
    iso.get(..16).unwrap_or_default().to_owned()
}
