//! Redis crashes, freezes, fails over, and goes silent under load.
//!
//! There are keys for each fallback setting, and all of them are used in the same processes at the same time. Some keys
//! are used above their limit, to test the envelope. Other keys are used below their limit, on strict plans: they need
//! Redis for every decision, so their latency shows the loss of Redis.

use std::{mem::replace, time::Duration};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use quota_testkit::{
    proxy::{Fault, FaultProxy, Upstream},
    redis::RedisServer,
    redis_group::SentinelGroup,
};
use tokio::time::{Instant, sleep_until};

use super::{
    Options,
    drive::{Arrival, Attempt, drive},
    keep_log,
    schedule::{Spread, Steady, drained_then, nanos, together},
    stage::{Recount, Stage, context, lateness, millis, quantile, slack},
    table::Table,
    tenant::{Plan, knows},
};

const COLUMNS: &[&str] = &[
    "fault",
    "plan",
    "sent",
    "admitted",
    "excess, tokens",
    "served",
    "p99 before, ms",
    "p99 first second, ms",
    "p99 after it, ms",
    "recovered after, ms",
    "degraded later",
    "5xx",
    "no response",
];
const REPLICAS: usize = 3;
/// When the fault occurs.
const FAULT_AT: Duration = Duration::from_secs(4);
/// The time from the last write that the future master receives until the fault.
const MISSED: Duration = Duration::from_millis(1500);
/// The maximum time until all replicas have detected the loss of Redis.
const DISCOVERY: Duration = Duration::from_secs(1);
const AFTERWARDS: Duration = Duration::from_secs(6);
/// An outage is over once there has been no degraded response for this long.
const WELL: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// Killed with -9 and restarted empty after two seconds
    Kill,
    /// Frozen for ten seconds, keeping its state
    Freeze,
    /// A replica without the latest writes is promoted
    Failover,
    /// All connections go silent for five seconds
    BlackHole,
    /// The connections of one replica go silent
    Partial,
}

impl Kind {
    const ALL: [Self; 5] = [
        Self::Kill,
        Self::Freeze,
        Self::Failover,
        Self::BlackHole,
        Self::Partial,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Kill => "killed, restarted empty",
            Self::Freeze => "frozen",
            Self::Failover => "failed over, writes lost",
            Self::BlackHole => "silent",
            Self::Partial => "silent for one replica",
        }
    }

    /// Returns the maximum duration of the fault.
    fn lasts(self) -> Duration {
        Duration::from_secs(match self {
            Self::Kill => 2,
            Self::Freeze => 10,
            Self::Failover => 8,
            Self::BlackHole | Self::Partial => 5,
        })
    }
}

pub(crate) async fn run(options: &Options) -> Result<Table> {
    let mut table = Table::new("Losing Redis under load", COLUMNS);
    ensure!(!options.no_redis, "this table requires Redis");
    let kinds = match &options.fault[..] {
        [] if options.quick => &[Kind::Kill],
        [] => &Kind::ALL[..],
        chosen => chosen,
    };
    let mut late = Vec::new();
    for kind in kinds {
        late.extend(one(options, *kind, &mut table).await?);
    }
    table.notes.push(format!(
        "{REPLICAS} replicas. Excess is defined as in the table of limits, over the whole run; `open` has no envelope \
         while Redis is unreachable, and `share` adds the share of the only replica that has lost Redis. Latency is \
         measured by the client, from sending the request to the head of the response. Recovered is the time from \
         when Redis was available again to the last degraded or 503 response that was followed by a second without \
         any; those after that second are listed as degraded later. {}",
        lateness(&late),
    ));
    Ok(table)
}

/// A key: its plan, and whether its load is below its limit.
struct Role {
    plan: Plan,
    light: bool,
}

fn roles(modes: bool) -> Vec<Role> {
    let role = |mode: &'static str, strict, light| {
        let (rpm, burst) = if light { (60_000, 2000) } else { (6000, 200) };
        let words = [
            mode,
            if strict { " strict" } else { "" },
            if light { " below its limit" } else { "" },
        ];
        Role {
            plan: Plan {
                strict,
                on_redis_failure: modes.then_some(mode),
                ..Plan::new(words.concat(), rpm, burst)
            },
            light,
        }
    };
    let mut roles = vec![
        role("share", false, false),
        role("share", true, false),
        role("share", true, true),
    ];
    if modes {
        roles.extend([
            role("closed", false, false),
            role("closed", true, true),
            role("open", false, false),
            role("open", true, true),
        ]);
    }
    roles
}

fn load(roles: &[Role], time: Duration) -> Vec<Arrival> {
    together(roles.iter().enumerate().map(|(key, role)| {
        let rate = f64::from(role.plan.rpm) / 60.0;
        let steady = Steady {
            key,
            from: Duration::ZERO,
            per_second: if role.light { rate * 0.15 } else { rate * 2.0 },
            count: 0,
            spread: Spread::Random(key as u64),
        };
        if role.light {
            steady.lasting(time).arrivals(REPLICAS).collect()
        } else {
            let limit = (role.plan.rpm, role.plan.burst);
            drained_then(steady, REPLICAS, limit, 1000.0, time)
        }
    }))
}

/// Redis, and the proxies in front of it.
enum World {
    Plain(RedisServer),
    Proxied {
        /// Keeps Redis running: dropping it stops the server.
        _redis: RedisServer,
        proxies: Vec<FaultProxy>,
    },
    Watched(SentinelGroup),
}

impl World {
    async fn make(kind: Kind) -> Self {
        if kind == Kind::Failover {
            return Self::Watched(SentinelGroup::start().await);
        }
        let redis = RedisServer::start().await;
        match kind {
            Kind::BlackHole | Kind::Partial => {
                let mut proxies = Vec::new();
                for _ in 0..REPLICAS {
                    proxies.push(FaultProxy::start(Upstream::Tcp(redis.addr())).await);
                }
                Self::Proxied {
                    _redis: redis,
                    proxies,
                }
            }
            _ => Self::Plain(redis),
        }
    }

    /// Returns the `REDIS_URL` of each replica.
    fn urls(&self) -> Vec<String> {
        match self {
            Self::Plain(redis) => vec![redis.url(); REPLICAS],
            Self::Proxied { proxies, .. } => {
                let url = |proxy: &FaultProxy| format!("redis://{}/0", proxy.addr());
                proxies.iter().map(url).collect()
            }
            Self::Watched(group) => vec![group.url(); REPLICAS],
        }
    }
}

async fn one(options: &Options, kind: Kind, table: &mut Table) -> Result<Vec<Attempt>> {
    let mut world = World::make(kind).await;
    let stage = Stage::around(options, REPLICAS, world.urls(), None, &[]).await?;
    stage.settle(Duration::ZERO).await?;
    let modes = knows(stage.fleet.addrs()[0], "on_redis_failure").await?;
    let roles = roles(modes);
    let plans: Vec<Plan> = roles.iter().map(|role| role.plan.clone()).collect();
    let keys = stage.keys_on(&plans).await?;
    let load = load(&roles, FAULT_AT + kind.lasts() + AFTERWARDS);
    let targets = stage.targets(&keys);
    let origin = Instant::now();
    let (log, back) = tokio::try_join!(
        drive(&targets, &load, origin),
        happen(kind, &mut world, origin)
    )?;
    keep_log(options, &format!("faults-{kind:?}"), &log)?;
    for (key, role) in roles.iter().enumerate() {
        tell(options, kind, key, role, back, &log, table);
    }
    stage.end().await?;
    Ok(log)
}

/// Causes the fault and ends it. Returns the time from `origin` until Redis was available again.
async fn happen(kind: Kind, world: &mut World, origin: Instant) -> Result<Duration> {
    let (begin, over) = (origin + FAULT_AT, origin + FAULT_AT + kind.lasts());
    match world {
        World::Plain(redis) => {
            sleep_until(begin).await;
            if kind == Kind::Kill {
                redis.kill().await;
                sleep_until(over).await;
                redis.restart().await;
            } else {
                redis.stop();
                sleep_until(over).await;
                redis.cont();
            }
        }
        World::Proxied { proxies, .. } => {
            let silent = if kind == Kind::Partial { 1 } else { REPLICAS };
            sleep_until(begin).await;
            for proxy in &proxies[..silent] {
                proxy.set(Fault::BlackHole);
            }
            sleep_until(over).await;
            for proxy in &proxies[..silent] {
                // Bytes are missing from these TCP streams. A real network never causes this, so close the streams.
                proxy.cut();
                proxy.set(Fault::Pass);
            }
        }
        World::Watched(group) => {
            let [first, second] = &mut group.servers;
            sleep_until(
                begin
                    .checked_sub(MISSED)
                    .context("the fault begins too early")?,
            )
            .await;
            // The master has no password and rejects clients that send one. Therefore, the replica cannot reconnect and
            // misses later writes.
            second
                .command("CONFIG SET masterauth no-such-password")
                .await;
            first.command("CLIENT KILL TYPE replica").await;
            sleep_until(begin).await;
            first.kill().await;
            group.failed_over().await;
            ensure!(Instant::now() < over, "the failover took too long");
        }
    }
    Ok(origin.elapsed())
}

/// Returns a plan whose envelope applies to `plan` during a fault. If all replicas lose Redis, this is `plan` itself.
fn promised(kind: Kind, plan: &Plan) -> Plan {
    match kind {
        Kind::Partial => with_share_of_one(plan, REPLICAS),
        _ => plan.clone(),
    }
}

/// Returns a plan whose envelope applies while one of several replicas has lost Redis and the others have not: unless
/// its fallback setting is `closed`, the replica without Redis allows its share in addition to what the others allow
/// together.
pub(crate) fn with_share_of_one(plan: &Plan, replicas: usize) -> Plan {
    let mut plan = plan.clone();
    if plan.on_redis_failure != Some("closed") {
        let replicas = u32::try_from(replicas).unwrap_or(u32::MAX);
        plan.rpm += plan.rpm.div_ceil(replicas);
        plan.burst += plan.burst.div_ceil(replicas);
    }
    plan
}

/// Returns the time from `back` to the last degraded response of the outage for a key, or `None` if there is no such
/// response. Also returns the responses that were degraded after the outage.
fn recovery<'a>(
    own: impl Iterator<Item = &'a Attempt>,
    back: u64,
) -> (Option<Duration>, Vec<&'a Attempt>) {
    let degraded = own.filter(|it| (it.degraded || it.status == 503) && it.answered >= back);
    let mut degraded: Vec<_> = degraded.collect();
    degraded.sort_unstable_by_key(|it| it.answered);
    let mut last = back;
    let during = degraded
        .iter()
        .take_while(|it| it.answered - replace(&mut last, it.answered) < nanos(WELL))
        .count();
    let later = degraded.split_off(during);
    let ended = degraded.last().map(|it| it.answered - back);
    (ended.map(Duration::from_nanos), later)
}

fn tell(
    options: &Options,
    kind: Kind,
    key: usize,
    role: &Role,
    back: Duration,
    log: &[Attempt],
    table: &mut Table,
) {
    let plan = &role.plan;
    let recount = Recount::of(
        key,
        &promised(kind, plan),
        slack(plan, options.lease_ttl()),
        log,
    );
    let own = || log.iter().filter(move |it| it.key == key);
    let p99 = |from: Duration, to: Duration| {
        let (from, to) = (nanos(from), nanos(to));
        let inside = own().filter(|it| (from..to).contains(&it.sent));
        let times: Vec<_> = inside.map(Attempt::took).collect();
        (!times.is_empty()).then(|| quantile(times, 0.99))
    };
    let cell = |time: Option<Duration>| time.map_or("-".to_owned(), millis);
    let known = FAULT_AT + DISCOVERY;
    let (discovering, afterwards) = (p99(FAULT_AT, known), p99(known, back.max(known)));
    let what = format!("{}, {}", kind.name(), plan.name);
    let (recovered, later) = recovery(own(), nanos(back));
    for it in &later {
        table.notes.push(format!(
            "Degraded later: {what}, {} after {} ms, {} ms after Redis was available again.",
            it.status,
            millis(it.took()),
            millis(Duration::from_nanos(it.answered - nanos(back))),
        ));
    }
    let promises = plan.on_redis_failure != Some("open");
    if promises && recount.is_over() {
        table.faults.push(context(&what, &recount));
    }
    if plan.on_redis_failure != Some("closed") && recount.failed > 0 {
        let failed = recount.failed;
        table
            .faults
            .push(format!("{what}: {failed} responses with 5xx"));
    }
    for (name, time, aim) in [
        ("p99 of the first second", discovering, 60),
        ("p99 after it", afterwards, 5),
        ("recovery", recovered, 2000),
    ] {
        if let Some(time) = time.filter(|time| *time > Duration::from_millis(aim)) {
            let note = format!(
                "Above the target of {aim} ms: {what}, {name}, {} ms.",
                millis(time)
            );
            table.notes.push(note);
        }
    }
    table.row(vec![
        kind.name().to_owned(),
        plan.name.clone(),
        recount.sent.to_string(),
        recount.admitted.to_string(),
        format!("{:+.3}", recount.excess()),
        format!("{:.1}%", recount.served() * 100.0),
        cell(p99(FAULT_AT / 2, FAULT_AT)),
        cell(discovering),
        cell(afterwards),
        cell(recovered),
        later.len().to_string(),
        recount.failed.to_string(),
        recount.silent.to_string(),
    ]);
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn answered(ms: u64, degraded: bool) -> Attempt {
        Attempt {
            key: 0,
            replica: 0,
            cost: 1,
            due: 0,
            sent: 0,
            answered: ms * MS,
            status: 429,
            retry_after: None,
            degraded,
        }
    }

    #[test]
    fn an_outage_is_over_after_a_second_without_degraded_responses() {
        let log = [
            answered(900, true),
            answered(1500, true),
            answered(1700, false),
            answered(2400, true),
            answered(3400, true),
            answered(3500, true),
        ];
        let (ended, later) = recovery(log.iter(), 1000 * MS);
        assert_eq!(ended, Some(Duration::from_millis(1400)));
        let later: Vec<_> = later.iter().map(|it| it.answered / MS).collect();
        assert_eq!(later, [3400, 3500]);
        assert_eq!(recovery(log.iter(), 4000 * MS).0, None);
    }
}
