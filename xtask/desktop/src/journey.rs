//! What a new tenant does from signing up to watching a key run dry, in the desktop app; then where the tokens are.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use quota_testkit::proxy::{Fault, FaultProxy, Upstream};
use serde_json::json;

use crate::{
    app::App,
    scan,
    world::{World, until},
};

const PASSWORD: &str = "violet-harbour-quilt-93";
const PATIENCE: Duration = Duration::from_secs(20);

/// Another for each run, so that it can be repeated on one server.
fn email() -> String {
    format!("desktop-{}@example.com", std::process::id())
}

pub async fn run(app: &Path, server: &str, shots: Option<&Path>) -> Result<()> {
    let upstream = server.rsplit('/').next().context("an address")?;
    let upstream = upstream.replace("localhost", "127.0.0.1").parse()?;
    // The way to the server, to be cut.
    let proxy = FaultProxy::start(Upstream::Tcp(upstream)).await;
    let server = format!("http://{}", proxy.addr());
    let world = World::new(true)?;
    let page = App::start(&world, app, &server, shots).await?;
    let went = everything(&page, &world, &server, &proxy).await;
    if went.is_err() {
        let _ = page.show("failed").await;
        eprintln!("{}\n{}", page.all_text().await, world.log());
    }
    went?;
    page.close().await?;
    two_processes(&world, &server)
        .await
        .context("two processes")?;
    again(app, &world, &server)
        .await
        .context("the second start")?;
    let found = scan::files(world.folder.path())?;
    ensure!(found.0.is_empty(), "tokens in files: {:?}", found.0);
    without_keychain(app, &server, shots)
        .await
        .context("without a keychain")?;
    println!(
        "the journey through the desktop app went well; no token in {} files",
        found.1
    );
    Ok(())
}

async fn everything(page: &App, world: &World, server: &str, proxy: &FaultProxy) -> Result<()> {
    page.heading("Sign in").await?;
    page.show("sign-in").await?;
    page.follow("Create an account").await?;
    page.heading("Create an account").await?;
    page.fill("Email", &email()).await?;
    page.fill("Password", PASSWORD).await?;
    page.press("Create account").await?;
    page.heading("First steps").await?;
    page.show("home").await?;

    page.follow("Plans").await?;
    page.heading("No plans yet").await?;
    page.press("New plan").await?;
    page.heading("New plan").await?;
    page.fill("Name", "Starter").await?;
    page.fill("Requests a minute", "30").await?;
    page.fill("Burst", "5").await?;
    page.press("Make plan").await?;
    page.text("Starter").await?;

    page.follow("API keys").await?;
    page.heading("No keys yet").await?;
    page.press("New key").await?;
    page.fill("Name", "Mobile app").await?;
    page.choose("#key_plan", "Starter, 30 a minute").await?;
    page.press("Make key").await?;
    page.element("#key-text").await?;
    let text = page.content("#key-text").await?;
    ensure!(
        text.starts_with("qk_") && text.len() == 41,
        "a key's text: {text}"
    );
    page.press("Copy the key").await?;
    page.text("Copied").await?;
    page.press("Send until 429").await?;
    page.element(".status[data-status='429']").await?;
    page.element(".countdown").await?;
    page.show("key-text").await?;
    page.tick("I stored it").await?;
    page.press("Done").await?;

    page.follow("Mobile app").await?;
    page.heading("Mobile app").await?;
    page.press("Deactivate").await?;
    page.press("Deactivate key").await?;
    page.text("inactive").await?;
    sent(page, 401).await?;
    page.press("Activate").await?;
    sent(page, 200).await?;
    page.show("key").await?;

    where_tokens_are(page, world, server).await?;
    while_the_server_is_away(page, proxy)
        .await
        .context("while the server is away")?;

    page.follow("API keys").await?;
    page.follow("Mobile app").await?;
    page.press("Delete").await?;
    page.press("Delete key").await?;
    page.heading("No keys yet").await?;
    page.follow("Plans").await?;
    page.press("Delete Starter").await?;
    page.press("Delete plan").await?;
    page.heading("No plans yet").await?;

    page.follow("Settings").await?;
    page.heading("Servers").await?;
    page.text("Quota for the desktop").await?;
    page.show("settings").await?;
    page.fill("Address", "http://quota.example.com").await?;
    page.press("Add server").await?;
    page.text("for this computer alone").await?;
    Ok(())
}

/// Sends requests with the key until one is answered like that: a change is in force within a second.
async fn sent(page: &App, status: u16) -> Result<()> {
    until(&format!("an answer {status}"), PATIENCE, async || {
        page.press("Send 1").await?;
        let last = page.content(".status").await?;
        Ok(last.contains(&status.to_string()).then_some(()))
    })
    .await
}

async fn where_tokens_are(page: &App, world: &World, server: &str) -> Result<()> {
    let token = world.token(server)?;
    ensure!(
        scan::has_token(token.as_bytes()),
        "the keychain holds no refresh token"
    );

    // First that the search finds what is there: in a file, in the page, in memory.
    let planted = world.data().join("planted");
    std::fs::write(&planted, &token)?;
    let (found, _) = scan::files(&world.data())?;
    ensure!(found.len() == 1, "the search missed a file: {found:?}");
    std::fs::remove_file(&planted)?;
    page.run(&format!("window.planted = {{ deep: ['{token}'] }}"))
        .await?;
    let found = page.run_async(scan::GLOBALS).await?;
    ensure!(
        found["found"] == json!(["window.planted.deep.0"]),
        "the search missed what the page can reach: {found}"
    );
    // The engine remembers what a pattern last matched.
    page.run("delete window.planted; /x/.test('x')").await?;

    let (found, count) = scan::files(world.folder.path())?;
    ensure!(found.is_empty(), "tokens in files: {found:?}");
    ensure!(count > 5, "a profile has files");
    let found = page.run_async(scan::GLOBALS).await?;
    ensure!(
        found["found"] == json!([]) && found["databases"] == 0,
        "tokens in the page: {found}"
    );
    ensure!(
        found["objects"].as_u64() > Some(500),
        "a page has globals: {found}"
    );
    // `__TAURI__` would be every command at hand; only the bare way to ask is there.
    let globals = page
        .run("return [typeof window.__TAURI__, Object.isFrozen(Object.prototype)]")
        .await?;
    ensure!(globals == json!(["undefined", true]), "{globals}");
    nothing_else_is_allowed(page).await?;
    println!(
        "no token in the page ({} objects, {} texts) nor in {count} files",
        found["objects"], found["texts"]
    );
    Ok(())
}

/// A script in the page gets no further than our commands, nor to another address.
async fn nothing_else_is_allowed(page: &App) -> Result<()> {
    let script = r#"
        const done = arguments[0];
        const ask = (command, it) => window.__TAURI_INTERNALS__.invoke(command, it).then(() => "done", (error) => String(error));
        const fetched = fetch("http://127.0.0.1:9/").then(() => "done", (error) => String(error));
        const asked = ["plugin:window|close", "plugin:webview|create_webview_window", "plugin:opener|open_url", "plugin:event|listen", "no_such"];
        Promise.all([...asked.map((it) => ask(it, { url: "https://example.com" })), ask("call", { call: { get: "/etc" } }), fetched]).then(done);
    "#;
    let answers = page.run_async(script).await?;
    let answers = answers.as_array().context("a list")?;
    ensure!(
        answers.len() == 7 && answers.iter().all(|it| it != "done"),
        "{answers:?}"
    );
    let before = page.run("return location.href").await?;
    page.run("window.open('https://example.com/'); location.href = 'http://127.0.0.1:9/'")
        .await?;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let after = page.run("return location.href").await?;
    ensure!(before == after, "the page went to {after}");
    Ok(())
}

async fn while_the_server_is_away(page: &App, proxy: &FaultProxy) -> Result<()> {
    page.follow("Plans").await?;
    page.text("Starter").await?;
    proxy.set(Fault::Refuse);
    proxy.cut();
    page.follow("API keys").await?;
    page.text("The server cannot be reached").await?;
    // What was loaded before is there to read.
    page.text("Mobile app").await?;
    page.show("server-away").await?;
    page.follow("Plans").await?;
    page.text("Starter").await?;
    proxy.set(Fault::Pass);
    page.press("Try again").await?;
    let gone = "return !document.querySelector('.banner')";
    until("the banner goes", PATIENCE, async || {
        Ok((page.run(gone).await? == json!(true)).then_some(()))
    })
    .await
}

/// Two processes with the same session, renewing it at once.
async fn two_processes(world: &World, server: &str) -> Result<()> {
    let lock = world.data().join("renewing.lock");
    let mut both = Vec::new();
    for number in 0..2 {
        let mut command = world.command(&std::env::current_exe()?);
        command.args(["renew", server]).arg(&lock).arg("10");
        both.push(world.start(&command, &format!("renew-{number}.log"))?);
    }
    for (number, mut process) in both.into_iter().enumerate() {
        let ended = process.ends_within(Duration::from_secs(60)).await?;
        if !ended.is_some_and(|it| it.success()) {
            let log =
                std::fs::read_to_string(world.folder.path().join(format!("renew-{number}.log")));
            bail!("process {number}: {}", log.unwrap_or_default().trim());
        }
    }
    Ok(())
}

/// The app starts again and is signed in; then it signs out.
async fn again(app: &Path, world: &World, server: &str) -> Result<()> {
    let page = App::start(world, app, server, None).await?;
    page.heading("First steps").await?;
    in_memory(world).context("in memory")?;
    page.press("Sign out").await?;
    page.heading("Sign in").await?;
    let token = world.token(server);
    ensure!(token.is_err(), "the keychain still holds a token");
    page.close().await
}

/// The processes that show the page hold no token; the app itself does.
fn in_memory(world: &World) -> Result<()> {
    let mut looked = 0;
    for pid in scan::family(std::process::id().try_into()?) {
        let name = scan::name(pid);
        if name == "quota-desktop" {
            ensure!(
                scan::memory(pid)?,
                "the search missed the access token in the app's memory"
            );
            looked += 1;
        } else if name.starts_with("WebKitWebProces") || name.starts_with("WebKitNetworkP") {
            ensure!(!scan::memory(pid)?, "a token is in the memory of {name}");
            looked += 1;
        }
    }
    ensure!(
        looked >= 3,
        "the app, its page and its network are three processes: {}",
        world.folder.path().display()
    );
    Ok(())
}

/// Where there is no keychain the session lives as long as the app, which says so.
async fn without_keychain(app: &Path, server: &str, shots: Option<&Path>) -> Result<()> {
    let world = World::new(false)?;
    let page = App::start(&world, app, server, shots).await?;
    page.fill("Email", &email()).await?;
    page.fill("Password", PASSWORD).await?;
    page.press("Sign in").await?;
    page.heading("First steps").await?;
    page.text("keychain does not answer").await?;
    page.show("no-keychain").await?;
    let (found, _) = scan::files(world.folder.path())?;
    ensure!(found.is_empty(), "tokens in files: {found:?}");
    page.close().await?;
    let page = App::start(&world, app, server, None).await?;
    page.heading("Sign in").await?;
    page.close().await
}
