//! Measures what becomes slower with more keys: startup, decisions, lookups, edits of a plan, lists, and usage.
//!
//! One tenant has all keys, on one plan. The database is the same for all numbers of keys: keys are added between the
//! measurements. For each number, a new server starts.

mod decisions;
mod requests;
mod table;
mod usage;

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use tokio_postgres::Client;

use self::{
    requests::{FirstRequests, first_requests, millis},
    table::Table,
};
use crate::{
    many_keys::{insert, use_each},
    postgres::Postgres,
    process::{Cores, Server},
    replicas::tenant::{Plan, Tenant},
    rounds::median,
};

const KEYS: [u32; 3] = [1, 1_000, 100_000];
/// Requests per minute. The limit is never reached.
const MOST: u32 = 60_000_000;
const STARTS: usize = 5;
/// The maximum number of keys whose first request is measured, for each number of connections.
const FIRST_REQUESTS: usize = 1_000;
const CONNECTIONS: usize = 64;

#[derive(Args)]
pub(crate) struct Options {
    /// The `quota` binary, a release build
    quota: PathBuf,
    /// The directory of `initdb` and `postgres`
    #[arg(long)]
    programs: PathBuf,
    /// The largest number of keys
    #[arg(default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1_000..=5_000_000))]
    keys: u32,
    /// The number of rounds of decisions with all keys, and with one key
    #[arg(long, default_value_t = 21, value_parser = clap::value_parser!(u32).range(1..=200))]
    rounds: u32,
    /// The length of a round in milliseconds
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(50..=5000))]
    millis: u64,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let table = runtime.block_on(measure(options))?;
    println!("{}", table.markdown());
    println!();
    println!(
        "The columns are numbers of keys, all of one tenant and on one plan. The ratio is the last value of a row \
         divided by the row's first value. The exponent compares the last two values: it is 0 if they are equal, and 1 \
         if they are proportional to the number of keys. Startup is the median of {STARTS} starts with an empty data \
         directory and a migrated database. CPU time is the user and system time of the server's process: medians of \
         {} rounds of {} ms, with all keys in memory and QUOTA_METERING=off. First requests are one request each with up \
         to {FIRST_REQUESTS} keys that are not in memory, or whose plan has just been edited; µs per request is the \
         total elapsed time divided by the number of requests. The recorded usage is one request per key, spread over \
         28 days. Times in ms are medians, and include opening a connection.",
        options.rounds, options.millis
    );
    for note in &table.notes {
        println!("\n{note}");
    }
    Ok(if table.notes.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Returns the numbers of keys to measure, in ascending order.
fn numbers(most: u32) -> Vec<u32> {
    let fewer = KEYS.into_iter().filter(|keys| *keys < most);
    fewer.chain([most]).collect()
}

/// The database, and the tenant with all keys.
struct Scale<'a> {
    options: &'a Options,
    cores: Option<Cores>,
    postgres: Postgres,
    client: Client,
    counts_statements: bool,
    tenant: Tenant,
    plan: String,
    secrets: Vec<String>,
    /// The current limit of the plan.
    limit: u32,
}

async fn measure(options: &Options) -> Result<Table> {
    let postgres = Postgres::start_with_statistics(&options.programs).await?;
    let client = postgres.connect().await?;
    let cores = Cores::pick();
    let server = start(options, cores, &postgres)?;
    let tenant = Tenant::register(server.addr).await?;
    let plan = Plan::new("scale", MOST, MOST);
    let plan = tenant.plan(server.addr, &plan).await?;
    drop(server);
    let extension = "CREATE EXTENSION pg_stat_statements";
    let mut scale = Scale {
        options,
        cores,
        counts_statements: client.batch_execute(extension).await.is_ok(),
        postgres,
        client,
        tenant,
        plan,
        secrets: Vec::new(),
        limit: MOST,
    };
    let numbers = numbers(options.keys);
    let mut table = Table::new(numbers.clone());
    for keys in numbers {
        scale.grow(usize::try_from(keys)?).await?;
        let server = scale.startup(keys, &mut table)?;
        scale.tenant.sign_in(server.addr).await?;
        scale.lists(&server, keys, &mut table).await?;
        scale.usage(&server, keys, &mut table).await?;
        scale.lookups(&server, keys, &mut table).await?;
        scale.decisions(&server, keys, &mut table).await?;
        scale.tenant.sign_in(server.addr).await?;
        scale.edits(&server, keys, &mut table).await?;
    }
    Ok(table)
}

fn start(options: &Options, cores: Option<Cores>, postgres: &Postgres) -> Result<Server> {
    let settings = [
        ("DATABASE_URL", postgres.url()),
        ("QUOTA_DIRECT_RESPONSES", "on".to_owned()),
        ("QUOTA_METERING", "off".to_owned()),
        (
            "QUOTA_KEY_CACHE",
            (options.keys + options.keys / 4 + 1_000).to_string(),
        ),
        ("QUOTA_ADMIN_RPM", "100000".to_owned()),
        // Slow requests must not fail, because their time is measured.
        ("QUOTA_DATABASE_STATEMENT_TIMEOUT", "60s".to_owned()),
        ("QUOTA_REQUEST_TIMEOUT", "60s".to_owned()),
    ];
    Server::quota(
        &options.quota,
        "info,quota_server::access=off",
        cores,
        &settings,
    )
}

fn name(number: usize) -> String {
    format!("Customer {number}")
}

impl Scale<'_> {
    /// Adds keys until there are `keys` of them, and replaces the usage.
    async fn grow(&mut self, keys: usize) -> Result<()> {
        let numbers = self.secrets.len()..keys;
        let secrets = insert(&self.client, &self.plan, numbers, name).await?;
        self.secrets.extend(secrets);
        usage::fill(&self.client).await
    }

    fn startup(&self, keys: u32, table: &mut Table) -> Result<Server> {
        let mut times = Vec::new();
        let mut last = None;
        for _ in 0..STARTS {
            // Stop the previous server before the next one starts.
            drop(last.take());
            let began = Instant::now();
            last = Some(start(self.options, self.cores, &self.postgres)?);
            times.push(millis(began.elapsed()));
        }
        table.set("startup until ready, ms", keys, median(times.into_iter()));
        last.context("no server was started")
    }

    async fn lists(&self, server: &Server, keys: u32, table: &mut Table) -> Result<()> {
        for (row, query, found) in [
            ("list of keys with total, first page, ms", "", keys),
            ("search that finds one key, ms", "&search=customer%200", 1),
            ("search that finds all keys, ms", "&search=customer", keys),
        ] {
            let path = format!("/admin/api-keys?limit=50{query}");
            match requests::get(server.addr, &self.tenant, &path).await {
                Ok((time, answer)) => {
                    let (total, most) = (answer["total"].as_u64(), u64::from(found));
                    // The total may be smaller than the number of matching keys, because the server counts only up to a
                    // maximum.
                    ensure!(
                        total > Some(0) && total <= Some(most),
                        "{path}: the total is {total:?}"
                    );
                    table.set(row, keys, time);
                }
                Err(error) => table.notes.push(format!("{row}, {keys} keys: {error:#}")),
            }
        }
        Ok(())
    }

    async fn usage(&self, server: &Server, keys: u32, table: &mut Table) -> Result<()> {
        let range = usage::range(&self.client).await?;
        let some_key = self
            .client
            .query_one("SELECT min(id::text) FROM api_keys", &[])
            .await?;
        let of_key = format!("key_id={}", some_key.get::<_, String>(0));
        let usage = |bucket: &str, filter: &str| {
            format!("/admin/usage?{range}&bucket={bucket}&tz=UTC&{filter}")
        };
        for (row, path, requests) in [
            (
                "statistics on the console's home page, ms",
                "/admin/stats".to_owned(),
                None,
            ),
            ("usage by day, ms", usage("day", ""), Some(keys)),
            ("usage by hour, ms", usage("hour", ""), Some(keys)),
            (
                "usage of one key by day, ms",
                usage("day", &of_key),
                Some(1),
            ),
            (
                "usage by day, grouped by key, ms",
                usage("day", "group_by=key"),
                Some(keys),
            ),
            (
                "usage by day, grouped by endpoint, ms",
                usage("day", "group_by=endpoint"),
                Some(keys),
            ),
        ] {
            match requests::get(server.addr, &self.tenant, &path).await {
                Ok((time, answer)) => {
                    let total = answer["total"]["allowed"].as_u64();
                    ensure!(
                        requests.is_none_or(|it| total == Some(it.into())),
                        "{path}: the total is {total:?}"
                    );
                    table.set(row, keys, time);
                }
                Err(error) => table.notes.push(format!("{row}, {keys} keys: {error:#}")),
            }
        }
        Ok(())
    }

    async fn first(
        &self,
        server: &Server,
        secrets: &[String],
        connections: usize,
    ) -> Result<FirstRequests> {
        let counts = self.counts_statements;
        first_requests(server.addr, &self.client, counts, secrets, connections).await
    }

    /// Measures first requests. A single key would not be a meaningful sample.
    async fn lookups(&self, server: &Server, keys: u32, table: &mut Table) -> Result<()> {
        if keys == 1 {
            return Ok(());
        }
        let number = (self.secrets.len() / 2).min(FIRST_REQUESTS);
        let mut some = self.secrets.clone();
        fastrand::shuffle(&mut some);
        let (one_by_one, rest) = some.split_at(number);
        let first = self.first(server, one_by_one, 1).await?;
        table.set(
            "first requests with keys, one at a time, µs per request",
            keys,
            first.micros,
        );
        if let Some(lookups) = first.lookups {
            table.set(
                "lookups in PostgreSQL per request, one at a time",
                keys,
                lookups,
            );
        }
        let first = self.first(server, &rest[..number], CONNECTIONS).await?;
        table.set(
            "first requests with keys, 64 at a time, µs per request",
            keys,
            first.micros,
        );
        if let Some(lookups) = first.lookups {
            table.set(
                "lookups in PostgreSQL per request, 64 at a time",
                keys,
                lookups,
            );
        }
        Ok(())
    }

    async fn decisions(&self, server: &Server, keys: u32, table: &mut Table) -> Result<()> {
        use_each(server.addr, &self.secrets, CONNECTIONS).await?;
        let time = Duration::from_millis(self.options.millis);
        let rounds = self.options.rounds;
        let cost = decisions::measure(server, &self.secrets, rounds, time).await?;
        table.set("request with a random key, CPU µs", keys, cost.all_keys);
        table.set(
            "request with the same key each time, CPU µs",
            keys,
            cost.one_key,
        );
        table.set(
            "request with a random key, compared with the same key each time",
            keys,
            cost.ratio,
        );
        Ok(())
    }

    /// Measures edits of the plan while all keys are cached.
    async fn edits(&mut self, server: &Server, keys: u32, table: &mut Table) -> Result<()> {
        let secret = &self.secrets[0];
        let edit =
            requests::edit(server.addr, &self.tenant, &self.plan, secret, self.limit).await?;
        self.limit -= requests::EDITS;
        table.set("plan edit, ms", keys, edit.answered);
        table.set(
            "time from a plan edit until the new limit applies to a request, ms",
            keys,
            edit.effective,
        );
        if keys > 1 {
            let number = (self.secrets.len() - 1).min(FIRST_REQUESTS);
            let first = self
                .first(server, &self.secrets[1..=number], CONNECTIONS)
                .await?;
            table.set(
                "first requests with keys after the edit, 64 at a time, µs per request",
                keys,
                first.micros,
            );
            if let Some(lookups) = first.lookups {
                table.set(
                    "lookups in PostgreSQL per request after the edit, 64 at a time",
                    keys,
                    lookups,
                );
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::numbers;

    #[test]
    fn the_largest_number_is_the_last() {
        assert_eq!(numbers(1_000_000), [1, 1_000, 100_000, 1_000_000]);
        assert_eq!(numbers(10_000), [1, 1_000, 10_000]);
        assert_eq!(numbers(1_000), [1, 1_000]);
    }
}
