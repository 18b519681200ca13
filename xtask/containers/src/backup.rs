//! Takes a backup under load with `deploy/backup.sh`, removes the installation with all its data, and restores the
//! backup with `deploy/restore.sh` in an empty installation.

use std::{path::Path, time::Duration};

use anyhow::{Result, ensure};
use reqwest::Client;
use serde_json::json;
use std::time::Instant;
use tokio::time::sleep;

use crate::{
    account::Account,
    engine::{self, succeed},
    load::{Load, Target},
    production::Production,
};

/// A daily quota that the load does not use up, and the part of it that replicas may hold when the backup is taken.
const DAILY: usize = 4000;
const HELD: usize = DAILY / 100;

impl Production<'_> {
    pub async fn restored_from_backup(self, account: &Account, target: Target) -> Result<()> {
        let daily = json!({"name": "Daily", "default_rpm": 60_000_000, "daily_quota": DAILY});
        let key = account.key(&target.client, daily).await?;
        // Use this key for half of the requests.
        let target = Target {
            ample: key.clone(),
            ..target
        };
        let script = |of: &Production<'_>, name: &str, argument: &Path| {
            let mut script = of.engine.script(&of.deploy().join(name));
            engine::read(script.arg(argument).env("PROJECT", &of.project))
        };

        let folder = tempfile::tempdir()?;
        let load = Load::start("backup under load", target);
        sleep(Duration::from_secs(5)).await;
        let began = Instant::now();
        let backup = script(&self, "backup.sh", folder.path())?;
        let ended = Instant::now();
        sleep(Duration::from_secs(2)).await;
        let results = load.stop().await?;
        results.check()?;
        println!("  backup in {:.1} s", (ended - began).as_secs_f64());
        let before = results.allowed_with_ample(|it| it.answered < began);
        let during = results.allowed_with_ample(|it| it.sent < ended) - before;

        let new = self.replace()?;
        let restored = new.restore(Path::new(backup.trim()), script).await;
        new.logs_of(restored)?;
        let checked = async {
            let client = new.client().await?;
            account.sign_in(&client).await?;
            new.is_complete_until(&results, began).await?;
            let after = new.spend(&client, &key, 2 * DAILY).await?;
            println!(
                "restored: of a daily quota of {DAILY}, {before} were used before the backup, {during} during it, and \
                 {after} on the new machine"
            );
            // Requests during the backup may or may not be in the backup.
            let range = DAILY - before - during - HELD..=DAILY - before;
            ensure!(range.contains(&after), "expected {range:?}");
            Ok(())
        }
        .await;
        new.logs_of(checked)
    }

    /// Follows the runbook's steps for restoring a backup, in an installation without any data.
    async fn restore(
        &self,
        backup: &Path,
        script: impl Fn(&Production<'_>, &str, &Path) -> Result<String>,
    ) -> Result<()> {
        let began = Instant::now();
        succeed(self.compose().args(["up", "--detach", "postgres"]))?;
        self.until_healthy("postgres", 1).await?;
        let restored = script(self, "restore.sh", backup)?;
        ensure!(restored.contains("Restored."), "{restored}");
        succeed(self.compose().args(["up", "--detach"]))?;
        self.until_healthy("quota", 2).await?;
        println!(
            "restored on an empty machine in {:.0} s",
            began.elapsed().as_secs_f64()
        );
        Ok(())
    }

    /// Sends requests with a key until one is denied, but sends at most `most` requests. Returns how many were allowed.
    async fn spend(&self, client: &Client, key: &str, most: usize) -> Result<usize> {
        for allowed in 0..most {
            let request = client.get(format!("{}/v1/echo", self.base()));
            let response = request.header("x-api-key", key).send().await?;
            match response.status().as_u16() {
                200 => {}
                429 => return Ok(allowed),
                other => anyhow::bail!("{other}: {}", response.text().await?),
            }
        }
        Ok(most)
    }
}
