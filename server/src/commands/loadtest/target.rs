//! The installation under test.

use std::{fs, path::Path, time::Duration};

use anyhow::Context as _;
use reqwest::{Client, StatusCode, header::HeaderMap};
use url::Url;

/// A request that takes longer than this counts as failed.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The parts of a response that the test needs.
pub(super) struct Answer {
    pub(super) allowed: bool,
    pub(super) degraded: bool,
    pub(super) rpm: Option<u64>,
    pub(super) burst: Option<u64>,
}

pub(super) struct Target {
    client: Client,
    url: Url,
    keys: Vec<String>,
    service_token: Option<String>,
    cost: u32,
}

impl Target {
    /// Prepares requests to the server at `url`. In addition to the usual certificate authorities, trusts the one in
    /// the file `ca`.
    pub(super) fn new(
        mut url: Url,
        keys: Vec<String>,
        service_token: Option<String>,
        cost: u32,
        ca: Option<&Path>,
    ) -> anyhow::Result<Self> {
        let mut client = Client::builder()
            .user_agent("quota-loadtest")
            .timeout(TIMEOUT)
            .redirect(reqwest::redirect::Policy::none());
        if let Some(path) = ca {
            let pem = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
            client = client.tls_certs_merge([reqwest::Certificate::from_pem(&pem)?]);
        }
        let path = if service_token.is_some() {
            "v1/check"
        } else {
            "v1/echo"
        };
        url.path_segments_mut()
            .ok()
            .context("the URL cannot have a path")?
            .pop_if_empty()
            .extend(path.split('/'));
        Ok(Self {
            client: client.build()?,
            url,
            keys,
            service_token,
            cost,
        })
    }

    pub(super) fn key_count(&self) -> usize {
        self.keys.len()
    }

    /// Sends a request with the key at index `key`. If there is no decision, returns the reason as the error.
    pub(super) async fn send(&self, key: usize) -> Result<Answer, String> {
        let key = &self.keys[key];
        let request = match &self.service_token {
            None => self.client.get(self.url.clone()).header("X-API-Key", key),
            Some(token) => {
                let body = serde_json::json!({"key": key, "cost": self.cost, "endpoint": "quota loadtest"});
                let post = self.client.post(self.url.clone());
                post.header("X-Service-Token", token)
                    .header("Content-Type", "application/json")
                    .body(body.to_string())
            }
        };
        let response = request.send().await.map_err(|error| reason(&error))?;
        let (status, headers) = (response.status(), response.headers().clone());
        let body = response.bytes().await.map_err(|error| reason(&error))?;
        match (status, &self.service_token) {
            (StatusCode::OK, None) => Ok(answer(true, &headers)),
            (StatusCode::TOO_MANY_REQUESTS, None) => Ok(answer(false, &headers)),
            (StatusCode::OK, Some(_)) => checked(&body),
            _ => Err(format!("status {}", status.as_u16())),
        }
    }
}

/// Returns why a request failed: a timeout, or the innermost cause. Requests that fail for the same reason have the
/// same innermost cause.
fn reason(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return format!("no response within {} s", TIMEOUT.as_secs());
    }
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

fn answer(allowed: bool, headers: &HeaderMap) -> Answer {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    Answer {
        allowed,
        degraded: headers.contains_key("x-quota-degraded"),
        rpm: text("ratelimit-policy").and_then(rpm),
        burst: text("x-ratelimit-limit").and_then(|limit| limit.parse().ok()),
    }
}

/// Returns the rate from a header such as `"rpm";q=600;w=60, "daily";q=50000;w=86400`.
fn rpm(policies: &str) -> Option<u64> {
    let (_, rest) = policies.split_once("\"rpm\";q=")?;
    rest.split([';', ',']).next()?.trim().parse().ok()
}

fn checked(body: &[u8]) -> Result<Answer, String> {
    let body: serde_json::Value =
        serde_json::from_slice(body).map_err(|_| "the response is not JSON".to_owned())?;
    let headers = &body["headers"];
    let text = |name: &str| headers[name].as_str();
    match (body["allowed"].as_bool(), body["code"].as_str()) {
        (Some(allowed), Some("allowed" | "quota_exceeded" | "reduced_capacity")) => Ok(Answer {
            allowed,
            degraded: !headers["X-Quota-Degraded"].is_null(),
            rpm: text("RateLimit-Policy").and_then(rpm),
            burst: text("X-RateLimit-Limit").and_then(|limit| limit.parse().ok()),
        }),
        (_, code) => Err(format!("code {}", code.unwrap_or("missing"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policy_of_the_rate_is_read() {
        assert_eq!(
            rpm("\"rpm\";q=600;w=60, \"daily\";q=50000;w=86400"),
            Some(600)
        );
        assert_eq!(rpm("\"daily\";q=5, \"rpm\";q=7"), Some(7));
        assert_eq!(rpm("\"daily\";q=5"), None);
    }
}
