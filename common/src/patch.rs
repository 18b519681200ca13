/// A field of a PATCH body that can be cleared. `None` means that the field was not sent and remains unchanged.
/// `Some(None)` means that the field was sent as `null` and is cleared. `Some(Some(v))` means that the field is set to
/// `v`.
///
/// A field of this type needs `#[serde(default, deserialize_with = "sent")]`: by default, serde treats `null` like a
/// missing field.
pub type Patch<T> = Option<Option<T>>;

/// Deserializes a field that is present. Without this function, serde would treat `null` like a missing field, and
/// would silently ignore `null` for a field that cannot be cleared.
pub(crate) fn sent<'de, T, D>(deserializer: D) -> Result<Option<T>, D::Error>
where
    T: serde::Deserialize<'de>,
    D: serde::Deserializer<'de>,
{
    T::deserialize(deserializer).map(Some)
}

/// Returns whether to omit a field from JSON because it was not set.
#[expect(
    clippy::ref_option,
    reason = "the signature that serde's `skip_serializing_if` has"
)]
pub(crate) fn unsent<T>(field: &Option<T>) -> bool {
    field.is_none()
}
