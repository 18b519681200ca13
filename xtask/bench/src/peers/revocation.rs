//! How long a key is allowed on one replica after it is revoked on another.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use http::{HeaderValue, Method, Request, header};
use http_body_util::{BodyExt as _, Full};
use serde_json::json;

use super::MOST;
use crate::replicas::{
    drive::{Sender, connect},
    tenant::{Plan, Tenant},
};

const KEYS: usize = 20;
/// How long to wait until a revoked key is rejected. Quota's documented maximum is one second.
const PATIENCE: Duration = Duration::from_secs(10);

/// Returns the times from the start of each revocation to the first rejection, sorted.
pub(crate) async fn measure(tenant: &Tenant, replicas: &[SocketAddr]) -> Result<Vec<Duration>> {
    let plan = Plan::new("to be revoked", MOST, MOST);
    let plan = tenant.plan(replicas[0], &plan).await?;
    let mut sender = connect(replicas[1]).await?;
    let mut times = Vec::new();
    for _ in 0..KEYS {
        let key = tenant.key(replicas[0], &plan).await?;
        let status = ask(&mut sender, &key.text).await?;
        ensure!(status == 200, "a new key got {status}");
        let path = format!("/admin/api-keys/{}", key.id);
        let revoked = json!({"is_active": false});
        let began = Instant::now();
        let revoke = tenant.call(replicas[0], Method::PATCH, &path, Some(&revoked));
        let refused = async {
            while ask(&mut sender, &key.text).await? == 200 {
                ensure!(began.elapsed() < PATIENCE, "a revoked key is still allowed");
            }
            Ok(began.elapsed())
        };
        let (_, time) = tokio::try_join!(revoke, refused)?;
        times.push(time);
    }
    times.sort_unstable();
    Ok(times)
}

/// Sends a request with a key, and returns the status.
async fn ask(sender: &mut Sender, key: &HeaderValue) -> Result<u16> {
    sender.ready().await?;
    let request = Request::get("/v1/echo")
        .header(header::HOST, "quota")
        .header("x-api-key", key)
        .body(Full::<Bytes>::default())?;
    let response = sender.send_request(request).await.context("no response")?;
    let status = response.status().as_u16();
    response.into_body().collect().await?;
    Ok(status)
}
