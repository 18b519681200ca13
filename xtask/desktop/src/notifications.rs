//! A stand-in for the desktop's notification service.

use std::{collections::HashMap, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use parking_lot::Mutex;
use zbus::{Connection, connection, interface, zvariant::OwnedValue};

use crate::world::until;

const NAME: &str = "org.freedesktop.Notifications";
const PATH: &str = "/org/freedesktop/Notifications";

/// A notification that the app has sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sent {
    pub app: String,
    pub replaces: u32,
    pub icon: String,
    pub title: String,
    pub body: String,
    /// The name of each action, followed by its label.
    pub actions: Vec<String>,
    pub desktop_entry: Option<String>,
    pub timeout: i32,
}

type All = Arc<Mutex<Vec<Sent>>>;

struct Service {
    capabilities: Vec<String>,
    all: All,
}

#[interface(name = "org.freedesktop.Notifications")]
impl Service {
    fn get_capabilities(&self) -> Vec<String> {
        self.capabilities.clone()
    }

    /// Returns the notification's ID: 1 for the first one.
    #[expect(clippy::too_many_arguments, reason = "defined by the specification")]
    fn notify(
        &self,
        app: String,
        replaces: u32,
        icon: String,
        title: String,
        body: String,
        actions: Vec<String>,
        mut hints: HashMap<String, OwnedValue>,
        timeout: i32,
    ) -> u32 {
        let desktop_entry = hints.remove("desktop-entry");
        let mut all = self.all.lock();
        all.push(Sent {
            app,
            replaces,
            icon,
            title,
            body,
            actions,
            desktop_entry: desktop_entry.and_then(|it| it.try_into().ok()),
            timeout,
        });
        u32::try_from(all.len()).unwrap_or(u32::MAX)
    }
}

pub struct Notifications {
    all: All,
    connection: Connection,
}

impl Notifications {
    /// Starts the service on a session bus.
    pub async fn start(bus: &str) -> Result<Self> {
        let all = All::default();
        let service = Service {
            capabilities: ["actions", "body", "body-markup"].map(Into::into).into(),
            all: Arc::clone(&all),
        };
        let connection = connection::Builder::address(bus)?
            .serve_at(PATH, service)?
            .name(NAME)?
            .build()
            .await?;
        Ok(Self { all, connection })
    }

    /// Returns all notifications, oldest first.
    pub fn all(&self) -> Vec<Sent> {
        self.all.lock().clone()
    }

    /// Waits for the first notification.
    pub async fn first(&self, timeout: Duration) -> Result<Sent> {
        until("a notification", timeout, async || {
            Ok(self.all().into_iter().next())
        })
        .await
    }

    /// Reports a click on a notification at the given time, according to the X server's clock.
    pub async fn click(&self, id: u32, at: u32) -> Result<()> {
        let token = format!("stand-in_TIME{at}");
        let everyone = None::<&str>;
        for (signal, text) in [("ActivationToken", &*token), ("ActionInvoked", "default")] {
            self.connection
                .emit_signal(everyone, PATH, NAME, signal, &(id, text))
                .await
                .context("cannot emit a signal")?;
        }
        Ok(())
    }
}
