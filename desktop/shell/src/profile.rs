//! The servers that a person has added, and which one is in use: addresses and names in a file, never a secret.
//!
//! A file that cannot be read is set aside and the list begins anew; one that cannot be written is said in the log,
//! and the list lives as long as the app.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use quota_common::shell::Profile;
use serde::{Deserialize, Serialize};

use crate::server::Server;

/// Where a server listens that was started with its defaults.
pub const DEFAULT: &str = "http://localhost:8080";
const MOST: usize = 50;
const LONGEST_NAME: usize = 100;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    current: String,
    servers: Vec<Profile>,
}

#[derive(Debug)]
pub struct Profiles {
    file: PathBuf,
    kept: Kept,
}

impl Profiles {
    pub fn read(file: PathBuf) -> Self {
        let kept = match fs::read_to_string(&file) {
            Ok(text) => serde_json::from_str(&text).ok().and_then(sound),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "the list of servers"
                );
                None
            }
        };
        if kept.is_none() && file.exists() {
            tracing::warn!("the list of servers cannot be read and is set aside");
            let _ = fs::rename(&file, file.with_extension("unread"));
        }
        let kept = kept.unwrap_or_else(|| Kept {
            current: DEFAULT.to_owned(),
            servers: vec![Profile {
                address: DEFAULT.to_owned(),
                name: String::new(),
            }],
        });
        Self { file, kept }
    }

    pub fn current(&self) -> &str {
        &self.kept.current
    }

    pub fn all(&self) -> &[Profile] {
        &self.kept.servers
    }

    pub fn has(&self, address: &str) -> bool {
        self.kept.servers.iter().any(|it| it.address == address)
    }

    pub fn is_full(&self) -> bool {
        self.kept.servers.len() >= MOST
    }

    /// Adds it, or gives it another name.
    pub fn add(&mut self, server: &Server, name: &str) {
        let address = server.to_string();
        let name: String = name.trim().chars().take(LONGEST_NAME).collect();
        match self
            .kept
            .servers
            .iter_mut()
            .find(|it| it.address == address)
        {
            Some(it) => it.name = name,
            None => self.kept.servers.push(Profile { address, name }),
        }
        self.write();
    }

    /// Whether there is one of that address.
    pub fn choose(&mut self, address: &str) -> bool {
        let known = self.has(address);
        if known && self.kept.current != address {
            address.clone_into(&mut self.kept.current);
            self.write();
        }
        known
    }

    /// For one who names a server on starting the app.
    pub fn add_and_choose(&mut self, server: &Server) {
        let address = server.to_string();
        if !self.has(&address) {
            self.add(server, "");
        }
        self.choose(&address);
    }

    /// Without the last one there is the default again.
    pub fn remove(&mut self, address: &str) {
        self.kept.servers.retain(|it| it.address != address);
        if self.kept.servers.is_empty() {
            self.kept.servers.push(Profile {
                address: DEFAULT.to_owned(),
                name: String::new(),
            });
        }
        if self.kept.current == address {
            self.kept.current = self.kept.servers[0].address.clone();
        }
        self.write();
    }

    fn write(&self) {
        if let Err(error) = self.try_write() {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the list of servers cannot be written"
            );
        }
    }

    /// Whole or not at all.
    fn try_write(&self) -> io::Result<()> {
        if let Some(folder) = self.file.parent() {
            fs::create_dir_all(folder)?;
        }
        let next: &Path = &self.file.with_extension("next");
        fs::write(next, serde_json::to_vec_pretty(&self.kept)?)?;
        fs::rename(next, &self.file)
    }
}

/// Whoever wrote the file: only addresses that may be asked, and one of them in use.
fn sound(mut kept: Kept) -> Option<Kept> {
    kept.servers.retain(|it| {
        Server::parse(&it.address).is_ok_and(|server| server.to_string() == it.address)
    });
    kept.servers.truncate(MOST);
    let first = kept.servers.first()?.address.clone();
    if !kept.servers.iter().any(|it| it.address == kept.current) {
        kept.current = first;
    }
    Some(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(text: &str) -> Server {
        Server::parse(text).expect("an address")
    }

    #[test]
    fn what_was_added_is_there_after_a_restart() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("below/servers.json");
        let mut profiles = Profiles::read(file.clone());
        assert_eq!(profiles.current(), DEFAULT);
        profiles.add(&server("https://quota.example.com"), " Production ");
        assert!(profiles.choose("https://quota.example.com"));
        assert!(!profiles.choose("https://other.example.com"));
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
    fn a_file_that_others_wrote_does_not_lead_astray() {
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
        assert!(file.with_extension("unread").exists());
    }
}
