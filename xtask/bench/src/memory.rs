//! The memory of a cached key: the growth of the server's resident memory while every key is used once. The files of
//! usage records, which the server maps, do not count.
//!
//! Four servers run one after another: with and without Redis, each with keys on a plan with and without quotas. The
//! keys are inserted into the database directly, because creating them over HTTP would take longer.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use nix::unistd::Pid;
use quota_server::secret_text::{Kind, SecretText};
use quota_testkit::redis::RedisServer;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::sleep,
};
use tokio_postgres::Client;

use crate::{
    http1,
    load::echo,
    postgres::Postgres,
    process::Server,
    replicas::tenant::{Plan, Tenant},
};

const CONNECTIONS: usize = 64;
/// The number of keys per statement.
const BATCH: usize = 10_000;
/// The number of keys that are used before the first measurement. They are used for as many requests as the other keys,
/// so that the measurement includes what the server allocates for requests and their usage.
const WARM_UP: usize = 2_000;
/// How often to send a request that is not allowed, and the pause before each repetition.
const ATTEMPTS: u32 = 20;
const PAUSE: Duration = Duration::from_millis(500);
/// How long the server is idle before each measurement. It drops the state of idle keys every 10 s.
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

/// What the limits of a key are counted in, and which limits it has.
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
    let secrets = insert(&client, &plan, keys + WARM_UP).await?;
    let (warm_up, measured) = secrets.split_at(WARM_UP);
    let pid = server.pid()?;
    for _ in 0..keys.div_ceil(WARM_UP) {
        use_each(server.addr, warm_up).await?;
    }
    sleep(SETTLES).await;
    let before = anonymous(pid)?;
    use_each(server.addr, measured).await?;
    sleep(SETTLES).await;
    Ok((before, anonymous(pid)?))
}

/// Inserts keys on the plan, and returns their secrets.
async fn insert(client: &Client, plan: &str, count: usize) -> Result<Vec<String>> {
    let mut secrets = Vec::with_capacity(count);
    while secrets.len() < count {
        let batch = (0..BATCH.min(count - secrets.len()))
            .map(|_| SecretText::generate(Kind::ApiKey))
            .collect::<Result<Vec<_>, _>>()?;
        let prefixes = batch.iter().map(SecretText::prefix).collect::<Vec<_>>();
        let hashes = batch
            .iter()
            .map(|it| it.hash().to_vec())
            .collect::<Vec<_>>();
        client
            .execute(
                "INSERT INTO api_keys (tenant_id, id, plan_id, name, prefix, key_hash) \
                 SELECT plan.tenant_id, gen_random_uuid(), plan.id, 'Memory', new.prefix, new.hash \
                 FROM plans AS plan, unnest($2::text[], $3::bytea[]) AS new (prefix, hash) \
                 WHERE plan.id = $1::text::uuid",
                &[&plan, &prefixes, &hashes],
            )
            .await?;
        secrets.extend(batch.iter().map(SecretText::reveal));
    }
    client.batch_execute("VACUUM ANALYZE api_keys").await?;
    Ok(secrets)
}

/// Sends one request with each key.
async fn use_each(server: SocketAddr, secrets: &[String]) -> Result<()> {
    let mut connections = JoinSet::new();
    for part in secrets.chunks(secrets.len().div_ceil(CONNECTIONS)) {
        connections.spawn(connection(server, part.to_vec()));
    }
    while let Some(done) = connections.join_next().await {
        done??;
    }
    Ok(())
}

async fn connection(server: SocketAddr, secrets: Vec<String>) -> Result<()> {
    let mut stream = TcpStream::connect(server).await?;
    stream.set_nodelay(true)?;
    let mut bytes = vec![0; 16 << 10];
    for secret in secrets {
        // On a busy machine, a lookup or a call to Redis may take too long.
        for attempt in 1.. {
            let status = send(&mut stream, &mut bytes, &secret).await?;
            if status == 200 {
                break;
            }
            ensure!(
                attempt < ATTEMPTS && matches!(status, 429 | 503),
                "a request got {status}"
            );
            sleep(PAUSE).await;
        }
    }
    Ok(())
}

/// Sends one request, and returns the status of the response.
async fn send(stream: &mut TcpStream, bytes: &mut [u8], secret: &str) -> Result<u16> {
    stream.write_all(&echo(secret)).await?;
    let mut read = 0;
    loop {
        let n = stream.read(&mut bytes[read..]).await?;
        ensure!(n > 0, "the server closed a connection");
        read += n;
        if let Some((status, _)) = http1::answer(&bytes[..read])? {
            return Ok(status);
        }
    }
}

/// Returns a process's resident memory in bytes.
pub(crate) fn resident(pid: Pid) -> Result<u64> {
    status(pid, "VmRSS:")
}

/// Returns a process's resident memory in bytes, without its program and the files that it maps.
fn anonymous(pid: Pid) -> Result<u64> {
    status(pid, "RssAnon:")
}

/// Returns an amount of memory from the status that the kernel reports.
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
