//! The list of servers and the server in use. They are stored in a file that contains addresses and names but no
//! secrets.
//!
//! If the file cannot be read, the app renames the file and starts with a new list. If the file cannot be written, the
//! app logs the error, and changes are lost when the app exits.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use quota_common::ipc::Profile;
use serde::{Deserialize, Serialize};

use crate::server::Server;

/// The address of a server with default settings.
pub const DEFAULT: &str = "http://localhost:8080";
const MAX_SERVERS: usize = 50;
const MAX_NAME: usize = 100;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct ProfileFile {
    current: String,
    servers: Vec<Profile>,
}

#[derive(Debug)]
pub struct Profiles {
    file: PathBuf,
    content: ProfileFile,
}

impl Profiles {
    pub fn read(file: PathBuf) -> Self {
        let content = match fs::read_to_string(&file) {
            Ok(text) => serde_json::from_str(&text).ok().and_then(sanitize),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "cannot read the list of servers"
                );
                None
            }
        };
        if content.is_none() && file.exists() {
            tracing::warn!("the list of servers is unreadable; starting a new one");
            let _ = fs::rename(&file, file.with_extension("invalid"));
        }
        let content = content.unwrap_or_else(|| ProfileFile {
            current: DEFAULT.to_owned(),
            servers: vec![Profile {
                address: DEFAULT.to_owned(),
                name: String::new(),
            }],
        });
        Self { file, content }
    }

    pub fn current(&self) -> &str {
        &self.content.current
    }

    pub fn all(&self) -> &[Profile] {
        &self.content.servers
    }

    pub fn has(&self, address: &str) -> bool {
        self.content.servers.iter().any(|it| it.address == address)
    }

    pub fn is_full(&self) -> bool {
        self.content.servers.len() >= MAX_SERVERS
    }

    /// Adds a server, or renames it if it is already in the list.
    pub fn add(&mut self, server: &Server, name: &str) {
        let address = server.to_string();
        let name: String = name.trim().chars().take(MAX_NAME).collect();
        match self
            .content
            .servers
            .iter_mut()
            .find(|it| it.address == address)
        {
            Some(it) => it.name = name,
            None => self.content.servers.push(Profile { address, name }),
        }
        self.write();
    }

    /// Selects a server. Returns `false` if the server is not in the list.
    pub fn select(&mut self, address: &str) -> bool {
        let known = self.has(address);
        if known && self.content.current != address {
            address.clone_into(&mut self.content.current);
            self.write();
        }
        known
    }

    /// Selects the server given on the command line. Adds the server to the list if necessary.
    pub fn add_and_select(&mut self, server: &Server) {
        let address = server.to_string();
        if !self.has(&address) {
            self.add(server, "");
        }
        self.select(&address);
    }

    /// Removes a server. If the list becomes empty, adds the default server.
    pub fn remove(&mut self, address: &str) {
        self.content.servers.retain(|it| it.address != address);
        if self.content.servers.is_empty() {
            self.content.servers.push(Profile {
                address: DEFAULT.to_owned(),
                name: String::new(),
            });
        }
        if self.content.current == address {
            self.content.current = self.content.servers[0].address.clone();
        }
        self.write();
    }

    fn write(&self) {
        if let Err(error) = self.try_write() {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "cannot write the list of servers"
            );
        }
    }

    /// Replaces the file atomically.
    fn try_write(&self) -> io::Result<()> {
        if let Some(folder) = self.file.parent() {
            fs::create_dir_all(folder)?;
        }
        let next: &Path = &self.file.with_extension("next");
        fs::write(next, serde_json::to_vec_pretty(&self.content)?)?;
        fs::rename(next, &self.file)
    }
}

/// Removes invalid addresses and excess servers. If the server in use is not in the list, uses the first server.
/// Returns `None` if no servers are left.
fn sanitize(mut content: ProfileFile) -> Option<ProfileFile> {
    content.servers.retain(|it| {
        Server::parse(&it.address).is_ok_and(|server| server.to_string() == it.address)
    });
    content.servers.truncate(MAX_SERVERS);
    let first = content.servers.first()?.address.clone();
    if !content
        .servers
        .iter()
        .any(|it| it.address == content.current)
    {
        content.current = first;
    }
    Some(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(text: &str) -> Server {
        Server::parse(text).expect("an address")
    }

    #[test]
    fn servers_survive_a_restart() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("below/servers.json");
        let mut profiles = Profiles::read(file.clone());
        assert_eq!(profiles.current(), DEFAULT);
        profiles.add(&server("https://quota.example.com"), " Production ");
        assert!(profiles.select("https://quota.example.com"));
        assert!(!profiles.select("https://other.example.com"));
        let again = Profiles::read(file.clone());
        assert_eq!(again.current(), "https://quota.example.com");
        assert_eq!(again.all()[1].name, "Production");
        profiles.remove("https://quota.example.com");
        profiles.remove(DEFAULT);
        let again = Profiles::read(file);
        assert_eq!(again.current(), DEFAULT);
        assert_eq!(again.all().len(), 1);
    }

    #[test]
    fn tampered_file_cannot_add_invalid_servers() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("servers.json");
        let text = r#"{"current": "http://evil.example", "servers": [
            {"address": "http://evil.example", "name": ""}, {"address": "https://good.example", "name": "x"}]}"#;
        fs::write(&file, text).expect("written");
        let profiles = Profiles::read(file.clone());
        assert_eq!(profiles.current(), "https://good.example");
        assert!(!profiles.has("http://evil.example"));
        fs::write(&file, "{").expect("written");
        assert_eq!(Profiles::read(file.clone()).current(), DEFAULT);
        assert!(file.with_extension("invalid").exists());
    }
}
