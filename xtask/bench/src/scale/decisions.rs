//! The cost of a decision when requests are spread over all cached keys, compared with one key.

use std::{sync::Arc, time::Duration};

use anyhow::{Result, ensure};
use bytes::Bytes;

use crate::{
    load::{closed_loop, echo},
    process::Server,
    rounds::median,
};

/// CPU time of the server per request, in microseconds.
pub(super) struct Cost {
    pub(super) all_keys: f64,
    pub(super) one_key: f64,
    /// The median of the rounds' ratios.
    pub(super) ratio: f64,
}

/// Measures rounds with all keys and with one key, which take turns.
pub(super) async fn measure(
    server: &Server,
    keys: &[String],
    rounds: u32,
    time: Duration,
) -> Result<Cost> {
    let all: Arc<[String]> = keys.into();
    let one: Arc<[String]> = keys[..1].into();
    let (mut all_keys, mut one_key) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        all_keys.push(round(server, &all, time).await?);
        one_key.push(round(server, &one, time).await?);
    }
    let ratios = all_keys.iter().zip(&one_key).map(|(all, one)| all / one);
    Ok(Cost {
        ratio: median(ratios),
        all_keys: median(all_keys.into_iter()),
        one_key: median(one_key.into_iter()),
    })
}

/// Sends requests with random keys, and returns the CPU time per request.
async fn round(server: &Server, keys: &Arc<[String]>, time: Duration) -> Result<f64> {
    let keys = keys.clone();
    let request = move || Bytes::from(echo(&keys[fastrand::usize(..keys.len())]));
    let before = server.cpu()?;
    let statuses = closed_loop(server.addr, time, request).await?;
    let cpu = server.cpu()?.saturating_sub(before);
    let total = statuses.values().sum::<u64>();
    ensure!(
        total > 0 && statuses.get(&200) == Some(&total),
        "unexpected responses: {statuses:?}"
    );
    Ok(cpu.as_secs_f64() * 1e6 / f64::from(u32::try_from(total)?))
}
