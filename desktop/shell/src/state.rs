//! The app's servers, and a session for each server that has been used.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;
use quota_common::ipc::{CallError, HostStatus};

use crate::{
    client::Client,
    keychain::{Keychain, SystemKeychain},
    profile::Profiles,
    server::Server,
    session::Session,
};

pub struct App {
    pub profiles: Mutex<Profiles>,
    sessions: Mutex<HashMap<String, Arc<Session>>>,
    keychain: Arc<dyn Keychain>,
    /// The folder that contains the lock files.
    folder: PathBuf,
}

impl App {
    pub fn new(config: &Path, data: &Path) -> io::Result<Self> {
        fs::create_dir_all(data)?;
        Ok(Self {
            profiles: Mutex::new(Profiles::read(config.join("servers.json"))),
            sessions: Mutex::default(),
            keychain: Arc::new(SystemKeychain),
            folder: data.to_owned(),
        })
    }

    /// Returns the server in use.
    pub fn server(&self) -> Result<Server, CallError> {
        // Parsing does not fail, because the list contains only valid addresses.
        Server::parse(self.profiles.lock().current()).map_err(|_| CallError::Unreadable)
    }

    /// Returns the session with the server in use.
    pub fn session(&self) -> Result<Arc<Session>, CallError> {
        self.session_with(&self.server()?)
    }

    pub fn session_with(&self, server: &Server) -> Result<Arc<Session>, CallError> {
        let mut sessions = self.sessions.lock();
        if let Some(session) = sessions.get(&server.to_string()) {
            return Ok(Arc::clone(session));
        }
        let client = Client::new(server.clone()).map_err(|error| {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "cannot create the HTTP client"
            );
            CallError::Unreachable
        })?;
        let lock = self.folder.join(lock_name(server));
        let session = Arc::new(Session::new(client, Arc::clone(&self.keychain), lock));
        sessions.insert(server.to_string(), Arc::clone(&session));
        Ok(session)
    }

    pub async fn forget(&self, server: &Server) -> Result<(), CallError> {
        self.session_with(server)?.forget().await;
        self.sessions.lock().remove(&server.to_string());
        Ok(())
    }

    pub async fn host_status(&self) -> Result<HostStatus, CallError> {
        let session = self.session()?;
        session.probe_keychain().await;
        let profiles = self.profiles.lock();
        Ok(HostStatus {
            current: profiles.current().to_owned(),
            servers: profiles.all().to_vec(),
            keeps_sessions: session.has_keychain(),
        })
    }
}

fn lock_name(server: &Server) -> String {
    let name: String = server
        .to_string()
        .chars()
        .map(|it| if it.is_ascii_alphanumeric() { it } else { '-' })
        .collect();
    format!("{name}.lock")
}
