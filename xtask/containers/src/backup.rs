//! Takes a backup with `deploy/backup.sh`, and restores it with `deploy/restore.sh`.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use reqwest::Client;
use serde_json::json;
use tokio::time::sleep;

use crate::{
    Account, Production,
    engine::{self, succeed},
};

impl Production<'_> {
    /// Sends requests with a key until one is denied, but at most this many. Returns how many were allowed.
    async fn spend(&self, client: &Client, key: &str, most: u32) -> Result<u32> {
        for allowed in 0..most {
            let request = client.get(format!("{}/v1/echo", self.base()));
            match request
                .header("x-api-key", key)
                .send()
                .await?
                .status()
                .as_u16()
            {
                200 => {}
                429 => return Ok(allowed),
                other => anyhow::bail!("{other}"),
            }
        }
        Ok(most)
    }

    /// Takes a backup, starts over with an empty database as on a new machine, and restores the backup.
    pub async fn restored_from_backup(&self, client: &Client, account: &Account) -> Result<()> {
        let plan = json!({"name": "Daily", "default_rpm": 60_000, "daily_quota": 1000});
        let key = account.key(client, plan).await?;
        ensure!(self.spend(client, &key, 300).await? == 300);
        let script = |name: &str, argument: &Path| {
            let mut script = self.engine.script(&self.deploy().join(name));
            script.arg(argument).env("PROJECT", &self.project);
            engine::read(&mut script)
        };
        let folder = tempfile::tempdir()?;
        let backup = script("backup.sh", folder.path())?;

        succeed(self.compose().args(["stop", "caddy", "quota"]))?;
        let postgres = self.containers("postgres")?.swap_remove(0);
        let postgres = postgres.as_str();
        for sql in [
            "ALTER DATABASE quota RENAME TO quota_before_restore",
            "CREATE DATABASE quota",
        ] {
            let psql = [
                "exec",
                postgres,
                "psql",
                "--username=quota",
                "--dbname=postgres",
            ];
            succeed(self.engine.docker(&psql).args(["--command", sql]))?;
        }
        let restored = script("restore.sh", Path::new(backup.trim()))?;
        ensure!(restored.contains("Restored."), "{restored}");
        succeed(self.compose().args(["up", "--detach"]))?;
        self.until_healthy("quota", 2).await?;
        self.until_healthy("caddy", 1).await?;

        let after = self.spend(client, &key, 2000).await?;
        println!(
            "restored from a backup: 300 requests of a daily quota of 1,000 before it, {after} after it"
        );
        // Replicas held at most 1% of the quota when the backup was taken.
        ensure!((690..=700).contains(&after));
        let usage = "SELECT count(*) FROM usage_log WHERE NOT was_rejected AND key_id = \
            (SELECT k.id FROM api_keys k JOIN plans p ON p.id = k.plan_id WHERE p.name = 'Daily')";
        let psql = [
            "exec",
            postgres,
            "psql",
            "--username=quota",
            "--dbname=quota",
        ];
        let count = || {
            let mut count = self.engine.docker(&psql);
            engine::read(count.args(["--tuples-only", "--no-align", "--command", usage]))
        };
        let expected = (300 + after).to_string();
        let deadline = Instant::now() + Duration::from_secs(60);
        while count()?.trim() != expected {
            ensure!(
                Instant::now() < deadline,
                "{} requests are counted, expected {expected}",
                count()?.trim()
            );
            sleep(Duration::from_millis(500)).await;
        }
        Ok(())
    }
}
