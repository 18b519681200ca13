//! `cargo xtask deb`: packages the server as .deb.
//!
//! The files are staged in a folder and packed by `dpkg-deb`. `deploy/debian` contains the maintainer scripts, which
//! create the user, the directories and the secret.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    console, machine,
    optimized::{self, Linking},
    postgres::Throwaway,
    read, root, say, succeed, system, target,
};

const CONFIG: &str = "/etc/quota/quota.env";

pub(crate) fn deb(binary: Option<PathBuf>, test: bool) -> Result<()> {
    let binary = match binary {
        Some(binary) => binary,
        None => compile()?,
    };
    let package = pack(&binary, &version()?, &target().join("deb"))?;
    println!("{}", package.display());
    if test {
        try_out(&package, &binary)?;
    }
    Ok(())
}

fn compile() -> Result<PathBuf> {
    console::build()?;
    optimized::build(Linking::Dynamic)
}

fn version() -> Result<String> {
    let manifest: toml::Table = toml::from_str(&fs::read_to_string(root().join("Cargo.toml"))?)?;
    let version = manifest["workspace"]["package"]["version"].as_str();
    Ok(version.context("the workspace has no version")?.to_owned())
}

/// Packs the server. Returns the path of the package.
fn pack(binary: &Path, version: &str, folder: &Path) -> Result<PathBuf> {
    let staged = folder.join("staged");
    let _ = fs::remove_dir_all(&staged);
    let deploy = root().join("deploy");
    let place = |from: &Path, to: &str, mode: u32| -> Result<()> {
        let to = staged.join(to);
        fs::create_dir_all(to.parent().context("the file is not in a directory")?)?;
        fs::copy(from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
        fs::set_permissions(&to, fs::Permissions::from_mode(mode))?;
        Ok(())
    };
    place(binary, "usr/bin/quota", 0o755)?;
    succeed(Command::new("strip").arg(staged.join("usr/bin/quota")))?;
    for unit in ["quota.service", "quota@.service"] {
        let to = format!("lib/systemd/system/{unit}");
        place(&deploy.join("systemd").join(unit), &to, 0o644)?;
    }
    place(&deploy.join("debian/quota.env"), &CONFIG[1..], 0o644)?;
    for (script, mode) in [
        ("backup.sh", 0o755),
        ("restore.sh", 0o755),
        ("rotate-secret.sh", 0o755),
        ("backup-common.sh", 0o644),
    ] {
        place(
            &deploy.join(script),
            &format!("usr/share/quota/{script}"),
            mode,
        )?;
    }
    for file in ["alerts.yml", "grafana.json", "prometheus.yml"] {
        let to = format!("usr/share/quota/monitoring/{file}");
        place(&deploy.join("monitoring").join(file), &to, 0o644)?;
    }
    for (from, to) in [
        (".env.example", "env.example"),
        ("docs/OPERATIONS.md", "OPERATIONS.md"),
        ("docs/RUNBOOK.md", "RUNBOOK.md"),
        ("docs/METRICS.md", "METRICS.md"),
        ("LICENSE", "copyright"),
    ] {
        place(
            &root().join(from),
            &format!("usr/share/doc/quota/{to}"),
            0o644,
        )?;
    }
    for script in ["postinst", "prerm", "postrm"] {
        place(
            &deploy.join("debian").join(script),
            &format!("DEBIAN/{script}"),
            0o755,
        )?;
    }
    fs::write(staged.join("DEBIAN/conffiles"), format!("{CONFIG}\n"))?;
    let architecture = read(Command::new("dpkg").arg("--print-architecture"))?;
    let size = read(
        Command::new("du")
            .args(["--summarize", "--block-size=1024"])
            .arg(&staged),
    )?;
    let control = fs::read_to_string(deploy.join("debian/control"))?
        .replace("@VERSION@", version)
        .replace("@ARCHITECTURE@", architecture.trim())
        .replace("@SIZE@", size.split_whitespace().next().unwrap_or("0"));
    fs::write(staged.join("DEBIAN/control"), control)?;
    // Directories must be world-readable, regardless of the umask.
    succeed(
        Command::new("chmod")
            .args(["--recursive", "u=rwX,go=rX"])
            .arg(&staged),
    )?;
    let package = folder.join(format!("quota_{version}_{}.deb", architecture.trim()));
    let pack = ["--build", "--root-owner-group", "-Zxz"];
    succeed(
        Command::new("dpkg-deb")
            .args(pack)
            .arg(&staged)
            .arg(&package)
            .stdout(Stdio::null()),
    )?;
    fs::remove_dir_all(&staged)?;
    Ok(package)
}

/// A minimal Debian system in a folder. The folder is deleted on drop.
struct Root(PathBuf);

impl Drop for Root {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Root {
    fn create() -> Result<Self> {
        let suite =
            read(Command::new("sh").args(["-c", ". /etc/os-release; echo $VERSION_CODENAME"]))?;
        let sites = [
            "indextargets",
            "--format",
            "$(SITE)",
            "Created-By: Packages",
        ];
        let sites = read(Command::new("apt-get").args(sites))?;
        let mirror = sites
            .lines()
            .find(|line| line.trim_end_matches('/').ends_with("/debian"))
            .context("no Debian package source is configured")?;
        let folder = Path::new("/tmp").join(format!("quota-deb-{}", std::process::id()));
        let root = Self(folder);
        say("creating a minimal Debian to install the package in (about a minute)");
        succeed(
            Command::new("debootstrap")
                .args(["--variant=minbase", suite.trim()])
                .arg(&root.0)
                .arg(mirror)
                .stdout(Stdio::null()),
        )?;
        Ok(root)
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.join(path.trim_start_matches('/'))
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        read(
            Command::new("chroot")
                .arg(&self.0)
                .arg(program)
                .args(arguments),
        )
    }

    fn install(&self, package: &Path) -> Result<String> {
        fs::copy(package, self.path("/quota.deb"))?;
        self.run("dpkg", &["--install", "/quota.deb"])
    }

    /// Returns the owner, group and mode of a file.
    fn stat(&self, path: &str) -> Result<String> {
        Ok(self
            .run("stat", &["--format", "%U:%G %a", path])?
            .trim()
            .to_owned())
    }
}

/// A running server that the package installed. Killed on drop.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Installs, starts, upgrades and removes the package in a minimal Debian system.
fn try_out(package: &Path, binary: &Path) -> Result<()> {
    machine::install(&[machine::POSTGRES, machine::DEBOOTSTRAP])?;
    ensure!(system::is_root(), "installing a package requires root");
    let root = Root::create()?;
    let installed = root.install(package)?;
    ensure!(
        installed.contains("systemctl enable --now quota"),
        "{installed}"
    );
    for (path, expected) in [
        ("/usr/bin/quota", "root:root 755"),
        ("/var/lib/quota", "quota:quota 700"),
        ("/etc/quota/secrets", "root:root 700"),
        ("/etc/quota/secrets/quota_secret", "root:root 600"),
        ("/etc/quota/secrets/quota_secret_previous", "root:root 600"),
        (CONFIG, "root:root 644"),
    ] {
        let found = root.stat(path)?;
        ensure!(found == expected, "{path}: {found}, expected {expected}");
    }
    for unit in ["quota.service", "quota@8081.service"] {
        let file = unit.replace("8081", "");
        ensure!(
            root.path(&format!("/lib/systemd/system/{file}")).exists(),
            "no {file}"
        );
    }
    verify_units(&root)?;
    serve(&root)?;
    let secret = fs::read_to_string(root.path("/etc/quota/secrets/quota_secret"))?;
    ensure!(
        secret.len() >= 40,
        "the secret has {} characters",
        secret.len()
    );

    // An upgrade keeps settings and secrets, and restarts the servers one after another.
    let changed = "QUOTA_REGISTRATION=open\n";
    fs::write(root.path(CONFIG), changed)?;
    let next = format!("{}+next", version()?);
    let newer = pack(binary, &next, &target().join("deb/test"))?;
    let calls = upgrade(&root, &newer)?;
    let restarts = calls.lines().filter(|call| call.contains("restart"));
    ensure!(
        restarts.eq(["restart quota@8081.service", "restart quota@8082.service"]),
        "{calls}"
    );
    ensure!(fs::read_to_string(root.path(CONFIG))? == changed);
    ensure!(fs::read_to_string(root.path("/etc/quota/secrets/quota_secret"))? == secret);
    let found = root.run(
        "dpkg-query",
        &["--show", "--showformat=${Version}", "quota"],
    )?;
    ensure!(found == next, "{found} is installed");

    root.run("dpkg", &["--remove", "quota"])?;
    ensure!(!root.path("/usr/bin/quota").exists(), "the binary is left");
    ensure!(
        !root.path("/lib/systemd/system/quota.service").exists(),
        "the unit is left"
    );
    ensure!(root.path(CONFIG).exists(), "removing deletes the settings");
    let purged = root.run("dpkg", &["--purge", "quota"])?;
    ensure!(!root.path(CONFIG).exists(), "purging keeps the settings");
    ensure!(purged.contains("/var/lib/quota is kept"), "{purged}");
    ensure!(fs::read_to_string(root.path("/etc/quota/secrets/quota_secret"))? == secret);
    say("the package was installed, started, upgraded, removed and purged");
    Ok(())
}

/// Checks the installed units with `systemd-analyze`.
fn verify_units(root: &Root) -> Result<()> {
    if system::on_path("systemd-analyze").is_none() {
        say("skipped: systemd-analyze is not installed, so the units were not verified");
        return Ok(());
    }
    for unit in ["quota.service", "quota@.service"] {
        let output = Command::new("systemd-analyze")
            .args(["verify", "--man=no", "--recursive-errors=no"])
            .arg(format!("--root={}", root.0.display()))
            .arg(format!("/lib/systemd/system/{unit}"))
            .output()
            .context("cannot run systemd-analyze")?;
        let text = String::from_utf8_lossy(&output.stderr);
        let about = text.lines().filter(|line| line.contains("quota"));
        let about = about.collect::<Vec<_>>();
        ensure!(
            output.status.success() && about.is_empty(),
            "{unit}: {text}"
        );
    }
    Ok(())
}

/// Runs the unit's command as the unit's user, with its secrets, until it serves requests.
fn serve(root: &Root) -> Result<()> {
    let unit = fs::read_to_string(root.path("/lib/systemd/system/quota.service"))?;
    let line = unit
        .lines()
        .find_map(|line| line.strip_prefix("ExecStart="));
    let command = line.context("the unit starts nothing")?;
    let database = Throwaway::start()?;
    let url = database.url();
    // The URL contains the directory of the socket, percent-encoded, and the port.
    let socket = url
        .split_once('@')
        .and_then(|(_, rest)| rest.split_once(':'));
    let socket = socket.context("no socket in the URL")?.0;
    let socket = socket.replace("%2F", "/");
    fs::create_dir_all(root.path(&socket))?;
    // Only the user that runs PostgreSQL has access to the socket. Give the unit's user access as well.
    let user = fs::metadata(root.path("/var/lib/quota"))?;
    chown(&socket, None, Some(user.gid()))?;
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o710))?;
    let file = Path::new(&socket).join(".s.PGSQL.5432");
    chown(file, Some(user.uid()), None)?;
    let credentials = root.path("/run/credentials");
    fs::create_dir_all(&credentials)?;
    for secret in ["quota_secret", "quota_secret_previous"] {
        let to = credentials.join(format!("secrets_{secret}"));
        fs::copy(root.path("/etc/quota/secrets").join(secret), &to)?;
    }
    fs::write(credentials.join("secrets_database_url"), &url)?;
    succeed(Command::new("chroot").arg(&root.0).args([
        "chown",
        "--recursive",
        "quota:quota",
        "/run/credentials",
    ]))?;
    // Use a separate mount namespace, so that the mount disappears when the server exits.
    let script = "mount --bind \"$1\" \"$2$1\" && root=$2 && shift 2 && exec chroot --userspec=quota:quota \"$root\" \"$@\"";
    let child = Command::new("unshare")
        .args([
            "--mount",
            "--propagation=private",
            "sh",
            "-c",
            script,
            "sh",
            &socket,
        ])
        .arg(&root.0)
        .args(command.split_whitespace())
        .args(["--listen", "127.0.0.1:18099", "--metrics-listen", "off"])
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("DATABASE_URL_FILE", "/run/credentials/secrets_database_url")
        .env("QUOTA_SECRET_FILE", "/run/credentials/secrets_quota_secret")
        .env(
            "QUOTA_SECRET_PREVIOUS_FILE",
            "/run/credentials/secrets_quota_secret_previous",
        )
        .stdout(fs::File::create(root.path("/server.log"))?)
        .stderr(fs::File::create(root.path("/server.err"))?)
        .spawn()
        .context("cannot run unshare")?;
    let mut server = Server(child);
    let health = || {
        let mut health = Command::new("chroot");
        health.arg(&root.0).args(["/usr/bin/quota", "health"]);
        health
            .env("QUOTA_LISTEN", "127.0.0.1:18099")
            .stderr(Stdio::null());
        health.status().is_ok_and(|status| status.success())
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    while !health() {
        let ended = server.0.try_wait()?;
        if ended.is_some() || Instant::now() > deadline {
            let error = fs::read_to_string(root.path("/server.err"))?;
            let log = fs::read_to_string(root.path("/server.log"))?;
            bail!("the server does not start ({ended:?}): {error}{log}");
        }
        sleep(Duration::from_millis(200));
    }
    let found = root.stat("/var/lib/quota/usage")?;
    ensure!(
        found.starts_with("quota:quota "),
        "/var/lib/quota/usage: {found}"
    );
    let pid = i32::try_from(server.0.id())?;
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid),
        nix::sys::signal::Signal::SIGTERM,
    )?;
    let status = server.0.wait()?;
    ensure!(status.success(), "the server stopped with {status}");
    Ok(())
}

/// Installs a newer package on a system where systemd appears to run two servers. Returns the calls to `systemctl`, one
/// per line.
fn upgrade(root: &Root, package: &Path) -> Result<String> {
    fs::create_dir_all(root.path("/run/systemd/system"))?;
    let systemctl = "#!/bin/sh\n\
        echo \"$*\" >> /systemctl.log\n\
        case \"$1\" in list-units) echo 'quota@8081.service loaded active'; echo 'quota@8082.service loaded active' ;; esac\n";
    let quota = "#!/bin/sh\necho \"health $QUOTA_LISTEN\" >> /systemctl.log\n";
    for (path, script) in [("/usr/bin/systemctl", systemctl), ("/healthy", quota)] {
        fs::write(root.path(path), script)?;
        fs::set_permissions(root.path(path), fs::Permissions::from_mode(0o755))?;
    }
    // The servers are not really running, so their health check is replaced as well.
    root.run(
        "dpkg-divert",
        &["--quiet", "--local", "--add", "--rename", "/usr/bin/quota"],
    )?;
    fs::rename(root.path("/healthy"), root.path("/usr/bin/quota"))?;
    root.install(package)?;
    fs::remove_file(root.path("/usr/bin/quota"))?;
    root.run(
        "dpkg-divert",
        &[
            "--quiet",
            "--local",
            "--remove",
            "--rename",
            "/usr/bin/quota",
        ],
    )?;
    let calls = fs::read_to_string(root.path("/systemctl.log"))?;
    let second = calls.split_once("restart quota@8082.service");
    let (before, after) = second.context("the second server is not restarted")?;
    ensure!(before.contains("health 127.0.0.1:8081"), "{calls}");
    ensure!(after.contains("health 127.0.0.1:8082"), "{calls}");
    Ok(calls)
}
