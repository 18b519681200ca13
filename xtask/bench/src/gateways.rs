//! Requests per second through gateways that check every request with Quota, compared with the same gateways as plain
//! proxies, in the same run.
//!
//! The gateways take turns on one core. Quota, the API behind the gateways and the load share another core, so that the
//! figures show what the check costs the gateway. Quota is called without TLS: by Envoy's `ratelimit` filter over gRPC,
//! and otherwise over HTTP.

use std::{
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use quota_testkit::gateways::{Checked, Gateway, Program};
use tokio::runtime::Runtime;

use crate::{
    load::{CONNECTIONS, Load},
    process::{Cores, Server, cpu},
    replicas::tenant::{Plan, Tenant},
    rounds::median,
};

const WARM_UP: Duration = Duration::from_millis(500);
const MOST: u32 = 60_000_000;
/// The requests per second that nginx must reach with Quota on an otherwise idle machine.
const TARGET: u32 = 25_000;

const PROGRAMS: [(&str, Program); 6] = [
    ("nginx", Program::Nginx),
    ("HAProxy", Program::HaProxy),
    ("Caddy", Program::Caddy),
    ("Envoy, `ext_authz`", Program::Envoy),
    ("Envoy, `ratelimit`", Program::EnvoyRateLimit),
    ("Traefik", Program::Traefik),
];

#[derive(Args)]
pub(crate) struct Options {
    /// The `quota` binary, a release build
    quota: PathBuf,
    /// The directory to which gateways are downloaded
    #[arg(long)]
    tools: PathBuf,
    /// The number of rounds per case
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..=200))]
    rounds: u32,
    /// The length of a round in milliseconds
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(50..=5000))]
    millis: u64,
    /// Measure only gateways whose names contain this text
    #[arg(long)]
    only: Option<String>,
}

/// A gateway and its measurements: as a plain proxy, with checks that are all allowed, and with checks that are all
/// denied.
struct Case {
    name: &'static str,
    plain: Gateway,
    checked: Gateway,
    alone: Vec<Figures>,
    allowed: Vec<Figures>,
    denied: Vec<Figures>,
}

#[derive(Clone, Copy)]
struct Figures {
    per_second: f64,
    /// The gateway's CPU time per request, in microseconds.
    gateway: f64,
    /// Quota's CPU time per request, in microseconds.
    quota: f64,
}

/// The load, the server and the keys of all rounds.
struct Bench {
    load: Load,
    quota: Server,
    /// A key whose limits are never reached.
    ample: String,
    /// A key whose limits are always reached.
    scant: String,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let cores = Cores::pick();
    // The API and Quota share the load's core.
    let beside = cores.map(|it| Cores {
        servers: it.load,
        load: it.load,
    });
    let api = Server::bare("hyper", beside)?;
    let settings = [
        ("QUOTA_DIRECT_RESPONSES", "on".to_owned()),
        ("QUOTA_GRPC_LISTEN", "127.0.0.1:0".to_owned()),
    ];
    let quota = Server::quota(&options.quota, "info", beside, &settings)?;
    let grpc = quota.grpc_addr.context("the gRPC listener is off")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (ample, scant, token) = runtime.block_on(keys(quota.addr))?;

    let mut cases = Vec::new();
    for (name, program) in PROGRAMS {
        if options.only.as_ref().is_some_and(|it| !name.contains(it)) {
            continue;
        }
        let is_grpc = program == Program::EnvoyRateLimit;
        let checked = Checked {
            quota_port: if is_grpc { grpc } else { quota.addr }.port(),
            root: None,
            token: &token,
            api: api.addr,
            script_fault: None,
        };
        let start = |runtime: &Runtime| {
            runtime.block_on(async {
                let plain = program.start_plain(api.addr, &options.tools).await;
                (plain, program.start(&checked, &options.tools).await)
            })
        };
        let (plain, checked) = Cores::starting(cores, || Ok(start(&runtime)))?;
        cases.push(Case {
            name,
            plain,
            checked,
            alone: Vec::new(),
            allowed: Vec::new(),
            denied: Vec::new(),
        });
    }
    ensure!(!cases.is_empty(), "no gateway has such a name");

    let bench = Bench {
        load: Load::new()?,
        quota,
        ample,
        scant,
    };
    let time = Duration::from_millis(options.millis);
    for case in &mut cases {
        bench.round(case, WARM_UP)?;
        case.forget();
    }
    for round in 0..options.rounds {
        eprintln!("round {} of {}", round + 1, options.rounds);
        for case in &mut cases {
            bench.round(case, time)?;
        }
    }
    print(&cases, options.rounds, time, cores);
    Ok(())
}

/// Creates the two keys, and the gateways' service token.
async fn keys(server: SocketAddr) -> Result<(String, String, String)> {
    let tenant = Tenant::register(server).await?;
    let ample = tenant
        .key_on(server, &Plan::new("ample", MOST, MOST))
        .await?;
    let scant = tenant.key_on(server, &Plan::new("scant", 1, 1)).await?;
    let token = tenant.service_token(server).await?;
    Ok((
        ample.text.to_str()?.to_owned(),
        scant.text.to_str()?.to_owned(),
        token.to_str()?.to_owned(),
    ))
}

impl Case {
    fn forget(&mut self) {
        for figures in [&mut self.alone, &mut self.allowed, &mut self.denied] {
            figures.clear();
        }
    }
}

impl Bench {
    /// Measures a gateway as a plain proxy, and then with allowed and denied requests.
    fn round(&self, case: &mut Case, time: Duration) -> Result<()> {
        let measure = |gateway, key, status| {
            self.measure(gateway, key, status, time)
                .with_context(|| case.name)
        };
        let alone = measure(&case.plain, &self.ample, 200)?;
        let allowed = measure(&case.checked, &self.ample, 200)?;
        let denied = measure(&case.checked, &self.scant, 429)?;
        case.alone.push(alone);
        case.allowed.push(allowed);
        case.denied.push(denied);
        Ok(())
    }

    fn measure(
        &self,
        gateway: &Gateway,
        key: &str,
        status: u16,
        time: Duration,
    ) -> Result<Figures> {
        let request = format!(
            "GET /orders HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: quota-bench\r\nAccept: */*\r\n\
             X-API-Key: {key}\r\n\r\n"
        );
        let pid = gateway.process.pid();
        let (gateway_before, quota_before) = (cpu(pid)?, self.quota.cpu()?);
        let began = Instant::now();
        let statuses = self.load.put(gateway.addr, time, request.as_bytes())?;
        let took = began.elapsed();
        let gateway = cpu(pid)?.saturating_sub(gateway_before);
        let quota = self.quota.cpu_when_idle()?.saturating_sub(quota_before);
        self.quota.empty_log()?;
        let total = statuses.values().sum::<u64>();
        let right = statuses.get(&status).copied().unwrap_or(0);
        // At one request per minute, at most two requests are allowed during a round.
        if total == 0 || right + u64::from(status == 429) * 2 < total {
            bail!("unexpected responses: {statuses:?}");
        }
        #[expect(clippy::cast_precision_loss, reason = "fewer requests than 2^52")]
        let total = total as f64;
        Ok(Figures {
            per_second: total / took.as_secs_f64(),
            gateway: gateway.as_secs_f64() * 1e6 / total,
            quota: quota.as_secs_f64() * 1e6 / total,
        })
    }
}

fn print(cases: &[Case], rounds: u32, time: Duration, cores: Option<Cores>) {
    println!(
        "| gateway | alone, requests/s | allowed by Quota | share | denied by Quota | CPU µs alone | CPU µs, allowed | \
         CPU µs of Quota |"
    );
    println!("|---|---:|---:|---:|---:|---:|---:|---:|");
    for case in cases {
        let per_second = |it: &[Figures]| median(it.iter().map(|it| it.per_second));
        let gateway = |it: &[Figures]| median(it.iter().map(|it| it.gateway));
        // Compare per round, because a disturbance affects both cases of a round.
        let pairs = case.allowed.iter().zip(&case.alone);
        let share = median(pairs.map(|(it, alone)| it.per_second / alone.per_second));
        println!(
            "| {} | {:.0} | {:.0} | {share:.2} | {:.0} | {:.1} | {:.1} | {:.1} |",
            case.name,
            per_second(&case.alone),
            per_second(&case.allowed),
            per_second(&case.denied),
            gateway(&case.alone),
            gateway(&case.allowed),
            median(case.allowed.iter().map(|it| it.quota)),
        );
    }
    println!();
    println!(
        "Medians of {rounds} rounds of {} ms, with the cases taking turns; {CONNECTIONS} keep-alive connections. {} Quota \
         responds directly, and is called over plain HTTP; its CPU time includes what it does after the load, but not \
         the CPU time of PostgreSQL. Target: nginx with at most {} CPU µs per allowed \
         request, which is {TARGET} requests/s on its core.",
        time.as_millis(),
        match cores {
            Some(Cores { servers, load }) => format!(
                "The gateway runs on core {servers}; Quota, the API and the load run on core {load}."
            ),
            None => "Nothing is pinned to a core on this machine, so the figures are less precise."
                .to_owned(),
        },
        1_000_000 / TARGET,
    );
}
