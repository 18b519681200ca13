//! `compose.prod.yml`, running under its own project name.

use std::{
    fs,
    net::TcpListener,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use reqwest::{Certificate, Client, redirect};
use serde_json::json;
use tokio::time::sleep;

use crate::{
    account::Account,
    engine::{self, Engine, succeed},
    image::Upgrade,
    load::{BURST, RPM, Target},
    root,
};

/// A running installation. Dropping this value removes the installation.
pub struct Production<'a> {
    pub engine: &'a Engine,
    pub project: String,
    /// The `deploy` folder and the Caddyfile, with secrets created for this run.
    files: tempfile::TempDir,
    https: u16,
    http: u16,
}

impl<'a> Production<'a> {
    /// Starts an installation of an image, with new secrets.
    pub fn up(engine: &'a Engine, image: &str, redis_timeout: Option<&str>) -> Result<Self> {
        let production = Self::create(engine, (free_port()?, free_port()?))?;
        let deploy = production.deploy();
        succeed(&mut Command::new(deploy.join("secrets.sh")))?;
        let (https, http) = (production.https, production.http);
        fs::write(
            deploy.join(".env.prod"),
            format!(
                "QUOTA_SITE=localhost\nQUOTA_PUBLIC_URL=https://localhost:{https}\nHTTPS_PORT={https}\n\
                 HTTP_PORT={http}\nQUOTA_REGISTRATION=open\nQUOTA_REPLICAS=2\nQUOTA_IMAGE={image}\n\
                 QUOTA_ENV_FILE=quota.env\n"
            ),
        )?;
        let settings = redis_timeout.map_or(String::new(), |timeout| {
            format!("QUOTA_REDIS_TIMEOUT={timeout}\n")
        });
        fs::write(deploy.join("quota.env"), settings)?;
        let began = Instant::now();
        succeed(production.compose().args(["up", "--detach"]))?;
        println!("up in {:.0} s", began.elapsed().as_secs_f64());
        Ok(production)
    }

    /// Prepares an installation without secrets or settings.
    fn create(engine: &'a Engine, (https, http): (u16, u16)) -> Result<Self> {
        let files = tempfile::tempdir()?;
        succeed(
            Command::new("cp")
                .arg("-r")
                .args([root().join("deploy"), root().join("Caddyfile")])
                .arg(files.path()),
        )?;
        Ok(Self {
            engine,
            project: format!("quota-test-{https}-{}", std::process::id()),
            files,
            https,
            http,
        })
    }

    /// Removes this installation with all its data, as if its machine had been lost. Prepares another installation with
    /// the same secrets, settings and addresses.
    pub fn replace(self) -> Result<Self> {
        let kept = tempfile::tempdir()?;
        let copy = |from: PathBuf, to: PathBuf| {
            succeed(Command::new("cp").arg("-a").arg("-T").arg(from).arg(to))
        };
        let files = ["secrets", ".env.prod", "quota.env"];
        for file in files {
            copy(self.deploy().join(file), kept.path().join(file))?;
        }
        let (engine, ports) = (self.engine, (self.https, self.http));
        drop(self);
        let mut new = Self::create(engine, ports)?;
        new.project.push_str("-restored");
        for file in files {
            copy(kept.path().join(file), new.deploy().join(file))?;
        }
        Ok(new)
    }

    pub fn deploy(&self) -> PathBuf {
        self.files.path().join("deploy")
    }

    pub fn compose(&self) -> Command {
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

    pub fn containers(&self, service: &str) -> Result<Vec<String>> {
        let ids = engine::read(self.compose().args(["ps", "--quiet", service]))?;
        Ok(ids.lines().map(str::to_owned).collect())
    }

    pub fn inspect(&self, container: &str, format: &str) -> Result<String> {
        let output = self
            .engine
            .read(&["inspect", "--format", format, container])?;
        Ok(output.trim().to_owned())
    }

    pub fn is_healthy(&self, container: &str) -> Result<bool> {
        Ok(self.inspect(container, "{{.State.Health.Status}}")? == "healthy")
    }

    pub async fn until_healthy(&self, service: &str, count: usize) -> Result<()> {
        let began = Instant::now();
        loop {
            let ids = self.containers(service)?;
            let mut healthy = 0;
            for id in &ids {
                healthy += usize::from(self.is_healthy(id)?);
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

    /// Runs a query as the superuser. Returns one line per row, with fields separated by `|`.
    pub fn query(&self, sql: &str) -> Result<String> {
        let postgres = self.containers("postgres")?.swap_remove(0);
        let psql = ["exec", &postgres, "psql", "--no-psqlrc", "--quiet"];
        let form = ["--tuples-only", "--no-align", "--set", "ON_ERROR_STOP=1"];
        let database = ["--username=quota", "--dbname=quota", "--command", sql];
        engine::read(self.engine.docker(&psql).args(form).args(database))
    }

    /// Returns how many decisions a replica has made, from its metrics. Reads the metrics from Caddy's container, which
    /// is in the same network.
    pub fn decisions(&self, replica: &str) -> Result<u64> {
        let networks =
            "{{range $name, $it := .NetworkSettings.Networks}}{{$name}} {{$it.IPAddress}}\n{{end}}";
        let networks = self.inspect(replica, networks)?;
        let edge = networks
            .lines()
            .filter_map(|line| line.split_once(' '))
            .find(|(name, _)| name.ends_with("_edge"));
        let (_, address) = edge.context("it is not in Caddy's network")?;
        let caddy = self.containers("caddy")?.swap_remove(0);
        let url = format!("http://{address}:9090/metrics");
        let metrics = self
            .engine
            .read(&["exec", &caddy, "wget", "-qO", "-", &url])?;
        let mut decisions = 0;
        for name in [
            "quota_decisions_allowed_total ",
            "quota_decisions_denied_total ",
        ] {
            let value = metrics.lines().find_map(|line| line.strip_prefix(name));
            let value = value.with_context(|| format!("no {name}in the metrics"))?;
            decisions += value.trim().parse::<u64>()?;
        }
        Ok(decisions)
    }

    /// Returns a client that trusts Caddy's own certificate authority.
    pub async fn client(&self) -> Result<Client> {
        self.until_healthy("caddy", 1).await?;
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

    pub fn base(&self) -> String {
        format!("https://localhost:{}", self.https)
    }

    /// Runs the tests, and prints the last log lines if one fails.
    pub async fn test(self, upgrade: &Upgrade, all: bool, backup: bool) -> Result<()> {
        let client = self.client().await?;
        let account = Account::register(&client, &self.base()).await?;
        let target = self.target(&client, &account).await?;
        if all {
            let tested = self.all(&client, &account, &target, upgrade).await;
            self.logs_of(tested)?;
        }
        if backup {
            self.restored_from_backup(&account, target).await?;
        }
        Ok(())
    }

    async fn all(
        &self,
        client: &Client,
        account: &Account,
        target: &Target,
        upgrade: &Upgrade,
    ) -> Result<()> {
        self.until_healthy("quota", 2).await?;
        self.is_confined()?;
        self.routes(client).await?;
        self.is_exact(client, account).await?;
        self.upgraded(upgrade, target).await?;
        self.killed(target).await?;
        self.scaled(target).await
    }

    async fn target(&self, client: &Client, account: &Account) -> Result<Target> {
        let limited = json!({"name": "Limited", "default_rpm": RPM, "burst": BURST});
        let ample = json!({"name": "Ample", "default_rpm": 60_000_000});
        Ok(Target {
            client: client.clone(),
            base: self.base(),
            limited: account.key(client, limited).await?,
            ample: account.key(client, ample).await?,
            service_token: account.service_token(client).await?,
        })
    }

    /// Checks that replicas run without root privileges on a read-only file system, and that their health check works.
    fn is_confined(&self) -> Result<()> {
        for replica in self.containers("quota")? {
            let read_only = self.inspect(&replica, "{{.HostConfig.ReadonlyRootfs}}")?;
            ensure!(read_only == "true", "its file system is writable");
            let pid = self.inspect(&replica, "{{.State.Pid}}")?;
            let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
            for (name, expected) in [
                ("Uid:", "65532 65532 65532 65532"),
                ("Gid:", "65532 65532 65532 65532"),
                ("CapEff:", "0000000000000000"),
                ("CapBnd:", "0000000000000000"),
                ("NoNewPrivs:", "1"),
            ] {
                let value = status.lines().find_map(|line| line.strip_prefix(name));
                let value = value.context("the kernel does not report it")?;
                let value = value.split_whitespace().collect::<Vec<_>>().join(" ");
                ensure!(value == expected, "{name} {value}");
            }
            let health = ["exec", &replica, "/usr/local/bin/quota", "health"];
            succeed(&mut self.engine.docker(&health))?;
        }
        println!(
            "replicas run as 65532, without capabilities, read-only; `quota health` exits with 0"
        );
        Ok(())
    }

    /// Checks how each path is routed.
    async fn routes(&self, client: &Client) -> Result<()> {
        let base = self.base();
        for (path, expected, content) in [
            ("/", 200, "text/html"),
            ("/console/", 200, "text/html"),
            ("/docs", 200, "text/html"),
            ("/health/ready", 200, "application/json"),
            ("/v1/echo", 401, "application/problem+json"),
            ("/api/health/ready", 200, "application/json"),
            ("/api/v1/echo", 401, "application/problem+json"),
            ("/api/api/v1/echo", 404, "application/problem+json"),
            ("/metrics", 404, "application/problem+json"),
            ("/api/metrics", 404, "application/problem+json"),
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

    /// Sends 300 requests to two replicas, with a key on a strict plan whose burst is 100. Checks that the replicas
    /// allow at least the burst, and at most the burst and the tokens that refill in the meantime.
    async fn is_exact(&self, client: &Client, account: &Account) -> Result<()> {
        let plan = json!({"name": "Exact", "default_rpm": 60, "burst": 100, "strict": true});
        let key = account.key(client, plan).await?;
        let before = self.all_decisions()?;
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
        let shares = since(&before, &self.all_decisions()?);
        println!(
            "a burst of 100 over two replicas: {admitted} admitted, {denied} denied in {seconds:.1} s; the replicas \
             decided {shares:?} of the requests"
        );
        ensure!(admitted >= 100 && f64::from(admitted) <= 100.0 + seconds);
        ensure!(
            shares.iter().all(|it| *it > 0),
            "a replica decided no request"
        );
        Ok(())
    }

    /// Returns each replica with the number of decisions it has made.
    pub fn all_decisions(&self) -> Result<Vec<(String, u64)>> {
        let replicas = self.containers("quota")?.into_iter();
        replicas
            .map(|it| self.decisions(&it).map(|count| (it, count)))
            .collect()
    }

    /// Prints the last log lines if a test failed, and returns the result of the test.
    pub fn logs_of(&self, tested: Result<()>) -> Result<()> {
        if tested.is_err()
            && let Ok(logs) =
                engine::read(self.compose().args(["logs", "--no-color", "--tail", "15"]))
        {
            eprintln!("{logs}");
        }
        tested
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

/// Returns how many decisions each replica has made since an earlier count.
pub fn since(before: &[(String, u64)], after: &[(String, u64)]) -> Vec<u64> {
    let count = |replica: &String| {
        before
            .iter()
            .find(|it| it.0 == *replica)
            .map_or(0, |it| it.1)
    };
    after
        .iter()
        .map(|(replica, decisions)| decisions.saturating_sub(count(replica)))
        .collect()
}

pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
