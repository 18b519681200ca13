//! Measures the time from the response that confirms a change until every replica applies the change.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use http::{HeaderValue, Method, Request, header};
use http_body_util::{BodyExt as _, Full};
use serde_json::json;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use super::{
    Options,
    drive::{Sender, connect},
    stage::{Stage, millis, quantile},
    table::Table,
    tenant::{Key, Plan, Tenant},
};

const COLUMNS: &[&str] = &[
    "channel",
    "change",
    "count",
    "p50, ms",
    "p99, ms",
    "slowest, ms",
    "fell back",
];
const REPLICAS: usize = 3;
const AT_ONCE: usize = 8;
/// The interval between requests to the same replica.
const PAUSE: Duration = Duration::from_millis(3);
const PATIENCE: Duration = Duration::from_secs(10);
/// The documented maximum time until a change applies.
const PROMISE: Duration = Duration::from_secs(1);
const BURSTS: (u32, u32) = (100_000, 200_000);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Channel {
    /// Everything works.
    Whole,
    /// All subscriptions are closed every 20 ms.
    Cut,
    /// Redis does not respond.
    Frozen,
}

impl Channel {
    fn name(self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Cut => "cut every 20 ms",
            Self::Frozen => "Redis frozen",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    Deactivation,
    /// Activating a key that was deactivated before.
    Activation,
    Plan,
    Deletion,
}

impl Change {
    const ALL: [Self; 4] = [
        Self::Deactivation,
        Self::Activation,
        Self::Plan,
        Self::Deletion,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Deactivation => "deactivation",
            Self::Activation => "activation",
            Self::Plan => "plan change",
            Self::Deletion => "deletion",
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Seen {
    change: Change,
    /// The time until the slowest replica applied the change.
    after: Duration,
    /// Whether a replica returned to the old state afterward.
    fell_back: bool,
}

pub(crate) async fn run(options: &Options) -> Result<Table> {
    let mut table = Table::new("Time until a change applies on every replica", COLUMNS);
    let channels: &[Channel] = if options.no_redis {
        &[Channel::Whole]
    } else {
        &[Channel::Whole, Channel::Cut, Channel::Frozen]
    };
    // Each round has one change of each kind.
    let rounds = if options.quick { 4 } else { 256 };
    for &channel in channels {
        let stage = Stage::set(options, REPLICAS, &[]).await?;
        let all = under(channel, stage, rounds).await?;
        for change in Change::ALL {
            let seen = || all.iter().filter(move |it| it.change == change);
            let times: Vec<Duration> = seen().map(|it| it.after).collect();
            let slowest = quantile(times.clone(), 1.0);
            let fell_back = seen().filter(|it| it.fell_back).count();
            let what = format!("channel {}, {}", channel.name(), change.name());
            if slowest > PROMISE {
                let slowest = millis(slowest);
                table
                    .faults
                    .push(format!("{what}: applied after {slowest} ms"));
            }
            if fell_back > 0 {
                table.faults.push(format!("{what}: {fell_back} reverted"));
            }
            let p99 = quantile(times.clone(), 0.99);
            if p99 > Duration::from_millis(250) {
                let note = format!(
                    "Above the target of 250 ms: {what}, p99, {} ms.",
                    millis(p99)
                );
                table.notes.push(note);
            }
            table.row(vec![
                channel.name().to_owned(),
                change.name().to_owned(),
                times.len().to_string(),
                millis(quantile(times, 0.5)),
                millis(p99),
                millis(slowest),
                fell_back.to_string(),
            ]);
        }
    }
    table.notes.push(format!(
        "{REPLICAS} replicas, each of which has cached the key; {AT_ONCE} concurrent changes, on any of them. Time \
         from the response to the change until the last replica's first new response, with a request to each \
         every {} ms; 300 ms later, each gets another request.",
        PAUSE.as_millis()
    ));
    Ok(table)
}

async fn under(channel: Channel, mut stage: Stage, rounds: usize) -> Result<Vec<Seen>> {
    if stage.redis.is_some() {
        stage.settle(Duration::ZERO).await?;
    }
    let server = stage.fleet.addrs()[0];
    let plan = Plan::new("steady", 600_000, BURSTS.0);
    let plan = stage.tenant.plan(server, &plan).await?;
    let counters = match channel {
        Channel::Cut => stage.counters().await?,
        Channel::Whole | Channel::Frozen => None,
    };
    if channel == Channel::Frozen {
        let redis = stage.redis.as_mut().context("there is a Redis")?;
        redis.stop();
        // Wait until the replicas have detected the outage, because its effect on requests is not measured here.
        sleep(Duration::from_secs(2)).await;
    }
    let cutting = counters.map(|mut counters| {
        tokio::spawn(async move {
            while counters.end_subscriptions().await.is_ok() {
                sleep(Duration::from_millis(20)).await;
            }
        })
    });
    let mut workers = JoinSet::new();
    for worker in 0..AT_ONCE {
        let (addrs, tenant, plan) = (stage.fleet.addrs(), stage.tenant.clone(), plan.clone());
        workers.spawn(async move {
            let mut crew = Crew {
                watchers: Vec::new(),
                tenant,
            };
            for addr in addrs {
                crew.watchers.push(Watcher { addr, sender: None });
            }
            let mut seen = Vec::new();
            for round in (worker..rounds).step_by(AT_ONCE) {
                crew.round(round, &plan, &mut seen).await?;
            }
            anyhow::Ok(seen)
        });
    }
    let mut all = Vec::new();
    while let Some(seen) = workers.join_next().await {
        all.extend(seen??);
    }
    if let Some(cutting) = cutting {
        cutting.abort();
    }
    if channel == Channel::Frozen
        && let Some(redis) = &mut stage.redis
    {
        redis.cont();
    }
    stage.end().await?;
    Ok(all)
}

/// Repeatedly sends requests to one replica.
struct Watcher {
    addr: std::net::SocketAddr,
    sender: Option<Sender>,
}

/// What a response reveals about a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Unknown,
    /// The key's burst.
    Known(u32),
    /// The response shows nothing about the key.
    Undecided,
}

impl Watcher {
    async fn ask(&mut self, key: &HeaderValue) -> Result<State> {
        let mut sender = match self.sender.take() {
            Some(sender) if !sender.is_closed() => sender,
            _ => connect(self.addr).await?,
        };
        sender.ready().await?;
        let request = Request::get("/v1/echo")
            .header(header::HOST, HeaderValue::from_static("quota"))
            .header("x-api-key", key.clone())
            .body(Full::<Bytes>::default())?;
        let answer = sender.send_request(request).await?;
        let (status, limit) = (
            answer.status().as_u16(),
            answer.headers().get("x-ratelimit-limit").cloned(),
        );
        answer.into_body().collect().await?;
        self.sender = Some(sender);
        Ok(match (status, limit) {
            (401, _) => State::Unknown,
            (200 | 429, Some(limit)) => State::Known(limit.to_str()?.parse()?),
            (503, _) => State::Undecided,
            (status, _) => bail!("a request with the key got {status}"),
        })
    }

    /// Returns the time at which the first response with this state arrived.
    async fn answers(&mut self, key: &HeaderValue, wanted: State) -> Result<Instant> {
        let asked = async {
            loop {
                if self.ask(key).await? == wanted {
                    return Ok(Instant::now());
                }
                sleep(PAUSE).await;
            }
        };
        timeout(PATIENCE, asked)
            .await
            .with_context(|| format!("not {wanted:?} within {PATIENCE:?}"))?
    }
}

/// A worker's watchers, one per replica.
struct Crew {
    watchers: Vec<Watcher>,
    tenant: Tenant,
}

impl Crew {
    /// Makes one change of each kind.
    async fn round(&mut self, round: usize, plan: &str, seen: &mut Vec<Seen>) -> Result<()> {
        let at = |n: usize| (round + n) % REPLICAS;
        let (old, new) = (State::Known(BURSTS.0), State::Known(BURSTS.1));
        let server = self.watchers[at(0)].addr;
        let key = self.tenant.key(server, plan).await?;
        let own_plan = Plan::new(format!("changing {round}"), 600_000, BURSTS.0);
        let own_plan = self.tenant.plan(server, &own_plan).await?;
        let planned = self.tenant.key(server, &own_plan).await?;
        self.all_answer(&key, old).await?;
        self.all_answer(&planned, old).await?;

        let path = format!("/admin/api-keys/{}", key.id);
        let plan_path = format!("/admin/plans/{own_plan}");
        let active = |it: bool| Some(json!({"is_active": it}));
        let changes = [
            (
                Change::Deactivation,
                Method::PATCH,
                &path,
                active(false),
                &key,
                State::Unknown,
            ),
            (
                Change::Activation,
                Method::PATCH,
                &path,
                active(true),
                &key,
                old,
            ),
            (
                Change::Plan,
                Method::PATCH,
                &plan_path,
                Some(json!({"burst": BURSTS.1})),
                &planned,
                new,
            ),
            (
                Change::Deletion,
                Method::DELETE,
                &path,
                None,
                &key,
                State::Unknown,
            ),
        ];
        for (n, (change, method, path, body, key, wanted)) in changes.into_iter().enumerate() {
            let server = self.watchers[at(n)].addr;
            self.tenant
                .call(server, method, path, body.as_ref())
                .await?;
            let confirmed = Instant::now();
            let after = self
                .all_answer(key, wanted)
                .await
                .with_context(|| format!("{change:?}"))?
                .duration_since(confirmed);
            sleep(Duration::from_millis(300)).await;
            let mut fell_back = false;
            for watcher in &mut self.watchers {
                let state = watcher.ask(&key.text).await?;
                fell_back |= !matches!(state, State::Undecided) && state != wanted;
            }
            seen.push(Seen {
                change,
                after,
                fell_back,
            });
        }
        Ok(())
    }

    /// Returns the time at which the last replica first gave a response with this state.
    async fn all_answer(&mut self, key: &Key, wanted: State) -> Result<Instant> {
        ensure!(!self.watchers.is_empty(), "there are no watchers");
        let asked = self
            .watchers
            .iter_mut()
            .map(|watcher| watcher.answers(&key.text, wanted));
        let answered = futures_util::future::try_join_all(asked).await?;
        answered
            .into_iter()
            .max()
            .context("there were no responses")
    }
}
