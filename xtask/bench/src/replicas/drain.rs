//! A clean stop with many keys in use: unused tokens of blocks are returned.
//!
//! Keys are inserted into the database directly, because creating so many keys over HTTP would take too long. Usage is
//! read from the database.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result, ensure};
use http::HeaderValue;
use tokio_postgres::NoTls;

use super::{
    Options,
    drive::{Arrival, Attempt, Targets, drive},
    keep_log,
    schedule::{Spread, Steady},
    stage::{Stage, lateness},
    table::Table,
    tenant::Plan,
};

const COLUMNS: &[&str] = &[
    "replicas",
    "keys",
    "policy",
    "admitted",
    "counted as used before the stop",
    "counted as used after the stop",
    "never served",
    "failed",
    "stop took, s",
];
const REPLICAS: usize = 3;
const DAILY: u64 = 5000;
const MONTHLY: u64 = 50_000;
/// The documented maximum time for stopping.
const STOPPED_WITHIN: Duration = Duration::from_secs(30);
/// Keys per statement.
const AT_ONCE: usize = 5000;

pub(crate) async fn run(options: &Options) -> Result<Table> {
    let mut table = Table::new("A clean stop with many keys", COLUMNS);
    let count = if options.quick { 300 } else { options.keys };
    // The key cache must have room for all keys.
    let cache = ("QUOTA_KEY_CACHE", (count * 2).max(100_000).to_string());
    let mut stage = Stage::set(options, REPLICAS, &[cache]).await?;
    if !options.no_redis {
        stage.settle(Duration::ZERO).await?;
    }
    let plan = Plan {
        daily: Some(DAILY),
        monthly: Some(MONTHLY),
        ..Plan::new("daily and monthly", 6000, 100)
    };
    let plan_id = stage.tenant.plan(stage.fleet.addrs()[0], &plan).await?;
    let (client, connection) = tokio_postgres::connect(&stage.database.url, NoTls).await?;
    let connection = tokio::spawn(connection);
    let keys = write_keys(&client, &plan_id, count).await?;
    let targets = Targets {
        replicas: stage.fleet.addrs(),
        keys,
        service: None,
        ready: 0,
    };
    // The requests go to the replicas in turn. The rate is limited, because the first request with a key takes several
    // database transactions.
    let load = Steady {
        key: 0,
        from: Duration::ZERO,
        per_second: options.drain_rate,
        count,
        spread: Spread::InTurn,
    };
    let load: Vec<Arrival> = load
        .arrivals(REPLICAS)
        .enumerate()
        .map(|(key, it)| Arrival { key, ..it })
        .collect();
    let log = drive(&targets, &load, tokio::time::Instant::now()).await?;
    keep_log(options, "drain", &log)?;
    let before = used(&client).await?;
    let began = std::time::Instant::now();
    stage.fleet.stop_within(STOPPED_WITHIN * 10).await?;
    let took = began.elapsed();
    let after = used(&client).await?;
    drop(client);
    connection.await??;
    stage.end().await?;

    let admitted = log.iter().filter(|it| it.admitted()).count() as u64;
    let failed = log.iter().filter(|it| !it.admitted()).count();
    ensure!(admitted > 0, "nothing was admitted");
    // A request without a response may have been counted.
    let silent = log.iter().filter(|it| it.status == 0).count() as u64;
    for policy in ["daily", "monthly"] {
        let (before, after) = (before.get(policy), after.get(policy));
        let (before, after) = (before.copied().unwrap_or(0), after.copied().unwrap_or(0));
        if after < admitted || after > admitted + silent {
            table.faults.push(format!(
                "{policy}: {after} tokens are counted as used, but {admitted} were used"
            ));
        }
        table.row(vec![
            REPLICAS.to_string(),
            count.to_string(),
            policy.to_owned(),
            admitted.to_string(),
            before.to_string(),
            after.to_string(),
            after.saturating_sub(admitted).to_string(),
            failed.to_string(),
            format!("{:.1}", took.as_secs_f64()),
        ]);
    }
    if took > STOPPED_WITHIN {
        table
            .faults
            .push(format!("the stop took {:.1} s", took.as_secs_f64()));
    }
    let last = log
        .iter()
        .map(|it: &Attempt| it.answered)
        .max()
        .unwrap_or(0);
    table.notes.push(format!(
        "{REPLICAS} replicas, keys with {DAILY} per day and {MONTHLY} per month, one request each within {:.0} s, then SIGTERM \
         to all. {}",
        Duration::from_nanos(last).as_secs_f64(),
        lateness(&log),
    ));
    Ok(table)
}

async fn write_keys(
    client: &tokio_postgres::Client,
    plan_id: &str,
    count: usize,
) -> Result<Vec<HeaderValue>> {
    let mut keys = Vec::with_capacity(count);
    for from in (0..count).step_by(AT_ONCE) {
        let secrets: Vec<String> = (from..count.min(from + AT_ONCE))
            .map(|_| secret())
            .collect();
        client
            .execute(
                "INSERT INTO api_keys (tenant_id, id, plan_id, name, prefix, key_hash) \
                 SELECT plans.tenant_id, gen_random_uuid(), plans.id, 'bench', left(secret, 11), \
                        sha256(convert_to(secret, 'UTF8')) \
                 FROM plans, unnest($1::text[]) AS secret WHERE plans.id::text = $2",
                &[&secrets, &plan_id],
            )
            .await
            .context("cannot write the keys")?;
        for secret in &secrets {
            keys.push(HeaderValue::from_str(secret)?);
        }
    }
    client.batch_execute("ANALYZE api_keys").await?;
    Ok(keys)
}

/// Returns a well-formed API key: 32 random characters and their checksum, CRC32 in base62.
fn secret() -> String {
    const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let mut text = String::from("qk_");
    for _ in 0..32 {
        text.push(fastrand::alphanumeric());
    }
    let mut sum = crc32fast::hash(text.as_bytes());
    let mut digits = [' '; 6];
    for digit in digits.iter_mut().rev() {
        *digit = char::from(DIGITS[(sum % 62) as usize]);
        sum /= 62;
    }
    text.extend(digits);
    text
}

/// Returns the tokens that the ledger counts as used, by policy.
async fn used(client: &tokio_postgres::Client) -> Result<BTreeMap<String, u64>> {
    let rows = client
        .query(
            "SELECT policy, sum(used)::bigint FROM quota_usage GROUP BY policy",
            &[],
        )
        .await?;
    rows.into_iter()
        .map(|row| Ok((row.get(0), u64::try_from(row.get::<_, i64>(1))?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::secret;

    #[test]
    fn a_secret_has_the_form_of_an_api_key() {
        let secret = secret();
        let parsed = quota_server::secret_text::SecretText::parse(
            quota_server::secret_text::Kind::ApiKey,
            secret.as_bytes(),
        );
        assert!(parsed.is_some(), "{secret}");
    }
}
