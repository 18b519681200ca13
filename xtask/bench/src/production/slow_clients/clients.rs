//! Clients that are not slow, whose response times are measured.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::Duration,
};

use anyhow::Result;
use parking_lot::Mutex;
use reqwest::{Certificate, Client};
use tokio::{
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval},
};

/// The address of these clients. slowhttptest uses 127.0.0.1.
const ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 77));
/// The time between two requests.
pub(super) const EVERY: Duration = Duration::from_millis(5);
/// One in this many requests opens a new connection.
pub(super) const NEW_ONE_IN: u64 = 10;

/// Response times on persistent connections and on new ones, and the number of failed requests.
#[derive(Default)]
pub(super) struct Times {
    pub(super) kept: Vec<Duration>,
    pub(super) new: Vec<Duration>,
    pub(super) failed: u64,
}

pub(super) struct Clients {
    kept: Client,
    new: Client,
    url: String,
    key: String,
}

impl Clients {
    pub(super) fn new(base: &str, certificate: Option<&Certificate>, key: &str) -> Result<Self> {
        let client = |idle| {
            let builder = Client::builder()
                .no_proxy()
                .local_address(ADDRESS)
                .pool_max_idle_per_host(idle)
                .timeout(Duration::from_secs(10));
            let builder = match certificate {
                Some(certificate) => builder.tls_certs_only([certificate.clone()]),
                None => builder,
            };
            builder.build()
        };
        Ok(Self {
            kept: client(usize::MAX)?,
            new: client(0)?,
            url: format!("{base}/v1/echo"),
            key: key.to_owned(),
        })
    }

    /// Sends requests on schedule, whether or not earlier ones have completed.
    pub(super) async fn send_for(&self, time: Duration) -> Result<Times> {
        let times = Arc::new(Mutex::new(Times::default()));
        let mut requests = JoinSet::new();
        let mut ticks = interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let end = Instant::now() + time;
        for number in 0_u64.. {
            let due = ticks.tick().await;
            if due > end {
                break;
            }
            let is_new = number.is_multiple_of(NEW_ONE_IN);
            let client = if is_new { &self.new } else { &self.kept };
            let request = client.get(&self.url).header("x-api-key", &self.key);
            let times = Arc::clone(&times);
            requests.spawn(async move {
                let is_success = match request.send().await {
                    Ok(response) => response.status() == 200 && response.bytes().await.is_ok(),
                    Err(_) => false,
                };
                let took = due.elapsed();
                let mut times = times.lock();
                times.failed += u64::from(!is_success);
                if is_new {
                    times.new.push(took);
                } else {
                    times.kept.push(took);
                }
            });
            while requests.try_join_next().is_some() {}
        }
        while requests.join_next().await.is_some() {}
        Ok(std::mem::take(&mut *times.lock()))
    }
}

impl Times {
    pub(super) fn extend(&mut self, other: Self) {
        self.kept.extend(other.kept);
        self.new.extend(other.new);
        self.failed += other.failed;
    }
}
