//! Checks how new quota alerts are announced: by a toast in the window, and by a desktop notification if the user is
//! looking at another window.

use std::{
    io::{Write as _, read_to_string},
    net::TcpStream,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use crate::{
    app::App,
    notifications::{Notifications, Sent},
    world::{World, until},
};

const TIMEOUT: Duration = Duration::from_secs(20);
/// How long to wait for an alert. The server checks quotas every 5 seconds, and the console checks for alerts every
/// minute.
const ALERT_TIMEOUT: Duration = Duration::from_secs(120);
/// A pause that is long enough for a notification to arrive.
const SETTLE: Duration = Duration::from_secs(1);

const PLAN: &str = "Trial";
/// Notifications must not interpret this name as markup.
const KEY: &str = "Partner <b>R&D";

/// A key with a daily quota of 10 requests, and the service that receives the notifications.
pub struct Alerts {
    key: String,
    notifications: Notifications,
}

impl Alerts {
    /// Checks one alert without a notification service, and then another alert with such a service.
    pub async fn check(page: &App, world: &World, server: &str) -> Result<Self> {
        let key = create_key(page).await?;
        let display = world.display()?;
        display.unfocus().await?;
        send(server, &key, 5)?;
        until("a toast", ALERT_TIMEOUT, async || {
            page.text("has used 50% of its daily quota").await.map(Some)
        })
        .await?;
        until("a line in the log", TIMEOUT, async || {
            let is_logged = world.log().contains("cannot show a notification");
            Ok(is_logged.then_some(()))
        })
        .await?;
        let errors = "return document.querySelectorAll('.toast.error, .banner, .alert').length";
        ensure!(page.run(errors).await? == json!(0), "an error is shown");
        page.screenshot("alert-announced").await?;

        let notifications = Notifications::start(world.bus()).await?;
        send(server, &key, 3)?;
        let sent = notifications.first(ALERT_TIMEOUT).await?;
        let expected = Sent {
            app: "Quota".into(),
            replaces: 0,
            icon: "quota-desktop".into(),
            title: "Quota alert".into(),
            body: "\"\u{2068}Partner &lt;b&gt;R&amp;D\u{2069}\" has used 80% of its daily quota"
                .into(),
            actions: ["default", "View alerts"].map(Into::into).into(),
            desktop_entry: Some("quota-desktop".into()),
            timeout: -1,
        };
        ensure!(sent == expected, "{sent:?}");
        page.text("has used 80% of its daily quota").await?;
        // Simulates a click on another program's notification.
        notifications.click(2, display.time()?).await?;
        tokio::time::sleep(SETTLE).await;
        page.heading("API keys").await?;
        notifications.click(1, display.time()?).await?;
        page.heading("Alerts").await?;
        page.text("80%").await?;
        until("the alerts are seen", TIMEOUT, async || {
            let is_seen = "return document.hasFocus() && !document.querySelector('nav .badge')";
            Ok((page.run(is_seen).await? == json!(true)).then_some(()))
        })
        .await?;
        page.screenshot("alerts").await?;
        Ok(Self { key, notifications })
    }

    /// Uses up the quota.
    pub fn use_up(&self, server: &str) -> Result<()> {
        send(server, &self.key, 2)
    }

    /// Checks that the navigation counts the last alert, and that there was no notification for this alert.
    pub async fn is_only_counted(&self, page: &App) -> Result<()> {
        until("the number of new alerts", ALERT_TIMEOUT, async || {
            page.text("1 new").await.map(Some)
        })
        .await?;
        tokio::time::sleep(SETTLE).await;
        let all = self.notifications.all();
        ensure!(all.len() == 1, "{all:?}");
        Ok(())
    }
}

/// Deletes the key and its plan. After the key is deleted, the list of keys must still contain the key `other`.
pub async fn delete_key(page: &App, other: &str) -> Result<()> {
    page.follow("API keys").await?;
    page.follow(KEY).await?;
    page.press("Delete").await?;
    page.press("Delete key").await?;
    page.text(other).await?;
    page.follow("Plans").await?;
    page.press(&format!("More actions for {PLAN}")).await?;
    page.press("Delete").await?;
    page.press("Delete plan").await?;
    until("the plan is deleted", TIMEOUT, async || {
        let names = "return document.querySelector('main').innerText";
        let names = page.run(names).await?;
        let is_deleted = names.as_str().is_some_and(|it| !it.contains(PLAN));
        Ok(is_deleted.then_some(()))
    })
    .await
}

async fn create_key(page: &App) -> Result<String> {
    page.follow("Plans").await?;
    page.press("Create plan").await?;
    page.heading("Create plan").await?;
    page.fill("Name", PLAN).await?;
    page.fill("Requests per minute", "600").await?;
    page.fill("Daily quota", "10").await?;
    page.press("Create plan").await?;
    page.text(PLAN).await?;
    page.follow("API keys").await?;
    page.press("Create key").await?;
    page.fill("Name", KEY).await?;
    page.choose("#key_plan", &format!("{PLAN} (600/min)"))
        .await?;
    page.press("Create key").await?;
    let key = page.content("#secret").await?;
    page.press("Copy key").await?;
    page.text("Copied").await?;
    page.press("Done").await?;
    Ok(key)
}

/// Sends requests with a key. All of them must be allowed.
fn send(server: &str, key: &str, count: u32) -> Result<()> {
    let host = server
        .strip_prefix("http://")
        .context("not a local server")?;
    for _ in 0..count {
        let mut stream = TcpStream::connect(host)?;
        write!(
            stream,
            "GET /v1/echo HTTP/1.1\r\nHost: {host}\r\nX-API-Key: {key}\r\nConnection: close\r\n\r\n"
        )?;
        let response = read_to_string(stream)?;
        ensure!(response.starts_with("HTTP/1.1 200"), "{response}");
    }
    Ok(())
}
