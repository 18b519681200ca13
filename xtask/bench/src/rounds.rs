//! The cases that are compared, their order, and the resulting table.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, bail};
use serde_json::json;

use crate::{
    http1,
    load::{CONNECTIONS, Load, Statuses, echo},
    process::{Cores, Server},
};

/// The duration of the load before measuring.
const WARM_UP: Duration = Duration::from_millis(500);
/// Plan names of this length give all responses the same size.
pub(crate) const PLAN: &str = "ample";
const NARROW: &str = "scant";
const MOST: u32 = 60_000_000;

#[derive(Clone, Copy, PartialEq)]
enum Answers {
    /// All responses are 200.
    Admitted,
    /// Responses are 429, except for the few that the plan allows.
    Denied,
}

impl Answers {
    fn check(self, statuses: &Statuses) -> Result<u64> {
        let total = statuses.values().sum::<u64>();
        let of = |status| statuses.get(&status).copied().unwrap_or(0);
        let right = match self {
            Self::Admitted => of(200) == total,
            Self::Denied => of(200) + of(429) == total && of(200) * 100 <= total,
        };
        if !right || total == 0 {
            bail!("unexpected responses: {statuses:?}");
        }
        Ok(total)
    }
}

struct Case<'a> {
    name: &'static str,
    server: &'a Server,
    request: Vec<u8>,
    answers: Answers,
}

#[derive(Clone, Copy)]
struct Figures {
    per_second: f64,
    micros: f64,
}

impl Case<'_> {
    fn round(&self, load: &Load, time: Duration) -> Result<Figures> {
        let (cpu, began) = (self.server.cpu()?, std::time::Instant::now());
        let statuses = load
            .put(self.server.addr, time, &self.request)
            .with_context(|| self.name)?;
        let (took, cpu) = (began.elapsed(), self.server.cpu()?.saturating_sub(cpu));
        self.server.empty_log()?;
        let total = self.answers.check(&statuses).with_context(|| self.name)?;
        #[expect(clippy::cast_precision_loss, reason = "fewer requests than 2^52")]
        let total = total as f64;
        Ok(Figures {
            per_second: total / took.as_secs_f64(),
            micros: cpu.as_secs_f64() * 1e6 / total,
        })
    }
}

pub(crate) fn run(quota: &Path, rounds: u32, time: Duration) -> Result<()> {
    let cores = Cores::pick();
    let hyper = Server::bare("hyper", cores)?;
    let poem = Server::bare("poem", cores)?;
    let logging = Server::quota(quota, "info", cores, &[])?;
    let silent = Server::quota(quota, "info,quota_server::access=off", cores, &[])?;
    let on = [("QUOTA_DIRECT_RESPONSES", "on".to_owned())];
    let direct = Server::quota(quota, "info", cores, &on)?;
    let (ample, scant) = keys(&logging)?;
    let (direct_ample, direct_scant) = keys(&direct)?;
    let (silent_ample, silent_scant) = keys(&silent)?;
    let load = Load::new()?;

    let case = |name, server, key: &str, answers| Case {
        name,
        server,
        request: echo(key),
        answers,
    };
    let cases = [
        // This case runs first, because the others are compared with it.
        case("bare poem", &poem, &ample, Answers::Admitted),
        case("bare hyper", &hyper, &ample, Answers::Admitted),
        case("quota, admitted", &logging, &ample, Answers::Admitted),
        case("quota, denied", &logging, &scant, Answers::Denied),
        case(
            "quota with direct responses, admitted",
            &direct,
            &direct_ample,
            Answers::Admitted,
        ),
        case(
            "quota with direct responses, denied",
            &direct,
            &direct_scant,
            Answers::Denied,
        ),
        case(
            "quota without access log, admitted",
            &silent,
            &silent_ample,
            Answers::Admitted,
        ),
        case(
            "quota without access log, denied",
            &silent,
            &silent_scant,
            Answers::Denied,
        ),
    ];
    for case in &cases {
        case.round(&load, WARM_UP)?;
    }
    let mut measured = vec![Vec::new(); cases.len()];
    for round in 0..rounds {
        if round % 10 == 0 {
            eprintln!("round {} of {rounds}", round + 1);
        }
        for (case, figures) in cases.iter().zip(&mut measured) {
            figures.push(case.round(&load, time)?);
        }
    }
    print(&cases, &measured, cores, time);
    Ok(())
}

/// Creates a key whose limits are never reached, and a key whose limits always are.
pub(crate) fn keys(server: &Server) -> Result<(String, String)> {
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
    let key = |plan: &str, rate: u32| {
        let plan = json!({"name": plan, "default_rpm": rate, "burst": rate});
        let plan = http1::json(server.addr, "POST", "/admin/plans", Some(token), &plan)?;
        let key = json!({"name": "bench", "plan_id": plan["id"]});
        let key = http1::json(server.addr, "POST", "/admin/api-keys", Some(token), &key)?;
        let text = key["key"].as_str().context("no key's text")?;
        anyhow::Ok(text.to_owned())
    };
    Ok((key(PLAN, MOST)?, key(NARROW, 1)?))
}

fn print(cases: &[Case<'_>], measured: &[Vec<Figures>], cores: Option<Cores>, time: Duration) {
    println!("| `GET /v1/echo` | requests/s | CPU µs per request | CPU, bare poem = 1 |");
    println!("|---|---:|---:|---:|");
    let poem = &measured[0];
    for (case, figures) in cases.iter().zip(measured) {
        let per_second = median(figures.iter().map(|it| it.per_second));
        let micros = median(figures.iter().map(|it| it.micros));
        // Compare per round, because a disturbance affects both.
        let ratio = median(
            figures
                .iter()
                .zip(poem)
                .map(|(it, poem)| it.micros / poem.micros),
        );
        println!(
            "| {} | {per_second:.0} | {micros:.2} | {ratio:.2} |",
            case.name
        );
    }
    println!();
    println!(
        "Medians of {} rounds of {} ms, with the cases taking turns; {CONNECTIONS} keep-alive connections on \
         loopback. CPU is user and system time of the server's process. {} The access log is written to a file, \
         one line per request; quota always has metrics and request IDs. Target: at most 1.25.",
        measured[0].len(),
        time.as_millis(),
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
        let admitted = |statuses| Answers::Admitted.check(&statuses);
        assert_eq!(admitted([(200, 7)].into()).unwrap(), 7);
        assert!(admitted([(200, 7), (429, 1)].into()).is_err());
        assert!(admitted([].into()).is_err());
        let denied = |statuses| Answers::Denied.check(&statuses);
        assert_eq!(denied([(200, 1), (429, 99)].into()).unwrap(), 100);
        assert!(denied([(200, 2), (429, 98)].into()).is_err());
        assert!(denied([(429, 99), (503, 1)].into()).is_err());
    }
}
