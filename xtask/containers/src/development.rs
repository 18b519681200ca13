//! Tests `compose.yml` in a fresh clone, like someone who tries out Quota.

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use reqwest::{Certificate, Client};
use tokio::time::sleep;

use crate::{
    engine::{self, Engine, succeed},
    image,
    production::free_port,
};

/// The time within which the server must start. Includes compiling the server, if no earlier run has compiled it.
const STARTED_WITHIN: Duration = Duration::from_secs(30 * 60);

/// A running `docker-compose up`. Dropping this value removes everything that the command created.
struct Development<'a> {
    engine: &'a Engine,
    clone: &'a Path,
    project: String,
    ports: [(&'static str, String); 2],
    up: Option<Child>,
}

impl Development<'_> {
    fn compose(&self) -> Command {
        let mut command = self.engine.compose();
        command
            .current_dir(self.clone)
            .envs(self.ports.iter().map(|(name, port)| (name, port)))
            .env("PYTHONUNBUFFERED", "1")
            .args(["--project-name", &self.project])
            .args(["--file", "deploy/compose.yml"]);
        command
    }

    /// Interrupts `docker-compose up`, as Ctrl-C does.
    fn interrupt(&mut self) -> Result<()> {
        if let Some(mut up) = self.up.take() {
            kill(Pid::from_raw(i32::try_from(up.id())?), Signal::SIGINT)?;
            up.wait()?;
        }
        Ok(())
    }
}

impl Drop for Development<'_> {
    fn drop(&mut self) {
        let stopped = self.interrupt();
        let down = ["down", "--volumes", "--remove-orphans", "--timeout", "5"];
        if let Err(error) = stopped.and(succeed(self.compose().args(down))) {
            eprintln!("{error:#}");
        }
    }
}

pub async fn test(engine: &Engine, binary: Option<&Path>) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let clone = folder.path().join("quota");
    image::clone_of(&clone)?;
    let (https, http) = (free_port()?, free_port()?);
    let mut development = Development {
        engine,
        clone: &clone,
        project: format!("quota-dev-{}", std::process::id()),
        ports: [
            ("HTTPS_PORT", https.to_string()),
            ("HTTP_PORT", http.to_string()),
        ],
        up: None,
    };
    let began = Instant::now();
    let mut up = development.compose();
    // Build the image from the clone, even if an image with this name exists.
    up.args(["up", "--build"]);
    if let Some(binary) = binary {
        image::put_binary(binary, &clone)?;
        up.env("BINARY", "prebuilt");
    }
    let mut up = up.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let output = up.stdout.take().context("its output is piped")?;
    development.up = Some(up);
    let (lines, received) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if lines.send(line).is_err() {
                break;
            }
        }
    });
    let mut printed = Vec::new();
    // The output contains the console's address and a `curl` command.
    let (console, command) = loop {
        let left = STARTED_WITHIN.saturating_sub(began.elapsed());
        let line = received.recv_timeout(left).with_context(|| {
            let last = printed.len().saturating_sub(30);
            format!(
                "it does not print the address of the console:\n{}",
                printed[last..].join("\n")
            )
        })?;
        printed.push(line);
        let find = |label: &str| {
            let line = printed.iter().find(|line| line.contains(label))?;
            Some(line.split_once(label)?.1.trim().to_owned())
        };
        if let (Some(console), Some(command)) = (find("  Console "), find("  curl -i ")) {
            break (console, command);
        }
    };
    println!(
        "compose.yml from a fresh clone: prints the console's address, {console}, after {:.0} s",
        began.elapsed().as_secs_f64()
    );
    ensure!(console == format!("https://localhost:{https}/console"));

    let caddy = engine::read(development.compose().args(["ps", "--quiet", "caddy"]))?;
    let certificate = folder.path().join("root.crt");
    let from = format!(
        "{}:/data/caddy/pki/authorities/local/root.crt",
        caddy.trim()
    );
    let deadline = Instant::now() + Duration::from_secs(60);
    while let Err(error) = succeed(engine.docker(&["cp", &from]).arg(&certificate)) {
        ensure!(Instant::now() < deadline, "{error:#}");
        sleep(Duration::from_millis(500)).await;
    }
    let certificate = Certificate::from_pem(&std::fs::read(certificate)?)?;
    let client = Client::builder().tls_certs_only([certificate]).build()?;
    let page = client.get(&console).send().await?.error_for_status()?;
    ensure!(page.text().await?.contains("<html"), "no page");
    // Send the printed command's request with this client. The command ends with `URL -H 'X-API-Key: KEY'`.
    let parts = command.split_once(" -H 'X-API-Key: ");
    let (url, key) = parts.context("the command has an unexpected form")?;
    let key = key.trim_end_matches('\'');
    let mut statuses = Vec::new();
    for _ in 0..12 {
        let response = client.get(url).header("x-api-key", key).send().await?;
        statuses.push(response.status().as_u16());
    }
    let allowed = statuses.iter().filter(|it| **it == 200).count();
    let denied = statuses.iter().filter(|it| **it == 429).count();
    println!("  12 requests with the printed key: {allowed} allowed, {denied} denied");
    ensure!(
        allowed >= 10 && denied >= 1 && allowed + denied == 12,
        "{statuses:?}"
    );
    let began = Instant::now();
    development.interrupt()?;
    println!(
        "  stopped by an interrupt in {:.0} s",
        began.elapsed().as_secs_f64()
    );
    Ok(())
}
