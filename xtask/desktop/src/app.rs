//! Drives the app through WebKit's driver, finding elements by their visible text.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use fantoccini::{Client, ClientBuilder, Locator, elements::Element};
use hyper_util::client::legacy::connect::HttpConnector;
use quota_testkit::Process;
use serde_json::{Value, json};

use crate::{
    scan,
    world::{World, until},
};

const TIMEOUT: Duration = Duration::from_secs(20);

pub struct App {
    page: Client,
    driver: Process,
    shots: Option<PathBuf>,
}

impl App {
    pub async fn start(
        world: &World,
        app: &Path,
        server: &str,
        shots: Option<&Path>,
    ) -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut command = world.command(Path::new("WebKitWebDriver"));
        command
            .arg("--host=127.0.0.1")
            .arg(format!("--port={port}"))
            .env("TAURI_AUTOMATION", "true")
            .env("TAURI_WEBVIEW_AUTOMATION", "true");
        let driver = world.start(&command, "driver.log")?;
        let capabilities =
            json!({"webkitgtk:browserOptions": {"binary": app, "args": ["--server", server]}});
        let Value::Object(capabilities) = capabilities else {
            bail!("the capabilities are not an object");
        };
        let mut builder = ClientBuilder::new(HttpConnector::new());
        builder.capabilities(capabilities);
        let address = format!("http://127.0.0.1:{port}");
        let connect = until("the app", TIMEOUT, async || {
            Ok(Some(builder.connect(&address).await?))
        });
        // The driver hangs if the app exits immediately.
        let page = tokio::time::timeout(2 * TIMEOUT, connect).await;
        let page = page.context("the app did not start")??;
        if let Some(shots) = shots {
            fs::create_dir_all(shots)?;
        }
        Ok(Self {
            page,
            driver,
            shots: shots.map(Path::to_owned),
        })
    }

    /// Closes the window and waits until the app has exited. Until then, starting the app again would only notify this
    /// instance.
    pub async fn close(self) -> Result<()> {
        self.page.clone().close().await?;
        self.exits().await
    }

    /// Waits until the app has exited.
    pub async fn exits(self) -> Result<()> {
        let driver = self.driver.pid().as_raw();
        until("the app exits", TIMEOUT, async || {
            Ok((scan::process_tree(driver).len() == 1).then_some(()))
        })
        .await
    }

    async fn visible(&self, what: &str) -> Result<Element> {
        until(what, TIMEOUT, async || {
            for element in self.page.find_all(Locator::XPath(what)).await? {
                // The driver's own visibility check reports everything as hidden.
                let is_visible = "return arguments[0].getClientRects().length > 0";
                let arguments = vec![serde_json::to_value(&element)?];
                if self.page.execute(is_visible, arguments).await? == json!(true) {
                    return Ok(Some(element));
                }
            }
            Ok(None)
        })
        .await
    }

    pub async fn heading(&self, text: &str) -> Result<()> {
        self.visible(&format!("//*[self::h1 or self::h2][{}]", has_text(text)))
            .await?;
        Ok(())
    }

    pub async fn text(&self, text: &str) -> Result<()> {
        self.visible(&format!("//*[text()[contains(., \"{text}\")]]"))
            .await?;
        Ok(())
    }

    /// Returns the text content of the element that a selector matches.
    pub async fn content(&self, selector: &str) -> Result<String> {
        until(selector, TIMEOUT, async || {
            let element = self.page.find(Locator::Css(selector)).await?;
            Ok(element.prop("textContent").await?)
        })
        .await
    }

    /// Waits for an element that a selector matches.
    pub async fn element(&self, selector: &str) -> Result<()> {
        until(selector, TIMEOUT, async || {
            self.page.find(Locator::Css(selector)).await?;
            Ok(Some(()))
        })
        .await
    }

    /// Clicks a button. Ignores buttons outside an open dialog, because the dialog makes them inert.
    pub async fn press(&self, button: &str) -> Result<()> {
        let what = format!(
            "//button[({}) or @aria-label=\"{button}\"][not(@disabled)][ancestor::dialog[@open] or not(//dialog[@open])]",
            has_text(button)
        );
        self.click(&what).await
    }

    pub async fn follow(&self, link: &str) -> Result<()> {
        self.click(&format!("//a[{}]", has_text(link))).await
    }

    async fn click(&self, what: &str) -> Result<()> {
        until(what, TIMEOUT, async || {
            let element = self.visible(what).await?;
            let arguments = vec![serde_json::to_value(&element)?];
            if element.click().await.is_err() {
                // The driver cannot locate the center of a link in a table.
                self.page.execute("arguments[0].click()", arguments).await?;
            }
            Ok(Some(()))
        })
        .await
    }

    /// Returns the input, checkbox or select with a label.
    async fn labeled(&self, label: &str) -> Result<Element> {
        let label = has_text(label);
        self.visible(&format!(
            "//*[@id=//label[{label}]/@for] | //label[{label}]//input"
        ))
        .await
    }

    pub async fn fill(&self, label: &str, text: &str) -> Result<()> {
        let field = self.labeled(label).await?;
        field.clear().await?;
        field.send_keys(text).await?;
        Ok(())
    }

    pub async fn choose(&self, selector: &str, option: &str) -> Result<()> {
        let list = self.page.find(Locator::Css(selector)).await?;
        until(option, TIMEOUT, async || {
            list.select_by_label(option).await?;
            Ok(Some(()))
        })
        .await
    }

    /// Runs a script in the page and returns its result.
    pub async fn run(&self, script: &str) -> Result<Value> {
        Ok(self.page.execute(script, Vec::new()).await?)
    }

    /// Runs a script in the page and returns the value that it passes to `arguments[0]`.
    pub async fn run_async(&self, script: &str) -> Result<Value> {
        Ok(self.page.execute_async(script, Vec::new()).await?)
    }

    pub async fn screenshot(&self, name: &str) -> Result<()> {
        let Some(shots) = &self.shots else {
            return Ok(());
        };
        self.run_async("const done = arguments[0]; const next = () => requestAnimationFrame(() => requestAnimationFrame(() => requestAnimationFrame(() => done()))); next()")
            .await?;
        let picture = self.page.screenshot().await?;
        let path = shots.join(format!("desktop-{name}.png"));
        fs::write(&path, picture).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Returns the text of the page, for diagnostics.
    pub async fn all_text(&self) -> String {
        let text = self
            .run("return location.href + '\\n' + document.body.innerText")
            .await;
        text.ok()
            .and_then(|it| it.as_str().map(str::to_owned))
            .unwrap_or_default()
    }
}

/// Returns an XPath condition for an element's text, ignoring whitespace around words.
fn has_text(text: &str) -> String {
    format!("normalize-space(.)=\"{text}\"")
}
