//! The document `docs/bench/PEERS.md` and its charts.

use std::{fmt::Write as _, time::Duration};

use anyhow::Result;
use quota_common::number::group_thousands;

use super::{
    LIMIT, Options,
    accuracy::{
        ANY, AROUND_EDGE, Accuracy, Counted, EDGE_PER_SECOND, ENDED, KILLED, LATE, Mode, Outage,
        RESTARTED, WINDOW,
    },
    cost,
    pair::LEASE_TTL,
    plots::Chart,
    windows::Rule,
};
use crate::{load::CONNECTIONS, process::Cores};

pub(crate) struct Report<'a> {
    pub(crate) options: &'a Options,
    pub(crate) cores: Option<Cores>,
    pub(crate) machine: String,
    pub(crate) versions: Vec<String>,
    pub(crate) costs: &'a [cost::Row],
    pub(crate) accuracy: &'a Accuracy,
    /// The reasons why servers are missing.
    pub(crate) missing: &'a [String],
}

const LOADS: [&str; 2] = [
    "All requests allowed, 100 keys",
    "One key, almost all requests denied",
];

impl Report<'_> {
    pub(crate) fn markdown(&self) -> String {
        let mut text = String::new();
        self.introduction(&mut text);
        self.costs(&mut text);
        self.limits(&mut text);
        self.outages(&mut text);
        self.revocation(&mut text);
        text.push_str(SETUP);
        text
    }

    fn introduction(&self, text: &mut String) {
        let _ = write!(
            text,
            "# Quota compared with other rate limiters\n\n\
             `cargo xtask bench peers` writes this page. Each rate limiter limits requests by the key in `X-API-Key`, and \
             responds with 200 and a short JSON body if the request is allowed, and with 429 if it is denied. *Bare \
             poem* is a handler in poem, the HTTP framework that Quota uses; it responds with 200 to every request. \
             Quota is built as it ships, with `cargo xtask build`: optimized with a recorded profile (or, with \
             `--ordinary`, as an ordinary release build). Bare poem is an ordinary release build, and the other \
             servers are those of the packages. \
             Quota's CPU time includes storing usage after the load has ended. It does not include the CPU time of \
             PostgreSQL, which runs on the same core. \
             Counts, such as requests above a limit, are exact. Times depend on the machine, so compare only figures \
             from the same run. The [glossary](../GLOSSARY.md) defines Quota's terms, such as *direct response*, \
             *lease* and *strict*.\n\n\
             Machine: {}\n\n\
             Versions: {}.\n\n",
            self.machine,
            self.versions.join(", ")
        );
        for reason in self.missing {
            let _ = writeln!(text, "{reason}\n");
        }
    }

    fn costs(&self, text: &mut String) {
        text.push_str("## Cost of a request\n\n![CPU time per request](cpu.svg)\n\n");
        for (n, load) in LOADS.iter().enumerate() {
            let _ = write!(
                text,
                "### {load}\n\n\
                 | Server | CPU µs per request | CPU, bare poem = 1 | requests/s | p50 µs | p99 µs | Redis calls per 1,000 requests |\n\
                 |---|---:|---:|---:|---:|---:|---:|\n"
            );
            for row in self.costs {
                let it = &row.medians[n];
                let calls = it.calls.map_or("–".to_owned(), |it| format!("{it:.1}"));
                let _ = writeln!(
                    text,
                    "| {} | {:.1} | {:.2} | {} | {:.0} | {:.0} | {calls} |",
                    row.name,
                    it.micros,
                    it.ratio,
                    grouped(it.per_second),
                    it.p50,
                    it.p99,
                );
            }
            text.push('\n');
        }
        text.push_str(
            "![Latency](latency.svg)\n\n### Resident memory\n\n| Server | MiB |\n|---|---:|\n",
        );
        for row in self.costs {
            let _ = writeln!(text, "| {} | {:.0} |", row.name, row.memory);
        }
        text.push('\n');
        let _ = write!(
            text,
            "The figures are medians of {} rounds. The ratio to bare poem is the median of the rounds' ratios, not the \
             ratio of the medians. In each round, the servers are loaded for {} ms each, one after another. The load uses {CONNECTIONS} keep-alive connections on loopback, each of which sends a request \
             after each response. {} Latency is measured while the server is saturated. CPU time is the user and \
             system time of the server's process, without Redis and PostgreSQL. Memory is the resident memory of this \
             process after the last round. Redis calls are script calls, as counted by `INFO commandstats`. The \
             servers use no other calls, except for limitador; see [What differs](#what-differs).\n\n",
            self.options.rounds,
            self.options.millis,
            match self.cores {
                Some(Cores { servers, load }) =>
                    format!("Servers run on core {servers}; the load and Redis run on core {load}."),
                None => "Nothing is pinned to a core on this machine.".to_owned(),
            }
        );
    }

    fn limits(&self, text: &mut String) {
        let _ = write!(
            text,
            "## Two instances and one limit\n\n\
             Each server runs as two instances, which share one Redis if the server supports it. Each measurement uses \
             a new key, which may send {LIMIT} requests per minute.\n\n\
             ![Requests allowed with two instances](accuracy.svg)\n\n\
             | Server | Counts with | Bound for {} s | Allowed | Above the bound | Below the bound | Allowed in the worst {} s across the end of a window |\n\
             |---|---|---:|---:|---:|---:|---:|\n",
            self.options.seconds,
            ANY.as_secs()
        );
        for row in &self.accuracy.rows {
            let it = &row.saturated;
            let edge = row.edge.map_or("–".to_owned(), |it| it.to_string());
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} | {} | {} | {edge} |",
                row.name,
                rule(row.rule),
                it.bound,
                it.allowed,
                above(it),
                below(it),
            );
        }
        let _ = write!(
            text,
            "\nThe load saturates both instances with one key for {} s. The bound is the number of \
             requests that the server's own rule allows with one instance. For a window, the bound is the limit. For a \
             token bucket, the bound is the burst plus the tokens that are refilled during the load; with Quota's \
             leases, it also includes the tokens that are refilled in {} ms. For the last column, a key's first request \
             starts a window. From {} s to {} s after this request, {EDGE_PER_SECOND} requests per second are sent. \
             The column shows the largest number of requests that were allowed within {} s. By default, a plan's burst \
             equals its limit, so Quota allows {LIMIT} requests at once; a plan with a burst of {} shows the effect of \
             a smaller burst.\n\n",
            self.options.seconds,
            LEASE_TTL.as_millis(),
            WINDOW.as_secs() - AROUND_EDGE.as_secs(),
            WINDOW.as_secs() + AROUND_EDGE.as_secs(),
            ANY.as_secs(),
            LIMIT / 10,
        );
    }

    fn outages(&self, text: &mut String) {
        let _ = write!(
            text,
            "## Redis killed or slow\n\n\
             | Server | Killed: requests below their limit | Killed: limits | Key above its limit: allowed, of the bound | Late: allowed, of the bound | Late: requests/s | Late: p99 ms | Late: failed |\n\
             |---|---|---|---:|---:|---:|---:|---:|\n"
        );
        for row in &self.accuracy.rows {
            let (Some(late), Some(outage)) = (&row.late, &row.outage) else {
                continue;
            };
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} of {} | {} of {}{} | {} | {:.0} | {} |",
                row.name,
                responses(outage.ample),
                mode(outage),
                outage.allowed,
                outage.bound,
                late.allowed,
                late.bound,
                if late.is_saturated {
                    ""
                } else {
                    " (limit not reached)"
                },
                grouped(late.per_second),
                late.p99_millis,
                late.failed,
            );
        }
        let _ = write!(
            text,
            "\nIn the first test, the load lasts {} s. Redis is killed with `kill -9` after {} s, and restarted \
             without its data after {} s. The load uses two keys: one whose limit is never reached, and one whose limit \
             is reached before the outage. For the key whose limit is reached, the allowed requests before, during and \
             after the outage are counted. In the second test (*late*), Redis's responses to both instances are \
             delayed by {} ms, and a new key is used for {} s. A request has failed if its response is neither 200 nor 429. While \
             Redis is unavailable, Quota uses its default fallback setting, `QUOTA_ON_REDIS_FAILURE=share`: each \
             replica enforces its share of the rate, starting with an empty bucket.\n\n",
            ENDED.as_secs_f64(),
            KILLED.as_secs_f64(),
            RESTARTED.as_secs_f64(),
            LATE.as_millis(),
            self.options.seconds,
        );
    }

    fn revocation(&self, text: &mut String) {
        text.push_str("## Revoking a key\n\n");
        match self.accuracy.revocation.as_deref() {
            Some([.., last]) => {
                let times = self.accuracy.revocation.as_deref().unwrap_or_default();
                let _ = write!(
                    text,
                    "With Quota, {} keys are deactivated, one at a time, by an API call to one replica, while they are \
                     used continuously on another replica. The time from the start of this call until the other \
                     replica first rejects a request with the key is {} at the median and {} at most.\n\n",
                    times.len(),
                    millis(times[times.len() / 2]),
                    millis(*last)
                );
            }
            _ => text.push_str("Quota was not measured.\n\n"),
        }
        text.push_str(
            "The other servers have no list of keys, so no key can be revoked. They count requests by the value of \
             `X-API-Key`, and accept any value.\n\n",
        );
    }

    /// Writes the charts.
    pub(crate) fn charts(&self) -> Result<()> {
        let output = &self.options.output;
        let costs = |values: fn(&cost::Row) -> [f64; 2]| {
            let rows = self.costs.iter();
            rows.map(|row| (plain(row.name), values(row).map(Some).to_vec()))
                .collect()
        };
        Chart {
            title: "CPU time per request",
            subtitle: "compared with a bare poem handler of the same run; logarithmic, less is better",
            series: &["100 keys, allowed", "one key, denied"],
            rows: costs(|row| [row.medians[0].ratio, row.medians[1].ratio]),
            decimals: 2,
            is_logarithmic: true,
            line: Some((1.0, "bare poem")),
        }
        .write(&output.join("cpu.svg"))?;
        Chart {
            title: "Latency under a saturating load",
            subtitle: "in microseconds, 32 connections, 100 keys, all allowed; logarithmic, less is better",
            series: &["p50", "p99"],
            rows: costs(|row| [row.medians[0].p50, row.medians[0].p99]),
            decimals: 0,
            is_logarithmic: true,
            line: None,
        }
        .write(&output.join("latency.svg"))?;
        let saturated = format!("saturated for {} s", self.options.seconds);
        let limit = f64::from(LIMIT);
        #[expect(clippy::cast_precision_loss, reason = "fewer than 2^52")]
        let number = |it: u64| it as f64;
        let rows = self.accuracy.rows.iter();
        let rows = rows.map(|row| {
            let values = vec![Some(number(row.saturated.allowed)), row.edge.map(number)];
            (plain(row.name), values)
        });
        Chart {
            title: "Requests allowed with two instances and a limit of 600 per minute",
            subtitle: "Quota's burst is the limit, unless stated",
            series: &[&saturated, "worst 10 s across the end of a window"],
            rows: rows.collect(),
            decimals: 0,
            is_logarithmic: false,
            line: Some((limit, "limit per minute")),
        }
        .write(&output.join("accuracy.svg"))
    }
}

const SETUP: &str = "\
## What differs

- Only Quota looks up keys, plans and quotas, and records the usage of each request. The other servers accept any key, \
and write at most a log line per request.
- For each request, Quota, nginx, HAProxy and uvicorn write a line to an access log file. Quota's lines are JSON. \
Fastify does not log requests by default.
- Without Redis, each instance of nginx, HAProxy, rate-limiter-flexible and slowapi counts only its own requests, so two \
instances allow up to twice the limit.
- rate-limiter-flexible uses `inMemoryBlockOnConsumed`, which its documentation recommends: keys over the limit are \
denied without calling Redis. For outages of Redis, rate-limiter-flexible has an `insuranceLimiter`, and slowapi has an \
in-memory fallback. Both features are off by default, and are not used here.
- The fixed windows of rate-limiter-flexible and slowapi start with a key's first request. HAProxy's sliding window also \
counts denied requests. nginx uses a leaky bucket, and Quota uses a token bucket.
- Node.js runs with `NODE_ENV=production`; uvicorn runs one worker with uvloop and httptools. nginx runs as a single \
process. The programs and configurations are in `xtask/bench/peers`.
- limitador is included only if `--limitador FILE` specifies the path of its server, because neither Debian nor a \
package registry provides this server. Requests to limitador contain the key in a JSON body. limitador's reads from \
Redis are not script calls, and are not counted above.
";

/// Returns a name without code formatting, which charts do not support.
fn plain(name: &str) -> String {
    name.replace('`', "")
}

fn rule(rule: Rule) -> &'static str {
    match rule {
        Rule::Bucket { .. } => "a bucket",
        Rule::Window => "a window",
    }
}

fn above(it: &Counted) -> String {
    difference(it.allowed, it.bound, it.bound)
}

fn below(it: &Counted) -> String {
    if it.is_saturated {
        difference(it.bound, it.allowed, it.bound)
    } else {
        "limit not reached".to_owned()
    }
}

/// Returns by how much one count exceeds another, also as a percentage of the bound.
fn difference(greater: u64, less: u64, bound: u64) -> String {
    let difference = greater.saturating_sub(less);
    if difference == 0 {
        return "0".to_owned();
    }
    #[expect(clippy::cast_precision_loss, reason = "fewer than 2^52")]
    let percent = difference as f64 * 100.0 / bound.max(1) as f64;
    format!("{difference} ({percent:.1}%)")
}

/// Returns the percentages of requests that were allowed, were denied, or failed.
fn responses([allowed, denied]: [f64; 2]) -> String {
    let failed = 1.0 - allowed - denied;
    let parts = [(allowed, "allowed"), (denied, "denied"), (failed, "failed")];
    let parts = parts.iter().filter(|(part, _)| *part >= 0.005);
    let parts = parts.map(|(part, name)| format!("{:.0}% {name}", part * 100.0));
    parts.collect::<Vec<_>>().join(", ")
}

fn mode(outage: &Outage) -> &'static str {
    match outage.mode {
        Mode::Open => "fails open: no limits",
        Mode::Closed => "fails closed",
        Mode::Limits => "limits still hold",
    }
}

fn millis(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}

/// Returns a number with separators, such as `12,345`.
fn grouped(number: f64) -> String {
    group_thousands(&format!("{number:.0}"))
}

#[cfg(test)]
mod tests {
    use super::{difference, grouped, responses};

    #[test]
    fn numbers_are_grouped_by_thousands() {
        assert_eq!(grouped(7.0), "7");
        assert_eq!(grouped(12_345.4), "12,345");
        assert_eq!(grouped(1_234_567.0), "1,234,567");
    }

    #[test]
    fn only_responses_that_occur_are_listed() {
        assert_eq!(responses([1.0, 0.0]), "100% allowed");
        assert_eq!(
            responses([0.75, 0.125]),
            "75% allowed, 12% denied, 12% failed"
        );
    }

    #[test]
    fn differences_are_never_negative() {
        assert_eq!(difference(600, 601, 601), "0");
        assert_eq!(difference(1200, 600, 600), "600 (100.0%)");
        assert_eq!(difference(600, 300, 600), "300 (50.0%)");
    }
}
