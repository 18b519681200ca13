//! What the app knows while it runs: its servers, and a session for each that was used.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;
use quota_common::shell::{Refusal, Standing};

use crate::{
    client::Client,
    keychain::{Keychain, OfSystem},
    profile::Profiles,
    server::Server,
    session::Session,
};

pub struct App {
    pub profiles: Mutex<Profiles>,
    sessions: Mutex<HashMap<String, Arc<Session>>>,
    keychain: Arc<dyn Keychain>,
    /// For files that are locked and hold nothing.
    folder: PathBuf,
}

impl App {
    pub fn new(config: &Path, data: &Path) -> io::Result<Self> {
        fs::create_dir_all(data)?;
        Ok(Self {
            profiles: Mutex::new(Profiles::read(config.join("servers.json"))),
            sessions: Mutex::default(),
            keychain: Arc::new(OfSystem),
            folder: data.to_owned(),
        })
    }

    /// The server in use.
    pub fn server(&self) -> Result<Server, Refusal> {
        // What is in the list was parsed before it got there.
        Server::parse(self.profiles.lock().current()).map_err(|_| Refusal::Unreadable)
    }

    /// The session with the server in use.
    pub fn session(&self) -> Result<Arc<Session>, Refusal> {
        self.session_with(&self.server()?)
    }

    pub fn session_with(&self, server: &Server) -> Result<Arc<Session>, Refusal> {
        let mut sessions = self.sessions.lock();
        if let Some(session) = sessions.get(&server.to_string()) {
            return Ok(Arc::clone(session));
        }
        let client = Client::new(server.clone()).map_err(|error| {
            tracing::error!(error = &error as &dyn std::error::Error, "no client");
            Refusal::Unreachable
        })?;
        let lock = self.folder.join(lock_name(server));
        let session = Arc::new(Session::new(client, Arc::clone(&self.keychain), lock));
        sessions.insert(server.to_string(), Arc::clone(&session));
        Ok(session)
    }

    /// Ends the session with a server, if there is one.
    pub async fn forget(&self, server: &Server) -> Result<(), Refusal> {
        self.session_with(server)?.forget().await;
        self.sessions.lock().remove(&server.to_string());
        Ok(())
    }

    pub async fn standing(&self) -> Result<Standing, Refusal> {
        let session = self.session()?;
        session.look().await;
        let profiles = self.profiles.lock();
        Ok(Standing {
            current: profiles.current().to_owned(),
            servers: profiles.all().to_vec(),
            keeps_sessions: session.keeps(),
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
