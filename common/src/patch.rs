//! Fields of PATCH bodies.

/// A field that a PATCH can clear. With `None`, the field was not sent and is unchanged. With `Some(None)`, it was sent
/// as `null` and is cleared. With `Some(Some(v))`, it becomes `v`.
///
/// Fields of this type need `#[serde(default, deserialize_with = "sent")]`, since serde reads `null` as "not sent" by
/// default.
pub type Patch<T> = Option<Option<T>>;

/// Deserializes a field that was sent. Without this function, serde would read `null` as "not sent", and silently
/// ignore a `null` for a field that cannot be cleared.
pub(crate) fn sent<'de, T, D>(deserializer: D) -> Result<Option<T>, D::Error>
where
    T: serde::Deserialize<'de>,
    D: serde::Deserializer<'de>,
{
    T::deserialize(deserializer).map(Some)
}

/// Whether a field was not sent, so that it is left out of JSON.
#[expect(
    clippy::ref_option,
    reason = "the signature that serde's `skip_serializing_if` has"
)]
pub(crate) fn unsent<T>(field: &Option<T>) -> bool {
    field.is_none()
}
