//! The main user journey in the desktop app, from registering to using up a key's limit, and a search for leaked
//! tokens.

use std::{io::Write as _, net::TcpStream, path::Path, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use quota_testkit::proxy::{Fault, FaultProxy, Upstream};
use serde_json::json;

use crate::{
    alerts::{self, Alerts},
    app::App,
    scan,
    world::{World, until},
    x11,
};

/// The title of the app's window.
const TITLE: &str = "Quota";
const PASSWORD: &str = "violet-harbour-quilt-93";
const TIMEOUT: Duration = Duration::from_secs(20);

/// Returns an email address that is unique per run, so that the journey can be repeated on the same server.
fn email() -> String {
    format!("desktop-{}@example.com", std::process::id())
}

pub async fn run(app: &Path, server: &str, shots: Option<&Path>) -> Result<()> {
    let upstream = server
        .rsplit('/')
        .next()
        .context("the server has no address")?;
    let upstream = upstream.replace("localhost", "127.0.0.1").parse()?;
    // The app connects to the server through a proxy, so that the journey can interrupt the connection.
    let proxy = FaultProxy::start(Upstream::Tcp(upstream)).await;
    let server = format!("http://{}", proxy.addr());
    let world = World::new(true)?;
    let page = App::start(&world, app, &server, shots).await?;
    let result = main_journey(&page, &world, &server, &proxy).await;
    if result.is_err() {
        let _ = page.screenshot("failed").await;
        eprintln!("{}\n{}", page.all_text().await, world.log());
    }
    let alerts = result?;
    page.close().await?;
    two_processes(&world, &server)
        .await
        .context("two processes")?;
    second_start(app, &world, &server, &alerts)
        .await
        .context("the second start")?;
    let found = scan::files(world.folder.path())?;
    ensure!(found.0.is_empty(), "tokens in files: {:?}", found.0);
    without_keychain(app, &server, shots)
        .await
        .context("without a keychain")?;
    println!("desktop app: passed; no tokens in {} files", found.1);
    Ok(())
}

async fn main_journey(
    page: &App,
    world: &World,
    server: &str,
    proxy: &FaultProxy,
) -> Result<Alerts> {
    page.heading("Sign in").await?;
    page.screenshot("sign-in").await?;
    page.follow("Create an account").await?;
    page.heading("Create an account").await?;
    page.fill("Email", &email()).await?;
    page.fill("Password", PASSWORD).await?;
    page.press("Create account").await?;
    page.heading("Get started").await?;
    page.screenshot("home").await?;

    page.follow("Plans").await?;
    page.heading("No plans yet").await?;
    page.press("Create plan").await?;
    page.heading("Create plan").await?;
    page.fill("Name", "Starter").await?;
    // At this rate, the countdown after a rejected request takes up to 12 seconds.
    page.fill("Requests per minute", "5").await?;
    page.fill("Burst", "5").await?;
    page.press("Create plan").await?;
    page.text("Starter").await?;

    page.follow("API keys").await?;
    page.heading("No keys yet").await?;
    page.press("Create key").await?;
    page.fill("Name", "Mobile app").await?;
    page.choose("#key_plan", "Starter (5/min)").await?;
    page.press("Create key").await?;
    page.element("#secret").await?;
    let key = page.content("#secret").await?;
    ensure!(
        key.starts_with("qk_") && key.len() == 41,
        "not an API key: {key}"
    );
    asks_before_quitting(page, world)
        .await
        .context("with a key that is not saved")?;
    page.press("Copy key").await?;
    page.text("Copied").await?;
    page.press("Send until 429").await?;
    page.element(".status[data-status='429']").await?;
    page.element(".countdown").await?;
    page.screenshot("key-secret").await?;
    // Copying the key counts as saving it, so the app does not ask for confirmation.
    page.press("Done").await?;

    page.follow("Mobile app").await?;
    page.heading("Mobile app").await?;
    page.press("Deactivate").await?;
    page.press("Deactivate key").await?;
    page.text("Inactive").await?;
    send_until(page, 401).await?;
    page.press("Activate").await?;
    send_until(page, 200).await?;
    page.screenshot("key").await?;

    search_for_tokens(page, world, server).await?;
    with_server_unreachable(page, proxy)
        .await
        .context("with the server unreachable")?;
    live_tail(page, proxy).await.context("live tail")?;

    let alerts = Alerts::check(page, world, server).await.context("alerts")?;
    // The alert about this usage is created during the next steps, while the window has focus.
    alerts.use_up(server)?;
    page.follow("Webhooks").await?;
    page.heading("No webhooks yet").await?;
    page.screenshot("webhooks").await?;
    billing(page, world).await.context("billing")?;
    alerts
        .is_only_counted(page)
        .await
        .context("in the window")?;
    alerts::delete_key(page, "Mobile app").await?;

    page.follow("API keys").await?;
    page.follow("Mobile app").await?;
    page.press("Delete").await?;
    page.press("Delete key").await?;
    page.heading("No keys yet").await?;
    page.follow("Plans").await?;
    page.press("More actions for Starter").await?;
    page.press("Delete").await?;
    page.press("Delete plan").await?;
    page.heading("No plans yet").await?;

    page.follow("Settings").await?;
    page.heading("Servers").await?;
    page.text("Quota desktop app").await?;
    page.screenshot("settings").await?;
    page.fill("Address", "http://quota.example.com").await?;
    page.press("Add server").await?;
    page.text("is only allowed for localhost").await?;
    Ok(alerts)
}

/// Sends requests with the key until a response has this status. A change can take a second to take effect, and the
/// burst takes longer to refill.
async fn send_until(page: &App, status: u16) -> Result<()> {
    until(&format!("status {status}"), 3 * TIMEOUT, async || {
        page.press("Send 1").await?;
        // Another request must not be sent before the response is on the page, because it would replace that response.
        let is_sent = "return !document.querySelector('.try [aria-disabled=true]')";
        until("the response", TIMEOUT, async || {
            Ok((page.run(is_sent).await? == json!(true)).then_some(()))
        })
        .await?;
        let last = page.content(".status").await?;
        Ok(last.contains(&status.to_string()).then_some(()))
    })
    .await
}

async fn search_for_tokens(page: &App, world: &World, server: &str) -> Result<()> {
    let token = world.token(server)?;
    ensure!(
        scan::has_token(token.as_bytes()),
        "the keychain contains no refresh token"
    );

    // First make sure that the search finds planted tokens.
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
    // Match another string, because the JavaScript engine remembers the last string that a regular expression matched.
    page.run("delete window.planted; /x/.test('x')").await?;

    let (found, count) = scan::files(world.folder.path())?;
    ensure!(found.is_empty(), "tokens in files: {found:?}");
    ensure!(count > 5, "too few files searched: {count}");
    let found = page.run_async(scan::GLOBALS).await?;
    ensure!(
        found["found"] == json!([]) && found["databases"] == 0,
        "tokens in the page: {found}"
    );
    ensure!(
        found["objects"].as_u64() > Some(500),
        "a page has globals: {found}"
    );
    // `__TAURI__` would expose every command; only the low-level interface is available.
    let globals = page
        .run("return [typeof window.__TAURI__, Object.isFrozen(Object.prototype)]")
        .await?;
    ensure!(globals == json!(["undefined", true]), "{globals}");
    other_commands_are_denied(page).await?;
    println!(
        "no token in the page ({} objects, {} strings) or in {count} files",
        found["objects"], found["texts"]
    );
    Ok(())
}

/// Checks that a script in the page can call only the app's commands, and cannot reach another address.
async fn other_commands_are_denied(page: &App) -> Result<()> {
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
    ensure!(before == after, "the page navigated to {after}");
    Ok(())
}

async fn with_server_unreachable(page: &App, proxy: &FaultProxy) -> Result<()> {
    page.follow("Plans").await?;
    page.text("Starter").await?;
    proxy.set(Fault::Refuse);
    proxy.cut();
    page.follow("API keys").await?;
    page.text("Can't reach the server").await?;
    // Data loaded earlier remains readable.
    page.text("Mobile app").await?;
    page.screenshot("server-unreachable").await?;
    page.follow("Plans").await?;
    page.text("Starter").await?;
    proxy.set(Fault::Pass);
    page.press("Retry").await?;
    let is_hidden = "return !document.querySelector('.banner')";
    until("the banner disappears", TIMEOUT, async || {
        Ok((page.run(is_hidden).await? == json!(true)).then_some(()))
    })
    .await
}

/// Checks that the live tail shows that the server is unreachable, even though the app returns stored decisions in the
/// meantime.
async fn live_tail(page: &App, proxy: &FaultProxy) -> Result<()> {
    page.follow("Usage").await?;
    page.press("Open live tail").await?;
    let status = async |expected: &str| {
        until(expected, TIMEOUT, async || {
            let is_expected = page.content(".tail-status .badge").await? == expected;
            Ok(is_expected.then_some(()))
        })
        .await
    };
    status("Live").await?;
    let rows = page.content(".tail-list").await?;
    ensure!(rows.contains("Mobile app"), "{rows}");
    page.screenshot("live-tail").await?;
    proxy.set(Fault::Refuse);
    proxy.cut();
    status("Reconnecting…").await?;
    ensure!(
        page.content(".tail-list").await? == rows,
        "the decisions are gone"
    );
    page.screenshot("live-tail-unreachable").await?;
    proxy.set(Fault::Pass);
    status("Live").await?;
    page.press("Close").await
}

/// Checks that two processes can refresh the same session concurrently.
async fn two_processes(world: &World, server: &str) -> Result<()> {
    let lock = world.data().join("refresh.lock");
    let mut both = Vec::new();
    for number in 0..2 {
        let mut command = world.command(&std::env::current_exe()?);
        command.args(["refresh", server]).arg(&lock).arg("10");
        both.push(world.start(&command, &format!("refresh-{number}.log"))?);
    }
    for (number, mut process) in both.into_iter().enumerate() {
        let ended = process.ends_within(Duration::from_secs(60)).await?;
        if !ended.is_some_and(|it| it.success()) {
            let log =
                std::fs::read_to_string(world.folder.path().join(format!("refresh-{number}.log")));
            bail!("process {number}: {}", log.unwrap_or_default().trim());
        }
    }
    Ok(())
}

/// Checks that the app is still signed in after a restart, and does not show earlier alerts again. Then signs out.
async fn second_start(app: &Path, world: &World, server: &str, alerts: &Alerts) -> Result<()> {
    let page = App::start(world, app, server, None).await?;
    page.heading("Get started").await?;
    world.display()?.unfocus().await?;
    alerts
        .is_only_counted(&page)
        .await
        .context("earlier alerts")?;
    check_memory(world).context("in memory")?;
    page.press("Sign out").await?;
    page.heading("Sign in").await?;
    let token = world.token(server);
    ensure!(token.is_err(), "the keychain still holds a token");
    // Without a new key on the page, the app quits without asking.
    let keys = [x11::CONTROL, x11::Q];
    world.display()?.press(TITLE, &keys).await?;
    page.exits().await
}

/// Checks that closing the window or quitting asks for confirmation while a new key is shown and has not been saved.
async fn asks_before_quitting(page: &App, world: &World) -> Result<()> {
    let display = world.display()?;
    display.close(TITLE)?;
    page.text("Copy it before you quit.").await?;
    page.screenshot("quit-warning").await?;
    // When the user presses Escape, the app asks whether to close the dialog, not whether to quit.
    page.run("document.querySelector('#secret').dispatchEvent(new KeyboardEvent('keydown', { key: 'Escape', bubbles: true }))")
        .await?;
    page.text("Copy it before you close.").await?;
    display.press(TITLE, &[x11::CONTROL, x11::Q]).await?;
    page.text("Copy it before you quit.").await?;
    page.element("#secret").await
}

/// Quits even though a new key has not been saved.
async fn quits_without_saving(page: App, world: &World) -> Result<()> {
    page.follow("Service tokens").await?;
    page.press("Create token").await?;
    page.fill("Name", "Edge gateway").await?;
    page.press("Create token").await?;
    page.element("#secret").await?;
    world.display()?.close(TITLE)?;
    // The app may exit before it has responded to the driver, so only its exit counts.
    let pressed = page.press("Quit without saving").await;
    page.exits()
        .await
        .with_context(|| format!("pressing \"Quit without saving\": {pressed:?}"))
}

/// Checks that Checkout opens in the system's browser, and that the app notices when the payment is complete.
async fn billing(page: &App, world: &World) -> Result<()> {
    page.follow("Billing").await?;
    page.heading("No subscription").await?;
    page.press("Upgrade").await?;
    page.heading("Waiting for your payment…").await?;
    page.screenshot("billing-waiting").await?;
    let checkout = until("Checkout opens", TIMEOUT, async || Ok(world.opened().pop())).await?;
    ensure!(checkout.contains("/pay/"), "opened {checkout}");
    pay(&checkout)?;
    page.text("Subscription active").await?;
    page.text("Renews").await?;
    page.screenshot("billing").await?;
    page.press("Manage in Stripe").await?;
    page.text("Stripe opened in your browser.").await?;
    until("the portal opens", TIMEOUT, async || {
        Ok(world.opened().pop().filter(|it| it.contains("/portal/")))
    })
    .await?;
    world.display()?.press(TITLE, &[x11::F1]).await?;
    until("the API docs open", TIMEOUT, async || {
        Ok(world.opened().pop().filter(|it| it.ends_with("/docs")))
    })
    .await?;
    Ok(())
}

/// Pays on the page of the stand-in for Stripe, like a browser.
fn pay(page: &str) -> Result<()> {
    let rest = page.strip_prefix("http://").context("not the stand-in")?;
    let (host, path) = rest.split_once('/').context("no path")?;
    let body = "do=pay";
    let mut stream = TcpStream::connect(host)?;
    write!(
        stream,
        "POST /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Type: application/x-www-form-urlencoded\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let response = std::io::read_to_string(stream)?;
    ensure!(response.starts_with("HTTP/1.1 303"), "{response}");
    Ok(())
}

/// Starts an installed app, creates an account and quits.
pub async fn start(app: &Path, server: &str) -> Result<()> {
    let world = World::new(true)?;
    let page = App::start(&world, app, server, None).await?;
    page.heading("Sign in").await?;
    page.follow("Create an account").await?;
    page.fill("Email", &email()).await?;
    page.fill("Password", PASSWORD).await?;
    page.press("Create account").await?;
    page.heading("Get started").await?;
    let keys = [x11::CONTROL, x11::Q];
    world.display()?.press(TITLE, &keys).await?;
    page.exits().await?;
    println!("{}: started, signed in and quit", app.display());
    Ok(())
}

/// Checks that only the app itself has tokens in memory, and not the processes that render its page.
fn check_memory(world: &World) -> Result<()> {
    let mut checked = 0;
    for pid in scan::process_tree(std::process::id().try_into()?) {
        let name = scan::name(pid);
        if name == "quota-desktop" {
            ensure!(
                scan::memory(pid)?,
                "the search missed the access token in the app's memory"
            );
            checked += 1;
        } else if name.starts_with("WebKitWebProces") || name.starts_with("WebKitNetworkP") {
            ensure!(!scan::memory(pid)?, "a token is in the memory of {name}");
            checked += 1;
        }
    }
    ensure!(
        checked >= 3,
        "expected the app, its page and its network process: {}",
        world.folder.path().display()
    );
    Ok(())
}

/// Checks that without a keychain, the session ends with the app, and a banner says so.
async fn without_keychain(app: &Path, server: &str, shots: Option<&Path>) -> Result<()> {
    let world = World::new(false)?;
    let page = App::start(&world, app, server, shots).await?;
    page.fill("Email", &email()).await?;
    page.fill("Password", PASSWORD).await?;
    page.press("Sign in").await?;
    page.heading("Get started").await?;
    page.text("No keychain found").await?;
    page.screenshot("no-keychain").await?;
    let (found, _) = scan::files(world.folder.path())?;
    ensure!(found.is_empty(), "tokens in files: {found:?}");
    quits_without_saving(page, &world)
        .await
        .context("with a token that is not saved")?;
    let page = App::start(&world, app, server, None).await?;
    page.heading("Sign in").await?;
    page.close().await
}
