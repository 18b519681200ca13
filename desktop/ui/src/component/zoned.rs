//! Converts times to a time zone. Only the browser has the required time zone data.

use std::{cell::RefCell, collections::BTreeMap};

use wasm_bindgen::{JsCast, JsValue};

use crate::model::zoned::LocalTime;

thread_local! {
    /// One formatter per time zone, because creating a formatter is slow.
    static FORMATTERS: RefCell<BTreeMap<String, Option<js_sys::Intl::DateTimeFormat>>> = const { RefCell::new(BTreeMap::new()) };
}

/// Creates a formatter. Returns `None` if the browser does not know the time zone.
fn formatter(zone: &str) -> Option<js_sys::Intl::DateTimeFormat> {
    let options = js_sys::Object::new();
    for (name, value) in [
        ("timeZone", zone),
        ("hourCycle", "h23"),
        ("weekday", "short"),
        ("year", "numeric"),
        ("month", "numeric"),
        ("day", "numeric"),
        ("hour", "2-digit"),
        ("minute", "2-digit"),
        ("timeZoneName", "short"),
    ] {
        let _ = js_sys::Reflect::set(&options, &name.into(), &value.into());
    }
    let intl = js_sys::Reflect::get(&js_sys::global(), &"Intl".into()).ok()?;
    let class = js_sys::Reflect::get(&intl, &"DateTimeFormat".into()).ok()?;
    let class: &js_sys::Function = class.dyn_ref()?;
    let arguments = js_sys::Array::of2(&"en-GB".into(), &options);
    // If the time zone is unknown, `construct` returns an error, but `DateTimeFormat::new` would throw an exception.
    let made = js_sys::Reflect::construct(class, &arguments).ok()?;
    Some(made.unchecked_into())
}

/// Converts `at`, in milliseconds since the Unix epoch, to local time. Uses UTC if the browser does not know the time
/// zone.
pub fn local_time(at: i64, zone: &str) -> Option<LocalTime> {
    FORMATTERS.with_borrow_mut(|all| {
        let mut format = |zone: &str| -> Option<LocalTime> {
            let formatter = all
                .entry(zone.to_owned())
                .or_insert_with(|| formatter(zone))
                .as_ref()?;
            #[expect(
                clippy::cast_precision_loss,
                reason = "milliseconds since the Unix epoch are exact in a double"
            )]
            let date = js_sys::Date::new(&JsValue::from_f64(at as f64));
            let text = formatter.format().call1(&JsValue::UNDEFINED, &date).ok()?;
            LocalTime::read(&text.as_string()?)
        };
        format(zone).or_else(|| format("UTC"))
    })
}

pub fn browser_time_zone() -> String {
    let options = js_sys::Intl::DateTimeFormat::default().resolved_options();
    js_sys::Reflect::get(&options, &"timeZone".into())
        .ok()
        .and_then(|zone| zone.as_string())
        .unwrap_or_else(|| "UTC".to_owned())
}
