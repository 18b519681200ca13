//! The cost of a request: CPU time, throughput, latency, memory and calls to Redis. In each round, all servers take
//! turns on one core, with the load on another core: first with 100 keys whose requests are all allowed, then with one
//! key whose requests are almost all denied.

use std::{
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::unistd::Pid;
use quota_testkit::redis::RedisServer;
use serde_json::json;
use tokio::runtime::Runtime;

use super::{
    MOST, Options,
    drive::{Plan, drive},
    peer::{AMPLE, LIMITED, Peer, Program, get},
    windows::{count, latencies, quantile},
};
use crate::{
    http1,
    load::CONNECTIONS,
    memory::resident,
    process::{Cores, Server, cpu},
    replicas::counters::Counters,
    rounds::median,
};

const WARM_UP: Duration = Duration::from_millis(500);
const KEYS: usize = 100;
const ECHO: &str = "/v1/echo";
/// The limit of the key whose requests are denied, per minute.
const DENIED_LIMIT: u32 = 1;

/// The number of loads: one of allowed requests and one of denied requests.
const SITUATIONS: usize = 2;

struct Contender {
    name: &'static str,
    server: Running,
    redis: Option<(RedisServer, Counters)>,
    /// The requests of the two loads.
    requests: [Vec<Vec<u8>>; SITUATIONS],
    figures: [Vec<Figures>; SITUATIONS],
}

enum Running {
    Ours(Server),
    Peer(Peer),
}

#[derive(Clone, Copy)]
struct Figures {
    micros: f64,
    per_second: f64,
    p50: f64,
    p99: f64,
    /// Calls to Redis per 1,000 requests.
    calls: f64,
}

/// The medians of one server and load.
pub(crate) struct Medians {
    pub(crate) micros: f64,
    /// The CPU time per request, divided by that of the bare handler in the same rounds.
    pub(crate) ratio: f64,
    pub(crate) per_second: f64,
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) calls: Option<f64>,
}

pub(crate) struct Row {
    pub(crate) name: &'static str,
    /// The medians for each of the two loads.
    pub(crate) medians: [Medians; SITUATIONS],
    /// Resident memory, in MiB.
    pub(crate) memory: f64,
}

/// Returns a row for each server, starting with the bare handler, and the reasons why servers are missing.
pub(crate) fn run(
    options: &Options,
    runtime: &Runtime,
    cores: Option<Cores>,
) -> Result<(Vec<Row>, Vec<String>)> {
    let mut missing = Vec::new();
    let mut contenders = vec![bare(cores)?];
    for (name, is_shared, is_direct) in [
        ("Quota, memory", false, true),
        ("Quota, memory, without direct responses", false, false),
        ("Quota, Redis", true, true),
        ("Quota, Redis, without direct responses", true, false),
    ] {
        if options.includes(name) {
            let redis = redis(runtime, is_shared)?;
            contenders.push(quota(&options.quota, name, redis, is_direct, cores)?);
        }
    }
    for (name, program, is_shared) in [
        ("nginx `limit_req`", Program::Nginx, false),
        ("HAProxy stick table", Program::HaProxy, false),
        (
            "Fastify, rate-limiter-flexible, memory",
            Program::Fastify,
            false,
        ),
        (
            "Fastify, rate-limiter-flexible, Redis",
            Program::Fastify,
            true,
        ),
        (
            "FastAPI, slowapi, memory",
            Program::FastApi("fixed-window"),
            false,
        ),
        (
            "FastAPI, slowapi, Redis",
            Program::FastApi("fixed-window"),
            true,
        ),
        ("limitador, memory", Program::Limitador("memory"), false),
        ("limitador, Redis", Program::Limitador("redis"), true),
        (
            "limitador, Redis cached",
            Program::Limitador("redis_cached"),
            true,
        ),
    ] {
        if !options.includes_program(name, program) {
            continue;
        }
        let redis = redis(runtime, is_shared)?;
        match peer(options, name, program, redis, cores) {
            Ok(contender) => contenders.push(contender),
            Err(error) => missing.push(format!("{name} was not measured: {error:#}")),
        }
    }
    measure(options, runtime, &mut contenders)?;
    let poem = contenders[0].figures.clone();
    let rows = contenders.iter().map(|it| it.row(&poem));
    Ok((rows.collect::<Result<_>>()?, missing))
}

fn measure(options: &Options, runtime: &Runtime, contenders: &mut [Contender]) -> Result<()> {
    for contender in &mut *contenders {
        for situation in 0..SITUATIONS {
            // With a new Redis, Quota starts with empty buckets, so it may deny requests during the warm-up.
            let _ = contender.round(runtime, situation, WARM_UP);
            contender.figures[situation].clear();
        }
    }
    let time = Duration::from_millis(options.millis);
    for round in 0..options.rounds {
        eprintln!("round {} of {}", round + 1, options.rounds);
        for situation in 0..SITUATIONS {
            for contender in &mut *contenders {
                contender.round(runtime, situation, time)?;
            }
        }
    }
    Ok(())
}

fn bare(cores: Option<Cores>) -> Result<Contender> {
    let requests = vec![get(ECHO, "key")];
    Ok(Contender {
        name: "bare poem",
        server: Running::Ours(Server::bare("poem", cores)?),
        redis: None,
        requests: [requests.clone(), requests],
        figures: Default::default(),
    })
}

fn redis(runtime: &Runtime, is_shared: bool) -> Result<Option<(RedisServer, Counters)>> {
    if !is_shared {
        return Ok(None);
    }
    runtime.block_on(async {
        let redis = RedisServer::start().await;
        let counters = Counters::of(&redis.url()).await?;
        Ok(Some((redis, counters)))
    })
}

fn quota(
    binary: &Path,
    name: &'static str,
    redis: Option<(RedisServer, Counters)>,
    is_direct: bool,
    cores: Option<Cores>,
) -> Result<Contender> {
    let mut settings = Vec::new();
    if let Some((redis, _)) = &redis {
        settings.push(("REDIS_URL", redis.url()));
        // With the default timeout, a slow response on a busy machine would count as an outage of Redis.
        settings.push(("QUOTA_REDIS_TIMEOUT", "250ms".to_owned()));
    }
    if !is_direct {
        settings.push(("QUOTA_DIRECT_RESPONSES", "off".to_owned()));
    }
    let server = Server::quota(binary, "info", cores, &settings)?;
    let (ample, scant) = quota_keys(server.addr)?;
    Ok(Contender {
        name,
        server: Running::Ours(server),
        redis,
        requests: [
            ample.iter().map(|key| get(ECHO, key)).collect(),
            vec![get(ECHO, &scant)],
        ],
        figures: Default::default(),
    })
}

/// Creates keys whose limit is never reached, and a key whose requests are denied.
fn quota_keys(server: SocketAddr) -> Result<(Vec<String>, String)> {
    let account =
        json!({"email": "bench@example.com", "password": "correct horse battery staple 47"});
    let account = http1::json(server, "POST", "/auth/register", None, &account)?;
    let token = account["access_token"].as_str();
    let token = token.context("no access token")?;
    let create = |path, body| http1::json(server, "POST", path, Some(token), &body);
    let plan = |name: &str, rate: u32| {
        create(
            "/admin/plans",
            json!({"name": name, "default_rpm": rate, "burst": rate}),
        )
    };
    let key = |plan: &serde_json::Value| {
        let key = create(
            "/admin/api-keys",
            json!({"name": "bench", "plan_id": plan["id"]}),
        )?;
        let text = key["key"].as_str().context("no key")?;
        anyhow::Ok(text.to_owned())
    };
    let ample = plan("ample", MOST)?;
    let scant = plan("scant", DENIED_LIMIT)?;
    let keys = (0..KEYS).map(|_| key(&ample)).collect::<Result<_>>()?;
    Ok((keys, key(&scant)?))
}

fn peer(
    options: &Options,
    name: &'static str,
    program: Program,
    redis: Option<(RedisServer, Counters)>,
    cores: Option<Cores>,
) -> Result<Contender> {
    let url = redis.as_ref().map(|(redis, _)| redis.url());
    let start = || Peer::start(program, options, DENIED_LIMIT, url.as_deref());
    let server = Cores::starting(cores, start)?;
    // The keys are as long as Quota's keys.
    let key = |n: usize| format!("qk_{n:038}");
    Ok(Contender {
        name,
        server: Running::Peer(server),
        redis,
        requests: [
            (0..KEYS).map(|n| program.request(AMPLE, &key(n))).collect(),
            vec![program.request(LIMITED, &key(KEYS))],
        ],
        figures: Default::default(),
    })
}

impl Running {
    fn addr(&self) -> SocketAddr {
        match self {
            Self::Ours(server) => server.addr,
            Self::Peer(peer) => peer.addr,
        }
    }

    fn pid(&self) -> Result<Pid> {
        match self {
            Self::Ours(server) => server.pid(),
            Self::Peer(peer) => Ok(peer.pid()),
        }
    }

    /// Returns the CPU time that the server has used so far. Quota stores the usage of a round later. This is a part of
    /// the requests' cost, and must not disturb the next server.
    fn cpu_at_end(&self) -> Result<Duration> {
        match self {
            Self::Ours(server) => server.cpu_when_idle(),
            Self::Peer(peer) => cpu(peer.pid()),
        }
    }

    fn empty_log(&self) -> Result<()> {
        match self {
            Self::Ours(server) => server.empty_log().map(|_| ()),
            Self::Peer(peer) => peer.empty_log(),
        }
    }
}

impl Contender {
    fn round(&mut self, runtime: &Runtime, situation: usize, time: Duration) -> Result<()> {
        let plan = Plan {
            servers: vec![self.server.addr()],
            requests: self.requests[situation].clone(),
            connections: usize::try_from(CONNECTIONS)?,
            pace: None,
            time,
        };
        let pid = self.server.pid()?;
        let calls = self.calls(runtime)?;
        let (before, began) = (cpu(pid)?, Instant::now());
        let log = runtime.block_on(drive(&plan))?;
        let took = began.elapsed();
        let calls = self.calls(runtime)?.saturating_sub(calls);
        let used = self.server.cpu_at_end()?.saturating_sub(before);
        self.server.empty_log()?;
        let (allowed, denied) = (count(&log, 200), count(&log, 429));
        let is_right = match situation {
            0 => denied == 0,
            // At the start of a minute, a request is allowed. The bare server denies nothing.
            _ => self.name == "bare poem" || allowed * 20 <= denied,
        };
        let total = allowed + denied;
        ensure!(
            is_right && total > 0 && total == log.len() as u64,
            "{}: of {} requests, {allowed} were allowed and {denied} were denied",
            self.name,
            log.len()
        );
        let latencies = latencies(&log);
        #[expect(clippy::cast_precision_loss, reason = "fewer than 2^52")]
        let (total, calls) = (total as f64, calls as f64);
        self.figures[situation].push(Figures {
            micros: used.as_secs_f64() * 1e6 / total,
            per_second: total / took.as_secs_f64(),
            p50: quantile(&latencies, 0.5),
            p99: quantile(&latencies, 0.99),
            calls: calls * 1e3 / total,
        });
        Ok(())
    }

    /// Returns the number of calls to Redis so far.
    fn calls(&mut self, runtime: &Runtime) -> Result<u64> {
        match &mut self.redis {
            Some((_, counters)) => runtime.block_on(counters.scripts()),
            None => Ok(0),
        }
    }

    fn row(&self, poem: &[Vec<Figures>; SITUATIONS]) -> Result<Row> {
        let medians = |situation: usize| {
            let figures = &self.figures[situation];
            let of = |value: fn(&Figures) -> f64| median(figures.iter().map(value));
            // Compare per round, because a disturbance affects both servers.
            let pairs = figures.iter().zip(&poem[situation]);
            Medians {
                micros: of(|it| it.micros),
                ratio: median(pairs.map(|(it, poem)| it.micros / poem.micros)),
                per_second: of(|it| it.per_second),
                p50: of(|it| it.p50),
                p99: of(|it| it.p99),
                calls: self.redis.is_some().then(|| of(|it| it.calls)),
            }
        };
        Ok(Row {
            name: self.name,
            medians: [medians(0), medians(1)],
            memory: mebibytes(resident(self.server.pid()?)?),
        })
    }
}

#[expect(clippy::cast_precision_loss, reason = "fewer bytes than 2^52")]
fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
