//! Builds the image, starts `deploy/compose.prod.yml`, and performs an operator's tasks under load.

#![expect(
    clippy::disallowed_methods,
    reason = "a task has no `Config`: it reads the environment directly"
)]

mod backup;
mod engine;
mod images;
mod load;

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use reqwest::{Certificate, Client, redirect};
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::{
    engine::{Engine, succeed},
    images::provide,
    load::{Load, Outcome, Target},
};

#[derive(Parser)]
#[command(about = "Build the image, run the production compose file, and test it")]
struct Arguments {
    /// Put this binary into the image instead of compiling one inside
    #[arg(long)]
    binary: Option<PathBuf>,
    /// Only build the image `quota:local`
    #[arg(long)]
    image_only: bool,
    /// Where images and stand-ins are kept between runs, if no container engine is already running. A short path
    #[arg(long, default_value = "/var/tmp/quota-containers")]
    folder: PathBuf,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let engine = Engine::start(&arguments.folder)?;
    provide(&engine, &arguments.folder, arguments.binary.is_none())?;
    image(&engine, arguments.binary.as_deref(), "quota:local")?;
    if arguments.image_only {
        return Ok(());
    }
    succeed(&mut engine.docker(&["tag", "quota:local", "quota:next"]))?;
    let production = Production::up(&engine)?;
    let tested = production.test().await;
    if tested.is_err() {
        production.print_logs();
    }
    tested
}

/// Builds the image and prints its size.
fn image(engine: &Engine, binary: Option<&Path>, tag: &str) -> Result<()> {
    let began = Instant::now();
    let prebuilt = root().join("deploy/bin/quota");
    let mut build = engine.docker(&["build", "--quiet", "--network", "host", "--tag", tag]);
    build
        .arg("--file")
        .arg(root().join("deploy/Dockerfile"))
        .args([
            "--build-arg",
            &format!("VERSION={}", env!("CARGO_PKG_VERSION")),
        ]);
    if let Some(binary) = binary {
        fs::create_dir_all(root().join("deploy/bin"))?;
        succeed(
            Command::new("strip")
                .args(["--strip-debug", "-o"])
                .arg(&prebuilt)
                .arg(binary),
        )?;
        build.args(["--build-arg", "BINARY=prebuilt"]);
    }
    let built = succeed(build.arg(root()));
    let _ = fs::remove_dir_all(root().join("deploy/bin"));
    built?;
    let size: f64 = engine
        .read(&["image", "inspect", "--format", "{{.Size}}", tag])?
        .trim()
        .parse()?;
    println!(
        "image {tag}: {:.1} MB, built in {:.0} s",
        size / 1e6,
        began.elapsed().as_secs_f64()
    );
    Ok(())
}

/// `compose.prod.yml`, running under its own project name. Everything is removed on drop.
struct Production<'a> {
    engine: &'a Engine,
    project: String,
    /// The `deploy` folder and the Caddyfile, with secrets created for this run.
    files: tempfile::TempDir,
    https: u16,
    http: u16,
}

impl<'a> Production<'a> {
    fn up(engine: &'a Engine) -> Result<Self> {
        let files = tempfile::tempdir()?;
        succeed(
            Command::new("cp")
                .arg("-r")
                .args([root().join("deploy"), root().join("Caddyfile")])
                .arg(files.path()),
        )?;
        let production = Self {
            engine,
            project: format!("quota-test-{}", std::process::id()),
            files,
            https: free_port()?,
            http: free_port()?,
        };
        let deploy = production.deploy();
        succeed(&mut Command::new(deploy.join("secrets.sh")))?;
        let (https, http) = (production.https, production.http);
        fs::write(
            deploy.join(".env.prod"),
            format!(
                "QUOTA_SITE=localhost\nQUOTA_PUBLIC_URL=https://localhost:{https}\nHTTPS_PORT={https}\n\
                 HTTP_PORT={http}\nQUOTA_REGISTRATION=open\nQUOTA_REPLICAS=2\n"
            ),
        )?;
        let began = Instant::now();
        succeed(production.compose().args(["up", "--detach"]))?;
        println!("up in {:.0} s", began.elapsed().as_secs_f64());
        Ok(production)
    }

    fn deploy(&self) -> PathBuf {
        self.files.path().join("deploy")
    }

    fn compose(&self) -> Command {
        let mut command = self.engine.compose();
        command
            .arg("--project-name")
            .arg(&self.project)
            .arg("--env-file")
            .arg(self.deploy().join(".env.prod"))
            .arg("--file")
            .arg(self.deploy().join("compose.prod.yml"));
        command
    }

    fn containers(&self, service: &str) -> Result<Vec<String>> {
        let ids = engine::read(self.compose().args(["ps", "--quiet", service]))?;
        Ok(ids.lines().map(str::to_owned).collect())
    }

    async fn until_healthy(&self, service: &str, count: usize) -> Result<()> {
        let began = Instant::now();
        loop {
            let ids = self.containers(service)?;
            let mut healthy = 0;
            for id in &ids {
                let state = ["inspect", "--format", "{{.State.Health.Status}}", id];
                healthy += usize::from(self.engine.read(&state)?.trim() == "healthy");
            }
            if healthy == count && ids.len() == count {
                return Ok(());
            }
            ensure!(
                began.elapsed() < Duration::from_secs(120),
                "{healthy} of {} are healthy, expected {count}",
                ids.len()
            );
            sleep(Duration::from_millis(500)).await;
        }
    }

    /// Returns a client that trusts Caddy's own certificate authority.
    fn client(&self) -> Result<Client> {
        let caddy = &self.containers("caddy")?[0];
        let certificate = self.files.path().join("root.crt");
        let from = format!("{caddy}:/data/caddy/pki/authorities/local/root.crt");
        succeed(self.engine.docker(&["cp", &from]).arg(&certificate))?;
        let certificate = Certificate::from_pem(&fs::read(certificate)?)?;
        Ok(Client::builder()
            .tls_certs_only([certificate])
            .redirect(redirect::Policy::none())
            .timeout(Duration::from_secs(15))
            .build()?)
    }

    fn base(&self) -> String {
        format!("https://localhost:{}", self.https)
    }

    async fn test(&self) -> Result<()> {
        self.until_healthy("quota", 2).await?;
        let client = self.client()?;
        self.routes(&client).await?;
        let account = Account::register(&client, &self.base()).await?;
        self.is_exact(&client, &account).await?;
        self.under_load(&client, &account).await?;
        self.restored_from_backup(&client, &account).await
    }

    /// Checks how each path is routed.
    async fn routes(&self, client: &Client) -> Result<()> {
        let base = self.base();
        for (path, expected, content) in [
            ("/", 200, "text/html"),
            ("/console/", 200, "text/html"),
            ("/docs", 200, "text/html"),
            ("/health/ready", 200, "application/json"),
            ("/api/health/ready", 200, "application/json"),
            ("/api/v1/echo", 401, "application/problem+json"),
            ("/metrics", 404, "application/problem+json"),
        ] {
            let response = client.get(format!("{base}{path}")).send().await?;
            let status = response.status().as_u16();
            let found = response.headers().get("content-type").cloned();
            let found = found.and_then(|it| it.to_str().map(str::to_owned).ok());
            let found = found.unwrap_or_default();
            ensure!(
                status == expected && found.starts_with(content),
                "{path}: {status}, {found}"
            );
            ensure!(
                response.headers().contains_key("strict-transport-security"),
                "{path} has no Strict-Transport-Security"
            );
        }
        let stranger = client
            .get(format!("{base}/health/ready"))
            .header("host", "stranger.example")
            .send()
            .await?;
        ensure!(
            stranger.status() == 421,
            "another Host: {}",
            stranger.status()
        );
        let plain = client
            .get(format!("http://localhost:{}/console/", self.http))
            .send()
            .await?;
        ensure!(plain.status() == 308, "plain HTTP: {}", plain.status());
        println!("routes: as described");
        Ok(())
    }

    /// Sends a strict key's burst to both replicas at the same time.
    async fn is_exact(&self, client: &Client, account: &Account) -> Result<()> {
        let plan = json!({"name": "Exact", "default_rpm": 60, "burst": 100, "strict": true});
        let key = account.key(client, plan).await?;
        let began = Instant::now();
        let requests = (0..300).map(|_| {
            let request = client
                .get(format!("{}/v1/echo", self.base()))
                .header("x-api-key", &key);
            tokio::spawn(request.send())
        });
        let (mut admitted, mut denied) = (0_u32, 0_u32);
        for request in requests.collect::<Vec<_>>() {
            match request.await??.status().as_u16() {
                200 => admitted += 1,
                429 => denied += 1,
                other => anyhow::bail!("{other}"),
            }
        }
        let seconds = began.elapsed().as_secs_f64();
        println!(
            "a burst of 100 over two replicas: {admitted} admitted, {denied} denied in {seconds:.1} s"
        );
        ensure!(admitted >= 100 && f64::from(admitted) <= 100.0 + seconds);
        Ok(())
    }

    async fn under_load(&self, client: &Client, account: &Account) -> Result<()> {
        let plan = json!({"name": "Load", "default_rpm": 60_000});
        let key = account.key(client, plan).await?;
        let target = Target {
            client: client.clone(),
            base: self.base(),
            key,
            service_token: account.service_token(client).await?,
        };
        let load = || Load::start(target.clone());

        let running = load();
        sleep(Duration::from_secs(2)).await;
        let killed = &self.containers("quota")?[0];
        let pid = ["inspect", "--format", "{{.State.Pid}}", killed];
        let pid: i32 = self.engine.read(&pid)?.trim().parse()?;
        // This does not use `docker kill`, because the engine would not restart the container after that.
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(pid),
            nix::sys::signal::Signal::SIGKILL,
        )?;
        sleep(Duration::from_secs(1)).await;
        self.until_healthy("quota", 2).await?;
        sleep(Duration::from_secs(2)).await;
        report(
            "kill -9 of a replica, restarted by the engine",
            &running.stop().await?,
        )?;

        let running = load();
        for count in [4, 2] {
            let scale = format!("quota={count}");
            succeed(self.compose().args([
                "up",
                "--detach",
                "--no-recreate",
                "--scale",
                &scale,
                "quota",
            ]))?;
            self.until_healthy("quota", count).await?;
            sleep(Duration::from_secs(2)).await;
        }
        report("scaled from 2 to 4 and back", &running.stop().await?)?;

        let running = load();
        sleep(Duration::from_secs(1)).await;
        succeed(
            self.engine
                .script(&self.deploy().join("upgrade.sh"))
                .env("PROJECT", &self.project)
                .env("QUOTA_IMAGE", "quota:next"),
        )?;
        self.until_healthy("quota", 2).await?;
        sleep(Duration::from_secs(2)).await;
        report("a new image with upgrade.sh", &running.stop().await?)?;
        for id in self.containers("quota")? {
            let image = ["inspect", "--format", "{{.Config.Image}}", &id];
            ensure!(self.engine.read(&image)?.trim() == "quota:next");
        }
        Ok(())
    }

    fn print_logs(&self) {
        if let Ok(logs) = engine::read(self.compose().args(["logs", "--no-color", "--tail", "15"]))
        {
            eprintln!("{logs}");
        }
    }
}

impl Drop for Production<'_> {
    fn drop(&mut self) {
        let down = ["down", "--volumes", "--remove-orphans", "--timeout", "5"];
        if let Err(error) = succeed(self.compose().args(down)) {
            eprintln!("{error:#}");
        }
    }
}

fn report(what: &str, outcome: &Outcome) -> Result<()> {
    println!(
        "{what}: {} sent, {} admitted, {} denied, {} failed, slowest {:.2} s",
        outcome.sent,
        outcome.admitted,
        outcome.denied,
        outcome.failures.len(),
        outcome.slowest.as_secs_f64()
    );
    for (at, failure) in outcome.failures.iter().take(10) {
        println!("  at {:.1} s: {failure}", at.as_secs_f64());
    }
    ensure!(outcome.failures.is_empty(), "requests failed");
    ensure!(outcome.admitted > 0, "nothing was admitted");
    Ok(())
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// An account created for the test.
struct Account {
    base: String,
    token: String,
}

impl Account {
    async fn register(client: &Client, base: &str) -> Result<Self> {
        let account = json!({"email": "owner@example.com", "password": "violet-harbour-quilt-93"});
        let url = format!("{base}/api/auth/register");
        let answer = created(client.post(url).json(&account)).await?;
        Ok(Self {
            base: base.to_owned(),
            token: text(&answer["access_token"])?,
        })
    }

    async fn create(&self, client: &Client, path: &str, body: Value) -> Result<Value> {
        let url = format!("{}/api/admin/{path}", self.base);
        created(client.post(url).bearer_auth(&self.token).json(&body)).await
    }

    async fn key(&self, client: &Client, plan: Value) -> Result<String> {
        let plan = self.create(client, "plans", plan).await?;
        let key = json!({"name": "test", "plan_id": plan["id"]});
        text(&self.create(client, "api-keys", key).await?["key"])
    }

    async fn service_token(&self, client: &Client) -> Result<String> {
        let token = json!({"name": "test"});
        text(&self.create(client, "service-tokens", token).await?["token"])
    }
}

async fn created(request: reqwest::RequestBuilder) -> Result<Value> {
    let response = request.send().await?;
    let status = response.status();
    let body = response.text().await?;
    ensure!(status == 201, "{status}: {body}");
    Ok(serde_json::from_str(&body)?)
}

fn text(value: &Value) -> Result<String> {
    value.as_str().map(str::to_owned).context("no text")
}
