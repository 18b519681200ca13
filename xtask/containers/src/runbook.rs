//! The first six steps of `docs/RUNBOOK.md`, on a machine with nothing but Debian: a container with a container engine
//! of its own.
//!
//! Runs the runbook's commands unchanged, except that the domain and the key are filled in, and the image is loaded
//! instead of built. Between the steps, additional commands do what a container requires and a machine does not. They
//! make control groups writable, start the engine in place of a service manager, and trust Caddy's own certificate
//! authority. They use this checkout instead of the published repository, and images of the outer engine instead of a
//! registry. `curl` creates the plan and the key, in place of a person at the console.

use std::{fs, process::Stdio, time::Instant};

use anyhow::{Context as _, Result, ensure};

use crate::{
    engine::{Engine, read, succeed},
    image, root,
};

/// The time that the runbook promises, in minutes.
const MINUTES: f64 = 15.0;
const DOMAIN: &str = "quota.localhost";
const IMAGES: [&str; 3] = ["postgres:17", "redis:8", "caddy:2.11"];

/// The privileges that the container engine inside the container needs. `--privileged` is not used, because it fails if
/// root itself lacks a capability.
const RIGHTS: [&str; 12] = [
    "--cap-add",
    "ALL",
    "--cap-drop",
    "SYS_RESOURCE",
    "--security-opt",
    "seccomp=unconfined",
    "--security-opt",
    "apparmor=unconfined",
    "--security-opt",
    "systempaths=unconfined",
    "--device-cgroup-rule",
    "a *:* rwm",
];

/// The container that takes the place of the machine. Deleted on drop.
struct Machine<'a> {
    engine: &'a Engine,
    name: String,
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        let remove = ["rm", "--force", "--volumes", &self.name];
        if let Err(error) = succeed(&mut self.engine.docker(&remove)) {
            eprintln!("{error:#}");
        }
    }
}

pub fn test(engine: &Engine) -> Result<()> {
    let folder = tempfile::tempdir()?;
    image::clone_of(&folder.path().join("quota"))?;
    for (file, images) in [
        ("quota.tar", &["quota:local"][..]),
        ("images.tar", &IMAGES[..]),
    ] {
        let save = engine
            .docker(&["save", "--output"])
            .arg(folder.path().join(file))
            .args(images)
            .status()?;
        ensure!(save.success(), "cannot save {images:?}");
    }
    let text = fs::read_to_string(root().join("docs/RUNBOOK.md"))?;
    fs::write(folder.path().join("runbook.sh"), script(&text)?)?;

    let machine = Machine {
        engine,
        name: format!("quota-machine-{}", std::process::id()),
    };
    let mut run = engine.docker(&["run", "--detach", "--name", &machine.name]);
    run.args(RIGHTS);
    // The engine inside the container cannot store its layers on a layered file system, so its data is on a volume.
    run.args(["--volume", "/var/lib/docker", "--volume"])
        .arg(format!("{}:/mnt:ro", folder.path().display()));
    succeed(run.args(["debian:bookworm-slim", "sleep", "infinity"]))?;
    let began = Instant::now();
    let exec = ["exec", "--workdir", "/root", &machine.name];
    let mut bash = engine.docker(&exec);
    bash.args(["bash", "-euo", "pipefail", "/mnt/runbook.sh"]);
    let output = read(bash.env("LANG", "C").stdin(Stdio::null()))?;
    let minutes = began.elapsed().as_secs_f64() / 60.0;
    println!(
        "the runbook, from a machine with nothing but Debian to a limited request: {minutes:.1} minutes"
    );
    for line in output.lines().filter_map(|it| it.strip_prefix("MARK ")) {
        println!("  {line}");
    }
    ensure!(minutes < MINUTES, "the runbook promises {MINUTES}");
    Ok(())
}

/// Returns a script with the runbook's commands and the additional commands that a container requires.
fn script(text: &str) -> Result<String> {
    let blocks = |step: u8| {
        let (_, section) = text.split_once(&format!("\n## {step}. "))?;
        let section = section.split("\n## ").next()?;
        let blocks = section.split("```sh\n").skip(1);
        let blocks = blocks.filter_map(|it| Some(it.split_once("\n```")?.0.to_owned()));
        Some(blocks.collect::<Vec<_>>())
    };
    let mut steps = Vec::new();
    for step in 1..=6 {
        let blocks = blocks(step).with_context(|| format!("no step {step}"))?;
        let blocks: Vec<_> = blocks
            .iter()
            .map(|it| it.replace("<your domain>", DOMAIN))
            .collect();
        steps.push(blocks);
    }
    let [install, image, settings, start, account, limit] = &steps[..] else {
        anyhow::bail!("not six steps");
    };
    let ([install], [build, load], [settings], [start], [account], [limit]) = (
        &install[..],
        &image[..],
        &settings[..],
        &start[..],
        &account[..],
        &limit[..],
    ) else {
        anyhow::bail!("a step has an unexpected number of commands");
    };
    // Omit the command that builds the image. The runbook describes an image built elsewhere as an alternative.
    let (clone, _) = build
        .split_once("\nDOCKER_BUILDKIT=1 docker build")
        .context("the second command of step 2 builds the image")?;
    let limit = limit.replace("qk_…", "$key");
    let limit = limit.replace('\'', "\"");
    let password = "violet-harbour-quilt-93";
    Ok(format!(
        r#"
mark() {{ echo "MARK $SECONDS s: $*"; }}
export DEBIAN_FRONTEND=noninteractive
{install}
mark installed
mount -o remount,rw /sys
for group in /sys/fs/cgroup /sys/fs/cgroup/*/; do
  if mountpoint --quiet "$group"; then mount -o remount,bind,rw "$group"; fi
done
dockerd > /var/log/dockerd.log 2>&1 &
for _ in $(seq 60); do docker version > /dev/null 2>&1 && break; sleep 1; done
docker load --quiet --input /mnt/images.tar
cp /mnt/quota.tar .
git config --global url."file:///mnt/quota".insteadOf https://github.com/quota-rs/quota
git config --global --add safe.directory '*'
{clone}
mv ../quota.tar .
{load}
mark the images are loaded
{settings}
{start}
healthy() {{ docker ps --filter health=healthy --quiet | wc -l; }}
for _ in $(seq 120); do [ "$(healthy)" = 5 ] && break; sleep 1; done
[ "$(healthy)" = 5 ]
mark every service is healthy
caddy=$(docker ps --quiet --filter label=com.docker.compose.service=caddy)
docker cp "$caddy:/data/caddy/pki/authorities/local/root.crt" /usr/local/share/ca-certificates/caddy.crt
update-ca-certificates > /dev/null
{account} <<< '{password}'
api=https://{DOMAIN}/api
field() {{ grep -o "\"$1\":\"[^\"]*\"" | head -1 | cut -d'"' -f4; }}
json() {{ curl --fail-with-body --silent --show-error -H 'Content-Type: application/json' -H "Authorization: Bearer ${{token:-}}" "$@"; }}
token=$(json "$api/auth/login" -d '{{"email":"you@example.com","password":"{password}"}}' | field access_token)
plan=$(json "$api/admin/plans" -d '{{"name":"Starter","default_rpm":60,"burst":5}}' | field id)
key=$(json "$api/admin/api-keys" -d "{{\"name\":\"first\",\"plan_id\":\"$plan\"}}" | field key)
mark the key is created
answer=$({limit})
echo "$answer"
grep -q ' 200' <<< "$answer"
grep -qi '^ratelimit: "rpm";r=4' <<< "$answer"
mark the first limited request
for _ in $(seq 10); do answer=$({limit}); done
echo "$answer"
grep -q ' 429' <<< "$answer"
grep -qi '^retry-after: ' <<< "$answer"
mark the first denied request
"#
    ))
}
