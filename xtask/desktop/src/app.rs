//! The app under WebKit's own driver, and its page as a person finds their way in it: by what is written there.

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

const PATIENCE: Duration = Duration::from_secs(20);

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
            bail!("an object is one");
        };
        let mut builder = ClientBuilder::new(HttpConnector::new());
        builder.capabilities(capabilities);
        let address = format!("http://127.0.0.1:{port}");
        let connect = until("the app", PATIENCE, async || {
            Ok(Some(builder.connect(&address).await?))
        });
        // The driver waits for ever for an app that ends at once.
        let page = tokio::time::timeout(2 * PATIENCE, connect).await;
        let page = page.context("the app did not begin")??;
        if let Some(shots) = shots {
            fs::create_dir_all(shots)?;
        }
        Ok(Self {
            page,
            driver,
            shots: shots.map(Path::to_owned),
        })
    }

    /// Closes the window and waits for the app's end: one that is started before that would only call the first.
    pub async fn close(self) -> Result<()> {
        self.page.close().await?;
        let driver = self.driver.pid().as_raw();
        until("the app's end", PATIENCE, async || {
            Ok((scan::family(driver).len() == 1).then_some(()))
        })
        .await
    }

    async fn shown(&self, what: &str) -> Result<Element> {
        until(what, PATIENCE, async || {
            for element in self.page.find_all(Locator::XPath(what)).await? {
                // The driver's own word for it says no of all there is.
                let is_shown = "return arguments[0].getClientRects().length > 0";
                let arguments = vec![serde_json::to_value(&element)?];
                if self.page.execute(is_shown, arguments).await? == json!(true) {
                    return Ok(Some(element));
                }
            }
            Ok(None)
        })
        .await
    }

    pub async fn heading(&self, text: &str) -> Result<()> {
        self.shown(&format!("//*[self::h1 or self::h2][{}]", is(text)))
            .await?;
        Ok(())
    }

    pub async fn text(&self, text: &str) -> Result<()> {
        self.shown(&format!("//*[text()[contains(., '{text}')]]"))
            .await?;
        Ok(())
    }

    /// What an element holds that a selector finds.
    pub async fn content(&self, selector: &str) -> Result<String> {
        until(selector, PATIENCE, async || {
            let element = self.page.find(Locator::Css(selector)).await?;
            Ok(element.prop("textContent").await?)
        })
        .await
    }

    /// Waits for an element that a selector finds.
    pub async fn element(&self, selector: &str) -> Result<()> {
        until(selector, PATIENCE, async || {
            self.page.find(Locator::Css(selector)).await?;
            Ok(Some(()))
        })
        .await
    }

    pub async fn press(&self, button: &str) -> Result<()> {
        let what = format!(
            "//button[({}) or @aria-label='{button}'][not(@disabled)]",
            is(button)
        );
        self.click(&what).await
    }

    pub async fn follow(&self, link: &str) -> Result<()> {
        self.click(&format!("//a[{}]", is(link))).await
    }

    async fn click(&self, what: &str) -> Result<()> {
        until(what, PATIENCE, async || {
            let element = self.shown(what).await?;
            let arguments = vec![serde_json::to_value(&element)?];
            if element.click().await.is_err() {
                // The driver does not find the middle of a link in a table.
                self.page.execute("arguments[0].click()", arguments).await?;
            }
            Ok(Some(()))
        })
        .await
    }

    /// The field, box or list of that label.
    async fn labelled(&self, label: &str) -> Result<Element> {
        let label = is(label);
        self.shown(&format!(
            "//*[@id=//label[{label}]/@for] | //label[{label}]//input"
        ))
        .await
    }

    pub async fn fill(&self, label: &str, text: &str) -> Result<()> {
        let field = self.labelled(label).await?;
        field.clear().await?;
        field.send_keys(text).await?;
        Ok(())
    }

    pub async fn tick(&self, label: &str) -> Result<()> {
        self.labelled(label).await?.click().await?;
        Ok(())
    }

    pub async fn choose(&self, selector: &str, option: &str) -> Result<()> {
        let list = self.page.find(Locator::Css(selector)).await?;
        until(option, PATIENCE, async || {
            list.select_by_label(option).await?;
            Ok(Some(()))
        })
        .await
    }

    /// What a script in the page returns.
    pub async fn run(&self, script: &str) -> Result<Value> {
        Ok(self.page.execute(script, Vec::new()).await?)
    }

    /// What a script in the page hands to `arguments[0]`.
    pub async fn run_async(&self, script: &str) -> Result<Value> {
        Ok(self.page.execute_async(script, Vec::new()).await?)
    }

    pub async fn show(&self, name: &str) -> Result<()> {
        let Some(shots) = &self.shots else {
            return Ok(());
        };
        self.run_async("const done = arguments[0]; const next = () => requestAnimationFrame(() => requestAnimationFrame(() => requestAnimationFrame(() => done()))); next()")
            .await?;
        let picture = self.page.screenshot().await?;
        let path = shots.join(format!("desktop-{name}.png"));
        fs::write(&path, picture).with_context(|| format!("cannot write {}", path.display()))
    }

    /// What is written on the page, for when something went wrong.
    pub async fn all_text(&self) -> String {
        let text = self
            .run("return location.href + '\\n' + document.body.innerText")
            .await;
        text.ok()
            .and_then(|it| it.as_str().map(str::to_owned))
            .unwrap_or_default()
    }
}

/// An element whose text that is, whatever is around words.
fn is(text: &str) -> String {
    format!("normalize-space(.)='{text}'")
}
