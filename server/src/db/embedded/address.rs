//! The address of the embedded PostgreSQL.

use std::{fmt::Write as _, path::Path};

/// The name of the server's role, and of its database.
pub(super) const NAME: &str = "quota";

/// The port, which is used only in the name of the socket file (`.s.PGSQL.5432`). PostgreSQL does not listen on a TCP
/// port.
pub(super) const PORT: &str = "5432";

pub(super) fn url(socket_dir: &Path, database: &str) -> String {
    let mut url = format!("postgres://{NAME}@");
    for &byte in socket_dir.as_os_str().as_encoded_bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            url.push(char::from(byte));
        } else {
            let _ = write!(url, "%{byte:02X}");
        }
    }
    let _ = write!(url, ":{PORT}/{database}");
    url
}

pub(super) async fn connect(url: &str) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}
