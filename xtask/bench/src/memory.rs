//! The memory of a cached key: the growth of the server's resident memory while every key is used once. Memory-mapped
//! usage files are not counted.
//!
//! Four servers run one after another: with and without Redis, and, in each case, with and without quotas. The keys are
//! inserted into the database directly, because creating them over HTTP would take longer.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::Args;
use nix::unistd::Pid;
use quota_testkit::redis::RedisServer;
use tokio::time::sleep;

use crate::{
    many_keys::{insert, use_each},
    postgres::Postgres,
    process::Server,
    replicas::tenant::{Plan, Tenant},
};

const CONNECTIONS: usize = 64;
/// The number of keys that are used before the first measurement. They are used for at least as many requests as all
/// other keys together. Therefore, the server has already allocated memory for requests and their usage before the
/// first measurement.
const WARM_UP: usize = 2_000;
/// How long the server is idle before each measurement. The server drops the state of idle keys every 10 s.
const SETTLES: Duration = Duration::from_secs(12);

#[derive(Args)]
pub(crate) struct Options {
    /// The `quota` binary, a release build
    quota: PathBuf,
    /// The directory of `initdb` and `postgres`
    #[arg(long)]
    programs: PathBuf,
    /// The number of keys
    #[arg(default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1_000..=5_000_000))]
    keys: u32,
}

/// Whether limits are counted in Redis, and whether keys have quotas.
#[derive(Clone, Copy)]
struct Case {
    has_redis: bool,
    has_quotas: bool,
}

impl Case {
    const ALL: [Self; 4] = [
        Self::of(false, false),
        Self::of(false, true),
        Self::of(true, false),
        Self::of(true, true),
    ];

    const fn of(has_redis: bool, has_quotas: bool) -> Self {
        Self {
            has_redis,
            has_quotas,
        }
    }

    const fn name(self) -> &'static str {
        match (self.has_redis, self.has_quotas) {
            (false, false) => "memory, no quotas",
            (false, true) => "memory, daily and monthly quotas",
            (true, false) => "Redis, no quotas",
            (true, true) => "Redis, daily and monthly quotas",
        }
    }
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let keys = usize::try_from(options.keys)?;
        println!("| limits in | MiB before | MiB after | bytes per key |");
        println!("|---|---:|---:|---:|");
        for case in Case::ALL {
            let (before, after) = measure(options, case, keys).await?;
            println!(
                "| {} | {} | {} | {} |",
                case.name(),
                before >> 20,
                after >> 20,
                after.saturating_sub(before) / u64::from(options.keys)
            );
        }
        println!();
        println!(
            "The growth of the server's resident memory, without mapped files, while {keys} keys on the same plan are \
             used once each, over {CONNECTIONS} connections, and {} s afterward.",
            SETTLES.as_secs()
        );
        Ok(ExitCode::SUCCESS)
    })
}

/// Returns the resident memory, without mapped files, before and after the keys are used.
async fn measure(options: &Options, case: Case, keys: usize) -> Result<(u64, u64)> {
    let postgres = Postgres::start(&options.programs).await?;
    let redis = if case.has_redis {
        Some(RedisServer::start().await)
    } else {
        None
    };
    let mut settings = vec![
        ("DATABASE_URL", postgres.url()),
        ("QUOTA_KEY_CACHE", (keys + WARM_UP).to_string()),
    ];
    settings.extend(redis.as_ref().map(|it| ("REDIS_URL", it.url())));
    let directives = "info,quota_server::access=off";
    let server = Server::quota(&options.quota, directives, None, &settings)?;
    let tenant = Tenant::register(server.addr).await?;
    let quota = case.has_quotas.then_some(1_000_000);
    let plan = Plan {
        daily: quota,
        monthly: quota,
        ..Plan::new("memory", 600, 600)
    };
    let plan = tenant.plan(server.addr, &plan).await?;
    let client = postgres.connect().await?;
    let secrets = insert(&client, &plan, 0..keys + WARM_UP, |_| "Memory".to_owned()).await?;
    let (warm_up, measured) = secrets.split_at(WARM_UP);
    let pid = server.pid()?;
    for _ in 0..keys.div_ceil(WARM_UP) {
        use_each(server.addr, warm_up, CONNECTIONS).await?;
    }
    sleep(SETTLES).await;
    let before = anonymous(pid)?;
    use_each(server.addr, measured, CONNECTIONS).await?;
    sleep(SETTLES).await;
    Ok((before, anonymous(pid)?))
}

/// Returns a process's resident memory in bytes.
pub(crate) fn resident(pid: Pid) -> Result<u64> {
    status(pid, "VmRSS:")
}

/// Returns a process's resident memory in bytes, without its program and the files that it maps.
fn anonymous(pid: Pid) -> Result<u64> {
    status(pid, "RssAnon:")
}

/// Returns an amount of memory from the process status that the kernel reports.
fn status(pid: Pid, name: &str) -> Result<u64> {
    let path = Path::new("/proc").join(pid.to_string()).join("status");
    let status = fs::read_to_string(path)?;
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let kib: u64 = line
        .context("the process has no memory")?
        .trim()
        .trim_end_matches(" kB")
        .parse()?;
    Ok(kib << 10)
}
