//! The three states of a field in a PATCH.

/// `None`: the field was not sent and stays as it is. `Some(None)`: it was sent as `null` and is cleared.
/// `Some(Some(v))`: it becomes `v`.
///
/// Fields of this type need `#[serde(default, deserialize_with = "sent")]`, since serde alone reads
/// `null` as "not sent".
pub type Patch<T> = Option<Option<T>>;

/// Reads a field that was sent. Without it serde would take `null` for "not sent" everywhere, and a `null` for
/// what cannot be cleared would be ignored in silence.
pub(crate) fn sent<'de, T, D>(deserializer: D) -> Result<Option<T>, D::Error>
where
    T: serde::Deserialize<'de>,
    D: serde::Deserializer<'de>,
{
    T::deserialize(deserializer).map(Some)
}
