//! The cases that are compared, their order, and the resulting table.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use quota_testkit::redis::RedisServer;
use serde_json::{Value, json};

use crate::{
    http1,
    load::{CONNECTIONS, Statuses, check, echo, forward_auth},
    polling_load::ClosedLoop,
    process::{Cores, Server},
};

/// How long each case is under load before the first round, and the baseline before every round.
const WARM_UP: Duration = Duration::from_millis(300);
/// The number of bare poem processes that take turns as the baseline, one per round. Some processes of the same program
/// use a few percent more CPU time than others, perhaps because their memory is at different addresses.
const BASELINES: usize = 5;
/// How long one server is under load before it is the other server's turn.
const SLICE: Duration = Duration::from_millis(50);
/// All responses have the same size if the names of plans have this length.
pub(crate) const PLAN: &str = "ample";
const NARROW: &str = "scant";
const MOST: u32 = 60_000_000;

#[derive(Clone, Copy, PartialEq)]
enum Answers {
    /// All responses are 200.
    Ok,
    /// Responses are 429, except for the few that the plan allows.
    Limited,
}

impl Answers {
    fn check(self, statuses: &Statuses) -> Result<u64> {
        let total = statuses.values().sum::<u64>();
        let of = |status| statuses.get(&status).copied().unwrap_or(0);
        let right = match self {
            Self::Ok => of(200) == total,
            Self::Limited => of(200) + of(429) == total && of(200) * 100 <= total,
        };
        if !right || total == 0 {
            bail!("unexpected responses: {statuses:?}");
        }
        Ok(total)
    }
}

struct Case<'a> {
    name: String,
    server: &'a Server,
    request: Vec<u8>,
    answers: Answers,
}

#[derive(Clone, Copy)]
struct Round {
    per_second: f64,
    /// The share of its core that the server used during its load.
    busy: f64,
    /// The CPU time per request, in microseconds.
    micros: f64,
    /// The CPU time per request, divided by that of the baseline.
    ratio: f64,
}

impl<'a> Case<'a> {
    fn bare(name: &str, server: &'a Server) -> Self {
        Self {
            name: name.to_owned(),
            server,
            request: echo(""),
            answers: Answers::Ok,
        }
    }

    /// Warms up bare poem, the baseline. Then alternates slices of load on bare poem and on the case's server, until the
    /// latter has been under load for `time`.
    ///
    /// The slices are short, because the speed of a virtual machine can change within a second. While bare poem is under
    /// load, the case's server and its PostgreSQL are suspended, so that storing usage does not slow bare poem down.
    /// While the case's server is under load, bare poem is suspended.
    fn round(&self, poem: &Server, time: Duration) -> Result<Round> {
        let baseline = Case::bare("bare poem, the baseline", poem);
        let mut load = self.load()?;
        let mut baseline_load = baseline.load()?;
        baseline_load.run(WARM_UP)?;
        baseline_load.reset();
        let done = self.server.decisions_accounted_for()?;
        let (cpu_before, baseline_cpu) = (self.server.cpu()?, poem.cpu()?);
        let (mut under_load, mut busy) = (Duration::ZERO, Duration::ZERO);
        while under_load < time {
            {
                let _suspended = self.server.suspend()?;
                baseline_load.run(SLICE)?;
            }
            let _suspended = poem.suspend()?;
            let (began, before) = (Instant::now(), self.server.cpu()?);
            load.run(SLICE).with_context(|| self.name.clone())?;
            under_load += began.elapsed();
            busy += self.server.cpu()?.saturating_sub(before);
        }
        let total = self.total(load)?;
        let baseline_total = baseline.total(baseline_load)?;
        // The server writes log lines and usage later. This is a part of the requests' cost, and must not disturb the
        // next case.
        let decisions = if self.server.has_database() {
            done + total
        } else {
            0
        };
        let cpu = self.server.cpu_when_stored(decisions);
        let cpu = cpu
            .with_context(|| self.name.clone())?
            .saturating_sub(cpu_before);
        let baseline_cpu = poem.cpu()?.saturating_sub(baseline_cpu);
        self.server.empty_log()?;
        #[expect(clippy::cast_precision_loss, reason = "fewer requests than 2^52")]
        let (total, baseline_total) = (total as f64, baseline_total as f64);
        let micros = cpu.as_secs_f64() * 1e6 / total;
        Ok(Round {
            per_second: total / under_load.as_secs_f64(),
            busy: busy.div_duration_f64(under_load),
            micros,
            ratio: micros / (baseline_cpu.as_secs_f64() * 1e6 / baseline_total),
        })
    }

    fn load(&self) -> Result<ClosedLoop<'_>> {
        ClosedLoop::open(self.server.addr, &self.request).with_context(|| self.name.clone())
    }

    /// Checks the responses, and returns their number.
    fn total(&self, load: ClosedLoop<'_>) -> Result<u64> {
        let total = self.answers.check(&load.finish());
        total.with_context(|| self.name.clone())
    }
}

/// The credentials that requests to a server contain.
struct Credentials {
    /// A key whose limits are never reached.
    ample: String,
    /// A key whose limits are always reached.
    scant: String,
    service_token: String,
}

/// A kind of request that is checked.
#[derive(Clone, Copy)]
enum Call {
    Echo,
    ForwardAuth,
    Check,
}

impl Call {
    const ALL: [Self; 3] = [Self::Echo, Self::ForwardAuth, Self::Check];

    const fn name(self) -> &'static str {
        match self {
            Self::Echo => "echo",
            Self::ForwardAuth => "forward-auth",
            Self::Check => "check",
        }
    }

    fn request(self, key: &str, service_token: &str) -> Vec<u8> {
        match self {
            Self::Echo => echo(key),
            Self::ForwardAuth => forward_auth(key, service_token),
            Self::Check => check(key, service_token),
        }
    }

    /// Returns the expected responses once the key's limits are reached.
    const fn denials(self) -> Answers {
        match self {
            Self::Echo | Self::ForwardAuth => Answers::Limited,
            // The status is 200, and the denial is in the body.
            Self::Check => Answers::Ok,
        }
    }

    /// Returns a case with admitted requests, and one with denied requests.
    fn cases<'a>(
        self,
        server: &'a Server,
        credentials: &Credentials,
        prefix: &str,
    ) -> Result<[Case<'a>; 2]> {
        let Credentials {
            ample,
            scant,
            service_token,
        } = credentials;
        if let Self::Check = self {
            for (key, is_allowed) in [(ample, true), (scant, false)] {
                let (token, body) = (Some(service_token.as_str()), json!({ "key": key }));
                let check = || http1::json(server.addr, "POST", "/v1/check", token, &body);
                // The first request of a key is allowed.
                check()?;
                let second = check()?;
                ensure!(second["allowed"] == is_allowed, "unexpected: {second}");
            }
        }
        let case = |key: &str, what: &str, answers| Case {
            name: format!("{prefix}{}, {what}", self.name()),
            server,
            request: self.request(key, service_token),
            answers,
        };
        Ok([
            case(ample, "admitted", Answers::Ok),
            case(scant, "denied", self.denials()),
        ])
    }
}

pub(crate) fn run(quota: &Path, rounds: u32, time: Duration) -> Result<()> {
    let cores = Cores::pick();
    let hyper = Server::bare("hyper", cores)?;
    let poem = Server::bare("poem", cores)?;
    let baselines = [(); BASELINES].map(|()| Server::bare("poem", cores));
    let baselines = baselines.into_iter().collect::<Result<Vec<_>>>()?;
    let mut settings = vec![("QUOTA_DIRECT_RESPONSES", "off".to_owned())];
    let logging = Server::quota(quota, "info", cores, &settings)?;
    let silent = Server::quota(quota, "info,quota_server::access=off", cores, &settings)?;
    settings.clear();
    let memory = Server::quota(quota, "info", cores, &settings)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let redis_server = runtime.block_on(RedisServer::start());
    settings.push(("REDIS_URL", redis_server.url()));
    // With the default timeout, a slow response on a busy machine would count as an outage of Redis.
    settings.push(("QUOTA_REDIS_TIMEOUT", "250ms".to_owned()));
    let redis = Server::quota(quota, "info", cores, &settings)?;

    let with_databases = [&logging, &silent, &memory, &redis];
    for server in with_databases {
        server.turn_off_autovacuum()?;
    }

    // Bare poem is also a case: how close its ratio is to 1 shows how precise the comparison is.
    let mut cases = vec![
        Case::bare("bare poem", &poem),
        Case::bare("bare hyper", &hyper),
    ];
    for (server, prefix) in [
        (&logging, "not direct: "),
        (&silent, "not direct, without access log: "),
    ] {
        cases.extend(Call::Echo.cases(server, &credentials(server)?, prefix)?);
    }
    for (server, prefix) in [(&memory, "direct, memory: "), (&redis, "direct, Redis: ")] {
        let credentials = credentials(server)?;
        for call in Call::ALL {
            cases.extend(call.cases(server, &credentials, prefix)?);
        }
    }
    for (case, baseline) in cases.iter().zip(baselines.iter().cycle()) {
        case.round(baseline, WARM_UP)?;
    }
    let mut measured = vec![Vec::new(); cases.len()];
    for (round, baseline) in (0..rounds).zip(baselines.iter().cycle()) {
        if round % 10 == 0 {
            eprintln!("round {} of {rounds}", round + 1);
        }
        for server in with_databases {
            // In every round, because PostgreSQL starts new processes for new connections.
            server.give_database_lowest_priority()?;
        }
        for (case, measured) in cases.iter().zip(&mut measured) {
            measured.push(case.round(baseline, time)?);
        }
    }
    print(&cases, &measured, cores, time);
    Ok(())
}

/// Creates a key whose limits are never reached, and a key whose limits are always reached.
pub(crate) fn keys(server: &Server) -> Result<(String, String)> {
    let credentials = credentials(server)?;
    Ok((credentials.ample, credentials.scant))
}

fn credentials(server: &Server) -> Result<Credentials> {
    let account = http1::json(
        server.addr,
        "POST",
        "/auth/register",
        None,
        &json!({"email": "bench@example.com", "password": "correct horse battery staple 47"}),
    )?;
    let token = account["access_token"]
        .as_str()
        .context("no access token")?;
    let create = |path, body: &Value| http1::json(server.addr, "POST", path, Some(token), body);
    let text = |created: &Value, field: &str| {
        let text = created[field].as_str().context("no secret")?;
        anyhow::Ok(text.to_owned())
    };
    let key = |plan: &str, rate: u32| {
        let plan = json!({"name": plan, "default_rpm": rate, "burst": rate});
        let plan = create("/admin/plans", &plan)?;
        let key = json!({"name": "bench", "plan_id": plan["id"]});
        text(&create("/admin/api-keys", &key)?, "key")
    };
    let service_token = create("/admin/service-tokens", &json!({"name": "bench"}))?;
    Ok(Credentials {
        ample: key(PLAN, MOST)?,
        scant: key(NARROW, 1)?,
        service_token: text(&service_token, "token")?,
    })
}

fn print(cases: &[Case<'_>], measured: &[Vec<Round>], cores: Option<Cores>, time: Duration) {
    println!("| request | requests/s | core used | CPU µs per request | CPU, bare poem = 1 |");
    println!("|---|---:|---:|---:|---:|");
    for (case, rounds) in cases.iter().zip(measured) {
        let per_second = median(rounds.iter().map(|it| it.per_second));
        let busy = median(rounds.iter().map(|it| 100.0 * it.busy));
        let micros = median(rounds.iter().map(|it| it.micros));
        let ratio = median(rounds.iter().map(|it| it.ratio));
        println!(
            "| {} | {per_second:.0} | {busy:.0}% | {micros:.2} | {ratio:.3} |",
            case.name
        );
    }
    println!();
    println!(
        "Medians of {} rounds with {} ms of load on each server; {CONNECTIONS} keep-alive connections on loopback. In each \
         round, the case and bare poem receive load alternately, {} ms at a time. While bare poem is under load, the \
         case's server and its PostgreSQL are suspended; while the case is under load, bare poem is suspended. The \
         baseline is one of {BASELINES} bare poem processes, which take turns. The row \"bare poem\" measures another \
         process. *Core used* is the share of its core that the server's process used during its load; the load \
         generator polls, so its own core is always busy. CPU per request is user and system time of the server's \
         process, including what it does after the load, such as storing usage. {} PostgreSQL, to which quota writes \
         usage, runs on the servers' core at the lowest priority, with autovacuum off; its CPU time is not included. The \
         access log is written to a file, one line per request; quota always has metrics, request IDs and usage records. \
         The bare servers are ordinary release builds. Target: at most 1.25; with direct responses 0.95, with Redis 1.00, \
         and 1.05 for check.",
        measured[0].len(),
        time.as_millis(),
        SLICE.as_millis(),
        match cores {
            Some(Cores { servers, load }) =>
                format!("Servers run on core {servers}, the load on core {load}."),
            None => "Nothing is pinned to a core on this machine, so the figures are less precise."
                .to_owned(),
        }
    );
}

pub(crate) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 {
        values[middle]
    } else {
        f64::midpoint(values[middle - 1], values[middle])
    }
}

#[cfg(test)]
mod tests {
    use super::{Answers, median};

    #[test]
    fn the_median_is_the_one_in_the_middle() {
        assert_eq!(
            median([3.0, 1.0, 2.0].into_iter()).to_bits(),
            2.0_f64.to_bits()
        );
        assert_eq!(
            median([4.0, 1.0, 2.0, 3.0].into_iter()).to_bits(),
            2.5_f64.to_bits()
        );
    }

    #[test]
    fn a_round_with_unexpected_statuses_does_not_count() {
        let admitted = |statuses| Answers::Ok.check(&statuses);
        assert_eq!(admitted([(200, 7)].into()).unwrap(), 7);
        assert!(admitted([(200, 7), (429, 1)].into()).is_err());
        assert!(admitted([].into()).is_err());
        let denied = |statuses| Answers::Limited.check(&statuses);
        assert_eq!(denied([(200, 1), (429, 99)].into()).unwrap(), 100);
        assert!(denied([(200, 2), (429, 98)].into()).is_err());
        assert!(denied([(429, 99), (503, 1)].into()).is_err());
    }
}
