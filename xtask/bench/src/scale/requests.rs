//! The time of single requests: lists, usage, edits of a plan, and requests with keys that are not cached.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use http::Method;
use serde_json::{Value, json};
use tokio_postgres::Client;

use crate::{
    many_keys::{KeyClient, use_each},
    replicas::tenant::Tenant,
    rounds::median,
};

/// The number of requests whose median is reported.
const REPEATS: usize = 9;
/// The number of edits whose median is reported.
pub(super) const EDITS: u32 = 9;
/// The time within which an edit of a plan must take effect.
const EFFECTIVE_WITHIN: Duration = Duration::from_secs(30);

pub(super) fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Returns the median time of a `GET` request in milliseconds, and the latest response.
pub(super) async fn get(server: SocketAddr, tenant: &Tenant, path: &str) -> Result<(f64, Value)> {
    let (mut times, mut answer) = (Vec::new(), Value::Null);
    for _ in 0..REPEATS {
        let began = Instant::now();
        answer = tenant.call(server, Method::GET, path, None).await?;
        times.push(millis(began.elapsed()));
    }
    Ok((median(times.into_iter()), answer))
}

/// The times of an edit of a plan in milliseconds.
pub(super) struct Edit {
    pub(super) answered: f64,
    /// The time from the start of the edit until a response contains the new limit.
    pub(super) effective: f64,
}

/// Lowers the limit of a plan several times, starting from `limit`, and returns the median times. `secret` is the
/// secret of a key on the plan.
pub(super) async fn edit(
    server: SocketAddr,
    tenant: &Tenant,
    plan: &str,
    secret: &str,
    limit: u32,
) -> Result<Edit> {
    let mut client = KeyClient::connect(server).await?;
    let path = format!("/admin/plans/{plan}");
    let (mut answered, mut effective) = (Vec::new(), Vec::new());
    for number in 1..=EDITS {
        let (before, after) = (client.limit(secret).await?, limit - number);
        ensure!(before != after, "the plan already has the limit {after}");
        let body = json!({"default_rpm": after, "burst": after});
        let began = Instant::now();
        tenant
            .call(server, Method::PATCH, &path, Some(&body))
            .await?;
        answered.push(millis(began.elapsed()));
        while client.limit(secret).await? != after {
            ensure!(
                began.elapsed() < EFFECTIVE_WITHIN,
                "an edit of a plan did not take effect"
            );
        }
        effective.push(millis(began.elapsed()));
    }
    Ok(Edit {
        answered: median(answered.into_iter()),
        effective: median(effective.into_iter()),
    })
}

/// Returns the number of statements so far that looked up keys, or `None` if PostgreSQL does not count statements.
async fn lookups(client: &Client, counts: bool) -> Result<Option<i64>> {
    if !counts {
        return Ok(None);
    }
    let row = client
        .query_one(
            "SELECT coalesce(sum(calls), 0)::bigint FROM pg_stat_statements \
             WHERE query ILIKE 'SELECT%' AND query LIKE '%\"key_hash\" = ANY%'",
            &[],
        )
        .await?;
    Ok(Some(row.get(0)))
}

/// The cost of the first requests with keys, per request.
pub(super) struct FirstRequests {
    pub(super) micros: f64,
    pub(super) lookups: Option<f64>,
}

/// Sends one request with each key.
pub(super) async fn first_requests(
    server: SocketAddr,
    client: &Client,
    counts: bool,
    secrets: &[String],
    connections: usize,
) -> Result<FirstRequests> {
    let number = f64::from(u32::try_from(secrets.len())?);
    let before = lookups(client, counts).await?;
    let began = Instant::now();
    let repeated = use_each(server, secrets, connections).await?;
    let took = began.elapsed();
    ensure!(repeated == 0, "{repeated} first requests were not allowed");
    let after = lookups(client, counts).await?;
    let lookups = match before.zip(after) {
        Some((before, after)) => {
            let made = u32::try_from(after - before).context("the statistics were reset")?;
            Some(f64::from(made) / number)
        }
        None => None,
    };
    Ok(FirstRequests {
        micros: took.as_secs_f64() * 1e6 / number,
        lookups,
    })
}
