//! Many keys on one plan. They are inserted into the database directly, because creating them over HTTP would take
//! longer.

use std::{net::SocketAddr, ops::Range, time::Duration};

use anyhow::{Context as _, Result, ensure};
use quota_server::secret_text::{Kind, SecretText};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::sleep,
};
use tokio_postgres::Client;

use crate::{http1, load::echo};

/// The number of keys per statement.
const BATCH: usize = 10_000;
/// The maximum number of attempts per request, and the pause before each retry.
const ATTEMPTS: u32 = 20;
const PAUSE: Duration = Duration::from_millis(500);

/// Inserts one key for each number, and returns their secrets. `name` returns the name of the key with the given
/// number.
pub(crate) async fn insert(
    client: &Client,
    plan: &str,
    numbers: Range<usize>,
    name: impl Fn(usize) -> String,
) -> Result<Vec<String>> {
    let mut secrets = Vec::with_capacity(numbers.len());
    for start in numbers.clone().step_by(BATCH) {
        let end = numbers.end.min(start + BATCH);
        let names = (start..end).map(&name).collect::<Vec<_>>();
        let batch = (start..end)
            .map(|_| SecretText::generate(Kind::ApiKey))
            .collect::<Result<Vec<_>, _>>()?;
        let prefixes = batch.iter().map(SecretText::prefix).collect::<Vec<_>>();
        let hashes = batch
            .iter()
            .map(|it| it.hash().to_vec())
            .collect::<Vec<_>>();
        client
            .execute(
                "INSERT INTO api_keys (tenant_id, id, plan_id, name, prefix, key_hash) \
                 SELECT plan.tenant_id, gen_random_uuid(), plan.id, new.name, new.prefix, new.hash \
                 FROM plans AS plan, unnest($2::text[], $3::text[], $4::bytea[]) AS new (name, prefix, hash) \
                 WHERE plan.id = $1::text::uuid",
                &[&plan, &names, &prefixes, &hashes],
            )
            .await?;
        secrets.extend(batch.iter().map(SecretText::reveal));
    }
    client.batch_execute("VACUUM ANALYZE api_keys").await?;
    Ok(secrets)
}

/// Sends one request with each key, over several connections. Returns how many requests were sent again because they
/// were not allowed.
pub(crate) async fn use_each(
    server: SocketAddr,
    secrets: &[String],
    connections: usize,
) -> Result<u32> {
    let mut all = JoinSet::new();
    for first in 0..connections.min(secrets.len()) {
        let part = secrets[first..].iter().step_by(connections);
        all.spawn(connection(server, part.cloned().collect()));
    }
    let mut repeated = 0;
    while let Some(done) = all.join_next().await {
        repeated += done??;
    }
    Ok(repeated)
}

async fn connection(server: SocketAddr, secrets: Vec<String>) -> Result<u32> {
    let mut repeated = 0;
    let mut client = KeyClient::connect(server).await?;
    for secret in secrets {
        // Repeat a request that is not allowed: on a busy machine, a lookup or a call to Redis may take too long.
        for attempt in 1.. {
            let status = client.send(&secret).await?;
            if status == 200 {
                break;
            }
            ensure!(
                attempt < ATTEMPTS && matches!(status, 429 | 503),
                "a request got {status}"
            );
            repeated += 1;
            sleep(PAUSE).await;
        }
    }
    Ok(repeated)
}

/// A connection that sends one request at a time.
pub(crate) struct KeyClient {
    stream: TcpStream,
    bytes: Vec<u8>,
    /// The length of the latest response.
    read: usize,
}

impl KeyClient {
    pub(crate) async fn connect(server: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(server).await?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            bytes: vec![0; 16 << 10],
            read: 0,
        })
    }

    /// Sends one request, and returns the status of the response.
    pub(crate) async fn send(&mut self, secret: &str) -> Result<u16> {
        self.stream.write_all(&echo(secret)).await?;
        self.read = 0;
        loop {
            let n = self.stream.read(&mut self.bytes[self.read..]).await?;
            ensure!(n > 0, "the server closed a connection");
            self.read += n;
            if let Some((status, _)) = http1::answer(&self.bytes[..self.read])? {
                return Ok(status);
            }
        }
    }

    /// Sends one request, and returns the limit in the response.
    pub(crate) async fn limit(&mut self, secret: &str) -> Result<u32> {
        let status = self.send(secret).await?;
        ensure!(status == 200, "a request got {status}");
        let text = String::from_utf8_lossy(&self.bytes[..self.read]);
        let limit = text.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            (name.eq_ignore_ascii_case("x-ratelimit-limit")).then(|| value.trim().parse())
        });
        Ok(limit.context("a response without a limit")??)
    }
}
