//! Upgrades, kills and scales the replicas of an installation under load.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::time::sleep;

use crate::{
    engine::succeed,
    image::Upgrade,
    load::{Load, Target},
    production::{Production, since},
};

/// How long the decisions of both images are counted during an upgrade.
const SKEW: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_secs(2);

impl Production<'_> {
    /// Rolls out a new image with `upgrade.sh`. Meanwhile, both images serve requests.
    pub async fn upgraded(&self, upgrade: &Upgrade, target: &Target) -> Result<()> {
        let name = if upgrade.is_skewed {
            "upgrade from the earlier version"
        } else {
            "upgrade to a new image"
        };
        let old = self.containers("quota")?;
        let migrations = self.migrations()?;
        let load = Load::start(name, target.clone());
        sleep(PAUSE).await;
        let mut script = self.engine.script(&self.deploy().join("upgrade.sh"));
        script
            .env("PROJECT", &self.project)
            .env("QUOTA_IMAGE", upgrade.to)
            .stdout(Stdio::null());
        let mut script = script.spawn().context("cannot run upgrade.sh")?;
        let shares = self.mixed(&old, &script).await;
        let status = script.wait()?;
        let (of_old, of_new) = shares?;
        ensure!(status.success(), "upgrade.sh failed: {status}");
        self.until_healthy("quota", 2).await?;
        sleep(PAUSE).await;
        let results = load.stop().await?;
        results.check()?;
        println!(
            "  in {} s, the old replicas decided {of_old:?} requests and the new ones {of_new:?}; migrations: \
             {migrations} before, {} after",
            SKEW.as_secs(),
            self.migrations()?
        );
        for id in self.containers("quota")? {
            let image = self.inspect(&id, "{{.Config.Image}}")?;
            ensure!(image == upgrade.to, "a replica still runs {image}");
        }
        if upgrade.is_skewed {
            ensure!(self.migrations()? > migrations, "nothing was migrated");
        }
        self.recount(&results, None).await
    }

    /// Pauses `upgrade.sh` while it waits for the new replicas, so that the old ones keep running for a while. Returns
    /// how many decisions each old replica and each new replica made during this time.
    async fn mixed(
        &self,
        old: &[String],
        script: &std::process::Child,
    ) -> Result<(Vec<u64>, Vec<u64>)> {
        let script = Pid::from_raw(i32::try_from(script.id())?);
        let deadline = Instant::now() + Duration::from_secs(120);
        let is_new = |it: &String| !old.contains(it);
        let all = 2 * old.len();
        while self.containers("quota")?.len() < all {
            ensure!(Instant::now() < deadline, "no new replicas are started");
            sleep(Duration::from_millis(100)).await;
        }
        kill(script, Signal::SIGSTOP)?;
        let counted = async {
            self.until_healthy("quota", all).await?;
            sleep(PAUSE).await;
            let before = self.all_decisions()?;
            sleep(SKEW).await;
            anyhow::Ok((before, self.all_decisions()?))
        }
        .await;
        kill(script, Signal::SIGCONT)?;
        let (before, after) = counted?;
        let (new, old): (Vec<_>, Vec<_>) = after.into_iter().partition(|it| is_new(&it.0));
        let (of_old, of_new) = (since(&before, &old), since(&before, &new));
        let serve = |it: &[u64]| it.iter().any(|count| *count > 0);
        ensure!(
            serve(&of_old) && serve(&of_new),
            "not both served: {of_old:?}, {of_new:?}"
        );
        Ok((of_old, of_new))
    }

    fn migrations(&self) -> Result<u64> {
        let count = self.query("SELECT count(*) FROM __diesel_schema_migrations")?;
        Ok(count.trim().parse()?)
    }

    /// Kills a replica, and checks that the engine restarts it.
    pub async fn killed(&self, target: &Target) -> Result<()> {
        let load = Load::start("kill -9 of a replica", target.clone());
        sleep(PAUSE).await;
        let replica = &self.containers("quota")?[0];
        let pid: i32 = self.inspect(replica, "{{.State.Pid}}")?.parse()?;
        let began = Instant::now();
        // Do not use `docker kill`: after this command, the engine does not restart the container.
        kill(Pid::from_raw(pid), Signal::SIGKILL)?;
        sleep(Duration::from_secs(1)).await;
        self.until_healthy("quota", 2).await?;
        let back = Instant::now();
        let restarts = self.inspect(replica, "{{.RestartCount}}")?;
        let before = self.all_decisions()?;
        sleep(PAUSE).await;
        let shares = since(&before, &self.all_decisions()?);
        let results = load.stop().await?;
        results.check()?;
        println!(
            "  restarted {restarts} time, healthy after {:.1} s",
            (back - began).as_secs_f64()
        );
        ensure!(restarts == "1", "restarted {restarts} times");
        ensure!(
            shares.iter().all(|it| *it > 0),
            "a replica decided no request: {shares:?}"
        );
        self.recount(&results, Some(began..=back)).await
    }

    /// Scales up and down, without any other change.
    pub async fn scaled(&self, target: &Target) -> Result<()> {
        let load = Load::start("scaled from 2 to 4 and back", target.clone());
        let mut shares = Vec::new();
        for count in [4, 2] {
            let scale = format!("quota={count}");
            let up: &mut Command = &mut self.compose();
            succeed(up.args([
                "up",
                "--detach",
                "--no-recreate",
                "--scale",
                &scale,
                "quota",
            ]))?;
            self.until_healthy("quota", count).await?;
            sleep(PAUSE).await;
            let before = self.all_decisions()?;
            sleep(PAUSE).await;
            shares.push(since(&before, &self.all_decisions()?));
        }
        let results = load.stop().await?;
        results.check()?;
        println!("  decisions of each replica with 4 and 2 of them: {shares:?}");
        ensure!(
            shares.concat().iter().all(|it| *it > 0),
            "a replica decided no request"
        );
        self.recount(&results, None).await
    }
}
