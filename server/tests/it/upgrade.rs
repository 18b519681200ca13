//! Tests `upgrade.sh` with a stand-in for Docker Compose.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tempfile::TempDir;

use crate::{backup::text, support::quota::data_dir};

const DOCKER: &str = include_str!("upgrade/docker.sh");

/// The scripts with their settings, and the state of the stand-in.
struct Installation {
    folder: TempDir,
}

impl Installation {
    /// Starts two replicas of the image `quota:old`.
    fn start() -> Self {
        let installation = Self { folder: data_dir() };
        for name in ["bin", "deploy", "state"] {
            fs::create_dir(installation.path(name)).expect("created");
        }
        let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
        for name in ["upgrade.sh", "secrets.sh", "compose.prod.yml"] {
            let to = installation.path("deploy").join(name);
            fs::copy(deploy.join(name), to).expect("copied");
        }
        // The script waits for unhealthy replicas.
        for (name, script) in [("docker", DOCKER), ("sleep", "#!/bin/sh\n")] {
            let path = installation.path("bin").join(name);
            fs::write(&path, script).expect("written");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("ours");
        }
        installation.configure("QUOTA_IMAGE=quota:old\n");
        let up = "compose --env-file deploy/.env.prod up --detach --scale quota=2 quota";
        let started = installation.command("docker").args(up.split(' ')).output();
        assert!(started.expect("the stand-in runs").status.success());
        installation
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn configure(&self, settings: &str) {
        fs::write(self.path("deploy/.env.prod"), settings).expect("written");
    }

    /// Sets a variable of the stand-in.
    fn set(&self, name: &str, value: &str) {
        fs::write(self.path("state").join(name), value).expect("written");
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("bash");
        command
            .args(["-c", "PATH=$BIN:$PATH exec \"$@\"", "bash", program])
            .current_dir(self.folder.path())
            .env("BIN", self.path("bin"))
            .env("STATE", self.path("state"));
        for name in ["ENV_FILE", "PROJECT", "QUOTA_IMAGE", "QUOTA_REPLICAS"] {
            command.env_remove(name);
        }
        command
    }

    fn upgrade_to(&self, image: &str) -> Output {
        let mut script = self.command("deploy/upgrade.sh");
        let output = script.env("QUOTA_IMAGE", image).output();
        output.expect("the script runs")
    }

    /// Returns the image and the status of each replica, by number.
    fn replicas(&self) -> BTreeMap<u32, String> {
        let containers = fs::read_dir(self.path("state/containers")).expect("a folder");
        let replicas = containers.filter_map(|container| {
            let path = container.expect("an entry").path();
            let read = |name: &str| {
                let text = fs::read_to_string(path.join(name)).ok()?;
                Some(text.trim().to_owned())
            };
            let number = read("number")?.parse().expect("a number");
            Some((number, format!("{} {}", read("image")?, read("status")?)))
        });
        replicas.collect()
    }

    /// Asserts that the replicas with these numbers run an image, and that there are no others.
    #[track_caller]
    fn assert_running<const N: usize>(&self, image: &str, numbers: [u32; N], output: &Output) {
        let expected = numbers.map(|number| (number, format!("{image} running")));
        assert_eq!(
            self.replicas(),
            BTreeMap::from(expected),
            "{}",
            text(output)
        );
    }
}

#[test]
fn upgrade_replaces_every_replica() {
    let installation = Installation::start();
    let upgraded = installation.upgrade_to("quota:new");
    assert!(upgraded.status.success(), "{}", text(&upgraded));
    installation.assert_running("quota:new", [3, 4], &upgraded);
}

/// While the first run is interrupted, one old replica is stopped, which Compose counts and would start again.
#[test]
fn upgrade_interrupted_while_it_stops_old_replicas_can_be_repeated() {
    let installation = Installation::start();
    installation.set("interrupt", "stop");
    let interrupted = installation.upgrade_to("quota:new");
    assert!(!interrupted.status.success(), "{}", text(&interrupted));
    let replicas = installation.replicas();
    assert_eq!(replicas[&1], "quota:old exited");
    assert_eq!(replicas.len(), 4, "{replicas:?}");

    let repeated = installation.upgrade_to("quota:new");
    assert!(repeated.status.success(), "{}", text(&repeated));
    installation.assert_running("quota:new", [3, 4], &repeated);
}

/// The first run is interrupted while it waits for replicas of an image that the second run does not use.
#[test]
fn upgrade_interrupted_before_the_new_replicas_are_healthy_can_be_repeated_with_another_image() {
    let installation = Installation::start();
    installation.set("interrupt", "up");
    let interrupted = installation.upgrade_to("quota:new");
    assert!(!interrupted.status.success(), "{}", text(&interrupted));
    assert_eq!(installation.replicas().len(), 4);

    let repeated = installation.upgrade_to("quota:newer");
    assert!(repeated.status.success(), "{}", text(&repeated));
    installation.assert_running("quota:newer", [5, 6], &repeated);
}

#[test]
fn upgrade_to_an_unhealthy_image_keeps_the_old_replicas() {
    let installation = Installation::start();
    installation.set("unhealthy", "quota:new");
    let failed = installation.upgrade_to("quota:new");
    assert!(!failed.status.success(), "{}", text(&failed));
    assert!(
        text(&failed).contains("is not healthy"),
        "{}",
        text(&failed)
    );
    installation.assert_running("quota:old", [1, 2], &failed);
}

/// The first run has already stopped an old replica when the new image stops working.
#[test]
fn repeated_upgrade_to_an_unhealthy_image_removes_no_replica_if_old_ones_were_stopped() {
    let installation = Installation::start();
    installation.set("interrupt", "stop");
    installation.upgrade_to("quota:new");
    installation.set("unhealthy", "quota:new");
    let failed = installation.upgrade_to("quota:new");
    assert!(!failed.status.success(), "{}", text(&failed));
    let replicas = installation.replicas();
    assert_eq!(
        replicas.keys().copied().collect::<Vec<_>>(),
        [2, 3, 4],
        "{}",
        text(&failed)
    );
}

/// Without its settings, an installation would run with the defaults: without billing, and on localhost.
#[test]
fn upgrade_requires_the_settings() {
    let installation = Installation::start();
    for file in ["deploy/.env.production", "no/such/file"] {
        let mut script = installation.command("deploy/upgrade.sh");
        let failed = script.env("ENV_FILE", file).output();
        let failed = failed.expect("the script runs");
        assert!(!failed.status.success(), "{}", text(&failed));
        assert!(text(&failed).contains(file), "{}", text(&failed));
        installation.assert_running("quota:old", [1, 2], &failed);
    }
    fs::remove_file(installation.path("deploy/.env.prod")).expect("removed");
    let failed = installation.upgrade_to("quota:new");
    assert!(text(&failed).contains(".env.prod"), "{}", text(&failed));
    installation.assert_running("quota:old", [1, 2], &failed);
}

/// The file is relative to the directory from which the script is started.
#[test]
fn upgrade_reads_the_settings_in_env_file() {
    let installation = Installation::start();
    fs::write(installation.path("other.env"), "QUOTA_IMAGE=quota:other\n").expect("written");
    let mut script = installation.command("deploy/upgrade.sh");
    let upgraded = script.env("ENV_FILE", "other.env").output();
    let upgraded = upgraded.expect("the script runs");
    assert!(upgraded.status.success(), "{}", text(&upgraded));
    installation.assert_running("quota:other", [3, 4], &upgraded);
}

/// The image is the same.
#[test]
fn upgrade_applies_changed_settings_and_the_number_of_replicas() {
    let installation = Installation::start();
    installation.configure("QUOTA_IMAGE=quota:old\nQUOTA_REPLICAS=3\n");
    let upgrade = |installation: &Installation| {
        let output = installation.command("deploy/upgrade.sh").output();
        let output = output.expect("the script runs");
        assert!(output.status.success(), "{}", text(&output));
        output
    };
    let upgraded = upgrade(&installation);
    installation.assert_running("quota:old", [3, 4, 5], &upgraded);

    // This run is interrupted before it stops the old replicas, and the settings are changed again.
    installation.set("interrupt", "up");
    let interrupted = installation.upgrade_to("quota:old");
    assert!(!interrupted.status.success(), "{}", text(&interrupted));
    installation.configure("QUOTA_IMAGE=quota:old\nQUOTA_REPLICAS=1\n");
    let upgraded = upgrade(&installation);
    installation.assert_running("quota:old", [9], &upgraded);
}

/// Otherwise, replicas that read the previous secret would keep running.
#[test]
fn upgrade_replaces_the_replicas_of_an_interrupted_run_if_a_secret_has_changed() {
    let installation = Installation::start();
    installation.set("interrupt", "up");
    let interrupted = installation.upgrade_to("quota:new");
    assert!(!interrupted.status.success(), "{}", text(&interrupted));
    let secret = installation.path("deploy/secrets/quota_secret");
    fs::write(secret, "another secret").expect("written");
    let repeated = installation.upgrade_to("quota:new");
    assert!(repeated.status.success(), "{}", text(&repeated));
    installation.assert_running("quota:new", [5, 6], &repeated);
}

/// A replica does not become healthy while it applies migrations, so they are applied before replicas are started.
#[test]
fn upgrade_applies_migrations_before_it_starts_replicas() {
    let installation = Installation::start();
    installation.set("unmigratable", "quota:new");
    let failed = installation.upgrade_to("quota:new");
    assert!(!failed.status.success(), "{}", text(&failed));
    assert!(
        text(&failed).contains("migrations failed"),
        "{}",
        text(&failed)
    );
    installation.assert_running("quota:old", [1, 2], &failed);

    installation.set("unmigratable", "");
    installation.set("calls", "");
    let upgraded = installation.upgrade_to("quota:new");
    assert!(upgraded.status.success(), "{}", text(&upgraded));
    let calls = fs::read_to_string(installation.path("state/calls")).expect("a log");
    let mut calls = calls.lines();
    let migrate = "run --rm --no-deps -T quota migrate of quota:new";
    assert_eq!(calls.next(), Some(migrate));
    assert!(calls.next().is_some_and(|call| call.starts_with("up ")));
    installation.assert_running("quota:new", [3, 4], &upgraded);
}
