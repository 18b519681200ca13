//! Builds and checks the server's image.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    engine::{Engine, read, succeed},
    root,
};

/// The maximum size of the image, in MB.
const SIZE: f64 = 35.0;

/// An image to build.
pub struct Image<'a> {
    pub tag: &'a str,
    /// The directory of the source.
    pub source: &'a Path,
    /// A binary to copy into the image instead of compiling one inside.
    pub binary: Option<&'a Path>,
    /// The value of the image's label. A different label results in a different image.
    pub revision: &'a str,
}

impl Image<'_> {
    /// Builds the image and prints its size.
    pub fn build(&self, engine: &Engine) -> Result<()> {
        let began = Instant::now();
        let mut build = engine.docker(&["build", "--quiet", "--tag", self.tag]);
        build
            .arg("--file")
            .arg(self.source.join("deploy/Dockerfile"))
            .args([
                "--build-arg",
                &format!("VERSION={}", env!("CARGO_PKG_VERSION")),
                "--build-arg",
                &format!("REVISION={}", self.revision),
            ]);
        if let Some(binary) = self.binary {
            put_binary(binary, self.source)?;
            build.args(["--build-arg", "BINARY=prebuilt"]);
        }
        let built = succeed(build.arg(self.source));
        let _ = fs::remove_dir_all(self.source.join("deploy/bin"));
        built?;
        println!(
            "image {}: {:.1} MB, built in {:.0} s",
            self.tag,
            size(engine, self.tag)?,
            began.elapsed().as_secs_f64()
        );
        Ok(())
    }
}

/// Copies a binary, without its symbols, to the path at which the Dockerfile expects a binary that was built outside
/// the image.
pub fn put_binary(binary: &Path, source: &Path) -> Result<()> {
    let folder = source.join("deploy/bin");
    fs::create_dir_all(&folder)?;
    succeed(
        Command::new("strip")
            .arg("-o")
            .arg(folder.join("quota"))
            .arg(binary),
    )
}

fn size(engine: &Engine, tag: &str) -> Result<f64> {
    let size = engine.read(&["image", "inspect", "--format", "{{.Size}}", tag])?;
    let size: f64 = size.trim().parse()?;
    Ok(size / 1e6)
}

/// Checks that the image is small, has no shell, does not run as root, and works without a network, without
/// capabilities and on a read-only file system.
pub fn check(engine: &Engine, image: &Image<'_>) -> Result<()> {
    let tag = image.tag;
    let size = size(engine, tag)?;
    // A binary that was compiled elsewhere may be unoptimized.
    ensure!(
        size <= SIZE || image.binary.is_some(),
        "{tag} has {size:.1} MB, more than {SIZE}"
    );
    let user = engine.read(&["image", "inspect", "--format", "{{.Config.User}}", tag])?;
    ensure!(user.trim() == "65532:65532", "{tag} runs as {user}");
    let shell = engine
        .docker(&["run", "--rm", "--entrypoint", "/bin/sh", tag, "-c", "true"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    ensure!(!shell.success(), "{tag} has a shell");
    let run = ["run", "--rm", "--network", "none", "--read-only"];
    let limits = ["--cap-drop", "ALL", "--security-opt", "no-new-privileges"];
    let mut program = engine.docker(&run);
    let settings = read(program.args(limits).args([tag, "env-example"]))?;
    ensure!(settings.contains("QUOTA_LISTEN"), "{settings}");
    Ok(())
}

/// Two images, one of which replaces the other under load.
pub struct Upgrade {
    pub from: &'static str,
    pub to: &'static str,
    /// Whether the images contain different versions.
    pub is_skewed: bool,
}

/// Builds the second image that an upgrade requires. If `from` is set, it is an image of that earlier commit, to
/// upgrade from. Otherwise, it is an image of this version with a different label, to upgrade to.
pub fn upgrade(
    engine: &Engine,
    folder: &Path,
    built: &Image<'_>,
    from: Option<&str>,
) -> Result<Upgrade> {
    let Some(from) = from else {
        let next = Image {
            tag: "quota:next",
            revision: "next",
            ..*built
        };
        next.build(engine)?;
        return Ok(Upgrade {
            from: "quota:local",
            to: "quota:next",
            is_skewed: false,
        });
    };
    let commit = if from == "migration" {
        before_newest_migration()?
    } else {
        git(&["rev-parse", "--verify", from])?
    };
    let subject = git(&["show", "--no-patch", "--format=%h %cs %s", &commit])?;
    println!("upgrading from {subject}");
    let clone = folder.join("previous");
    let head = Command::new("git")
        .arg("-C")
        .arg(&clone)
        .args(["rev-parse", "HEAD"])
        .output()?;
    if String::from_utf8_lossy(&head.stdout).trim() != commit {
        let _ = fs::remove_dir_all(&clone);
        clone_of(&clone)?;
        let checkout = ["checkout", "--quiet", &commit];
        succeed(Command::new("git").arg("-C").arg(&clone).args(checkout))?;
    }
    // Compile outside the image. Inside the image, all dependencies would be compiled again.
    let target =
        env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    succeed(
        Command::new("cargo")
            .current_dir(&clone)
            .env("CARGO_TARGET_DIR", &target)
            .args(["build", "--locked", "--quiet"])
            .args(["--package", "quota-server", "--bin", "quota"]),
    )?;
    let previous = Image {
        tag: "quota:previous",
        source: built.source,
        binary: Some(&target.join("debug/quota")),
        revision: &commit,
    };
    previous.build(engine)?;
    Ok(Upgrade {
        from: "quota:previous",
        to: "quota:local",
        is_skewed: true,
    })
}

/// Clones this repository. Uncommitted changes are not part of the clone.
pub fn clone_of(folder: &Path) -> Result<()> {
    succeed(
        Command::new("git")
            .args(["clone", "--quiet", "--no-local"])
            .arg(root())
            .arg(folder),
    )
}

fn git(arguments: &[&str]) -> Result<String> {
    let output = read(Command::new("git").arg("-C").arg(root()).args(arguments))?;
    Ok(output.trim().to_owned())
}

/// Returns the last commit that does not contain the newest migration.
fn before_newest_migration() -> Result<String> {
    let mut migrations = Vec::new();
    for entry in fs::read_dir(root().join("migrations"))? {
        migrations.push(entry?.file_name());
    }
    let newest = migrations.into_iter().max().context("no migrations")?;
    let path = format!("migrations/{}", newest.to_string_lossy());
    let added = ["log", "--diff-filter=A", "--format=%H", "--", &path];
    let added = git(&added)?;
    let added = added.lines().last().context("it is not committed")?;
    git(&["rev-parse", "--verify", &format!("{added}^")])
}
