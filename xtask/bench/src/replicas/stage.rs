//! The setup of every table (database, Redis, replicas, tenant, keys), and the evaluation of a log.

use std::time::Duration;

use anyhow::{Context as _, Result};
use quota_testkit::{
    envelope::{Envelope, Worst},
    redis::RedisServer,
};
use tokio::time::Instant;

use super::{
    Options,
    counters::Counters,
    drive::{Arrival, Attempt, Targets, drive},
    fleet::{Database, Fleet, Setup},
    table::Table,
    tenant::{Key, Plan, Tenant, counted},
};

/// Redis's clock has microsecond resolution, which may shift either end of a window.
const GRAIN: Duration = Duration::from_micros(2);

/// How long to wait after the first requests. A new epoch starts a little in the future, and a new replica must have
/// been counted for some seconds before it gets a share during an outage.
const ACQUAINTANCE: Duration = Duration::from_secs(5);

/// Time for returning unspent tokens after leases have expired.
const RETURN: Duration = Duration::from_millis(400);

pub(crate) struct Stage {
    // Fields are dropped in this order.
    pub(crate) fleet: Fleet,
    pub(crate) tenant: Tenant,
    pub(crate) redis: Option<RedisServer>,
    lease_ttl: Duration,
    pub(crate) database: Database,
}

impl Stage {
    /// Starts replicas with one database and, unless disabled, one Redis.
    pub(crate) async fn set(
        options: &Options,
        replicas: usize,
        settings: &[(&'static str, String)],
    ) -> Result<Self> {
        let redis = if options.no_redis {
            None
        } else {
            Some(RedisServer::start().await)
        };
        Self::on(options, replicas, redis, settings).await
    }

    /// Starts replicas with an existing Redis.
    pub(crate) async fn on(
        options: &Options,
        replicas: usize,
        redis: Option<RedisServer>,
        settings: &[(&'static str, String)],
    ) -> Result<Self> {
        let urls = redis.iter().map(RedisServer::url);
        let urls: Vec<String> = urls.cycle().take(replicas).collect();
        Self::around(options, replicas, urls, redis, settings).await
    }

    /// Starts replicas, each with its own Redis URL, such as that of a proxy.
    pub(crate) async fn around(
        options: &Options,
        replicas: usize,
        redis_urls: Vec<String>,
        redis: Option<RedisServer>,
        settings: &[(&'static str, String)],
    ) -> Result<Self> {
        let database = Database::create(&options.postgres).await?;
        let mut all = settings.to_vec();
        if !redis_urls.is_empty() {
            all.push(("QUOTA_LEASE_TTL", format!("{}ms", options.lease_ttl)));
        }
        let setup = Setup {
            binary: options.binary(),
            database_url: database.url.clone(),
            redis_urls,
            settings: all,
        };
        let fleet = Fleet::start(setup, replicas).await?;
        let tenant = Tenant::register(fleet.addrs()[0]).await?;
        Ok(Self {
            fleet,
            tenant,
            redis,
            lease_ttl: options.lease_ttl(),
            database,
        })
    }

    pub(crate) async fn keys_on(&self, plans: &[Plan]) -> Result<Vec<Key>> {
        let server = self.fleet.addrs()[0];
        let mut keys = Vec::new();
        for plan in plans {
            keys.push(self.tenant.key_on(server, plan).await?);
        }
        Ok(keys)
    }

    /// Returns `None` if the replicas do not use Redis.
    pub(crate) async fn counters(&self) -> Result<Option<Counters>> {
        Ok(match &self.redis {
            Some(redis) => Some(Counters::of(&redis.url()).await?),
            None => None,
        })
    }

    /// Returns the number of tokens that the replicas report as granted so far, minus returned tokens, plus requests
    /// allowed during outages of Redis. Returns `None` if the replicas do not use Redis.
    pub(crate) async fn granted(&self) -> Result<Option<u64>> {
        if self.redis.is_none() {
            return Ok(None);
        }
        // Wait until unspent tokens of the last leases have been returned.
        tokio::time::sleep(self.lease_ttl + RETURN).await;
        let mut granted = 0;
        for metrics in self.fleet.metrics() {
            let returned = counted(metrics, "quota_lease_tokens_returned_total").await?;
            granted += counted(metrics, "quota_lease_tokens_taken_total").await?;
            granted += counted(metrics, "quota_decisions_allowed_degraded_total").await?;
            granted -= returned;
        }
        Ok(Some(granted))
    }

    /// Returns the number of outages that the replicas report.
    pub(crate) async fn outages(&self) -> Result<u64> {
        let mut outages = 0;
        for metrics in self.fleet.metrics() {
            outages += counted(metrics, "quota_counter_outages_total").await?;
        }
        Ok(outages)
    }

    pub(crate) fn targets(&self, keys: &[Key]) -> Targets {
        Targets {
            replicas: self.fleet.addrs(),
            keys: keys.iter().map(|key| key.text.clone()).collect(),
            service: None,
            ready: 0,
        }
    }

    /// Sends the load to the check API, where requests may cost more than 1.
    pub(crate) async fn check(&self, keys: &[Key], load: &[Arrival]) -> Result<Vec<Attempt>> {
        let targets = Targets {
            service: Some(self.tenant.service_token(self.fleet.addrs()[0]).await?),
            ..self.targets(keys)
        };
        drive(&targets, load, Instant::now()).await
    }

    /// Sends the load, after opening `ready` connections to each replica.
    pub(crate) async fn drive_ready(
        &self,
        keys: &[Key],
        load: &[Arrival],
        ready: usize,
    ) -> Result<Vec<Attempt>> {
        let targets = Targets {
            ready,
            ..self.targets(keys)
        };
        drive(&targets, load, Instant::now()).await
    }

    pub(crate) async fn drive(&self, keys: &[Key], load: &[Arrival]) -> Result<Vec<Attempt>> {
        drive(&self.targets(keys), load, Instant::now()).await
    }

    /// Waits for a new epoch to start with empty buckets, for buckets that take `time` to fill, and for the replicas to
    /// count each other.
    pub(crate) async fn settle(&self, time: Duration) -> Result<()> {
        let keys = self.keys_on(&[Plan::new("to begin with", 60, 1)]).await?;
        let load: Vec<_> = (0..self.fleet.len())
            .map(|replica| Arrival {
                at: 0,
                key: 0,
                replica,
                cost: 1,
            })
            .collect();
        self.drive(&keys, &load).await?;
        tokio::time::sleep(time + ACQUAINTANCE).await;
        Ok(())
    }

    /// Stops everything except Redis, and returns the Redis server.
    pub(crate) async fn end(mut self) -> Result<Option<RedisServer>> {
        self.fleet.stop().await?;
        self.database.remove().await?;
        Ok(self.redis)
    }
}

/// The results of one key's requests.
pub(crate) struct Recount {
    pub(crate) sent: usize,
    pub(crate) admitted: usize,
    /// Admitted tokens.
    pub(crate) tokens: u64,
    /// Responses with 5xx.
    pub(crate) failed: usize,
    /// Requests without a response.
    pub(crate) silent: usize,
    /// The cost of all requests, and of those that failed or got no response. Some of the latter may have taken tokens.
    cost: u64,
    undecided: u64,
    pub(crate) worst: Option<Worst>,
    /// Tokens that one exact bucket would have granted for the same requests, decided when they were sent.
    ideal: u64,
    /// Tokens that one exact bucket would have granted for the same requests, decided when they were answered.
    ideal_when_answered: u64,
    /// The highest cost.
    dearest: u64,
}

impl Recount {
    /// Evaluates the log of one key. `slack` is the lease TTL, which the envelope of a plan with leases includes.
    pub(crate) fn of(key: usize, plan: &Plan, slack: Duration, log: &[Attempt]) -> Self {
        let own = || log.iter().filter(|it| it.key == key);
        let count = |what: fn(&Attempt) -> bool| own().filter(|it| what(it)).count();
        let spans: Vec<_> = own()
            .filter(|it| it.admitted())
            .map(Attempt::span)
            .collect();
        let is_undecided = |it: &&Attempt| it.status == 0 || it.status >= 500;
        let exact = Envelope::new(plan.rpm, plan.burst, Duration::ZERO);
        let ideal = exact.exact(own().map(|it| (it.sent, it.cost)).collect());
        let ideal_when_answered = exact.exact(own().map(|it| (it.answered, it.cost)).collect());
        Self {
            sent: own().count(),
            admitted: spans.len(),
            tokens: spans.iter().map(|it| u64::from(it.cost)).sum(),
            dearest: own().map(|it| u64::from(it.cost)).max().unwrap_or(1),
            failed: count(|it| it.status >= 500),
            silent: count(|it| it.status == 0),
            cost: own().map(|it| u64::from(it.cost)).sum(),
            undecided: own()
                .filter(is_undecided)
                .map(|it| u64::from(it.cost))
                .sum(),
            worst: Envelope::new(plan.rpm, plan.burst, slack + GRAIN).worst(&spans),
            ideal,
            ideal_when_answered,
        }
    }

    /// Returns the excess of the worst window, in tokens. Negative if every window was below the envelope.
    pub(crate) fn excess(&self) -> f64 {
        self.worst.map_or(f64::NEG_INFINITY, |worst| worst.excess)
    }

    /// Returns the number of tokens that one exact bucket would have granted for the same requests.
    ///
    /// A client does not know when a request was decided. On a busy machine, that can be so long after it was sent that
    /// the bucket has refilled less, so the lower of the two ideal amounts is the possible one.
    pub(crate) fn possible(&self) -> u64 {
        self.ideal.min(self.ideal_when_answered)
    }

    /// Returns the granted tokens as a fraction of the possible tokens.
    pub(crate) fn served(&self) -> f64 {
        share(self.tokens, self.possible())
    }

    /// Returns whether less than 99% of the possible tokens were granted, even if every undecided request took tokens.
    /// If more than 2% of the requests are undecided, they count as not served.
    ///
    /// A difference of one request is within the measurement error, because its tokens may just have become available.
    pub(crate) fn is_short(&self) -> bool {
        let is_rare = share(self.undecided, self.cost) <= 0.02;
        let undecided = if is_rare { self.undecided } else { 0 };
        let (taken, possible) = (self.tokens + undecided, self.possible());
        share(taken, possible) < 0.99 && taken + self.dearest < possible
    }

    pub(crate) fn is_over(&self) -> bool {
        self.excess() > 0.0
    }

    /// Describes the worst window.
    pub(crate) fn window(&self) -> String {
        let Some(worst) = self.worst else {
            return "nothing was admitted".to_owned();
        };
        format!(
            "{} admitted from {} to {} ns, {:+.3} tokens",
            worst.admitted, worst.from, worst.to, worst.excess
        )
    }
}

#[expect(clippy::cast_precision_loss, reason = "fewer than 2^52")]
pub(crate) fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        return 0.0;
    }
    part as f64 / whole as f64
}

/// Checks that the replicas report at least as many granted tokens as the allowed requests in the log cost.
pub(crate) fn check_book(
    table: &mut Table,
    what: &str,
    granted: (Option<u64>, Option<u64>),
    log: &[Attempt],
) {
    let (Some(before), Some(after)) = granted else {
        return;
    };
    let (granted, admitted) = (after.saturating_sub(before), log.iter());
    let admitted = admitted.filter(|it| it.admitted());
    let admitted: u64 = admitted.map(|it| u64::from(it.cost)).sum();
    if admitted > granted {
        let fault = format!("{what}: {admitted} admitted, but only {granted} were granted");
        table.faults.push(fault);
    }
}

/// Returns the time that a plan's envelope adds for leases.
pub(crate) fn slack(plan: &Plan, lease_ttl: Duration) -> Duration {
    if plan.strict {
        Duration::ZERO
    } else {
        lease_ttl
    }
}

/// Returns a quantile; 0 if there are no values.
pub(crate) fn quantile(mut values: Vec<Duration>, part: f64) -> Duration {
    values.sort_unstable();
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an index"
    )]
    let index = (values.len() as f64 * part).ceil() as usize;
    let found = values.get(index.saturating_sub(1));
    found.copied().unwrap_or_default()
}

pub(crate) fn millis(time: Duration) -> String {
    format!("{:.1}", time.as_secs_f64() * 1e3)
}

pub(crate) fn percent(part: f64) -> String {
    format!("{:.2}%", part * 100.0)
}

/// Describes how late the load itself sent requests, at the 99th percentile.
pub(crate) fn lateness(log: &[Attempt]) -> String {
    let late = log
        .iter()
        .map(|it| Duration::from_nanos(it.sent.saturating_sub(it.due)));
    format!(
        "Requests were sent at most {} ms late at p99.",
        millis(quantile(late.collect(), 0.99))
    )
}

/// Describes the worst window, for investigation.
pub(crate) fn context(what: &str, recount: &Recount) -> String {
    format!("{what}: {}", recount.window())
}

/// Returns the number of scripts that Redis has run, if there is a Redis.
pub(crate) async fn scripts(counters: &mut Option<Counters>) -> Result<Option<u64>> {
    match counters {
        Some(counters) => Ok(Some(counters.scripts().await.context("Redis")?)),
        None => Ok(None),
    }
}

/// Returns the number of calls per thousand decisions.
pub(crate) fn per_thousand(before: Option<u64>, after: Option<u64>, decisions: u64) -> String {
    match (before, after) {
        (Some(before), Some(after)) => {
            format!(
                "{:.1}",
                1e3 * share(after.saturating_sub(before), decisions)
            )
        }
        _ => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// Returns the log of a burst at 0 ms and one request every 50 ms for a second, of which the first `admitted` are
    /// allowed.
    fn log(burst_answered: u64, admitted: usize) -> Vec<Attempt> {
        let burst = std::iter::repeat_n((0, burst_answered), 40);
        let steady = (1..=20).map(|n| (n * 50 * MS, (n * 50 * MS).max(burst_answered) + MS));
        burst
            .chain(steady)
            .enumerate()
            .map(|(n, (sent, answered))| Attempt {
                key: 0,
                replica: 0,
                cost: 1,
                due: sent,
                sent,
                answered,
                status: if n < admitted { 200 } else { 429 },
                retry_after: None,
                degraded: false,
            })
            .collect()
    }

    /// Evaluates a log. The plan has a burst of 30 and 10 tokens per second.
    fn recount_of(log: &[Attempt]) -> Recount {
        let plan = Plan::new("a plan".to_owned(), 600, 30);
        Recount::of(0, &plan, Duration::ZERO, log)
    }

    fn recount(burst_answered: u64, admitted: usize) -> Recount {
        recount_of(&log(burst_answered, admitted))
    }

    #[test]
    fn a_bucket_that_grants_too_little_is_detected() {
        // 30 at once, and 10 in a second.
        assert!(!recount(MS, 40).is_short());
        assert!(!recount(MS, 39).is_short());
        assert!(recount(MS, 38).is_short());
    }

    #[test]
    fn a_late_decision_is_not_mistaken_for_a_missing_grant() {
        // Decided after half a second, 30 at once and 5 in the rest of the second.
        assert!(!recount(500 * MS, 35).is_short());
        assert!(!recount(500 * MS, 34).is_short());
        assert!(recount(500 * MS, 33).is_short());
        assert!(recount(500 * MS, 35).served() >= 1.0);
    }

    #[test]
    fn an_undecided_request_may_have_taken_tokens() {
        for status in [0, 503] {
            let is_short = |admitted| {
                let mut log = log(MS, admitted);
                log[admitted].status = status;
                recount_of(&log).is_short()
            };
            assert!(!is_short(38), "{status}");
            assert!(is_short(37), "{status}");
            // A server that fails often does not serve what is possible.
            let mut log = log(MS, 36);
            for attempt in &mut log[36..] {
                attempt.status = status;
            }
            assert!(recount_of(&log).is_short(), "{status}");
        }
    }
}
