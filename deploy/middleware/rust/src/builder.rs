//! Builds the layer.

use std::{fmt, sync::Arc, time::Duration};

use http::{HeaderName, HeaderValue, request::Parts};
use reqwest::{Certificate, Url, redirect};

use crate::{
    client::Client,
    denial_cache::DenialCache,
    request,
    service::QuotaLayer,
    settings::{OnUnavailable, Settings},
};

/// How long a connection to Quota may be idle before it is closed. This time is shorter than Quota's own timeout (75 s
/// by default), so that a check is not sent on a connection that Quota is closing.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// An invalid setting.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    #[error("the URL of Quota must be http:// or https://, without credentials, query or fragment")]
    Url,
    #[error("the service token must not be empty, and must be visible ASCII")]
    ServiceToken,
    #[error("the root certificates are not PEM")]
    RootCertificates(#[source] reqwest::Error),
    #[error("the HTTP client cannot be created")]
    Client(#[source] reqwest::Error),
}

/// Builds a [`QuotaLayer`].
#[must_use]
pub struct QuotaLayerBuilder {
    url: String,
    service_token: String,
    timeout: Duration,
    root_certificates: Option<Vec<u8>>,
    settings: Settings,
}

impl fmt::Debug for QuotaLayerBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QuotaLayerBuilder")
            .field("timeout", &self.timeout)
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

impl QuotaLayer {
    /// Creates a builder with the URL of Quota, such as `https://quota.example.com`, and a service token (`qs_…`) of
    /// the tenant whose keys are checked.
    pub fn builder(url: &str, service_token: &str) -> QuotaLayerBuilder {
        QuotaLayerBuilder {
            url: url.to_owned(),
            service_token: service_token.to_owned(),
            timeout: Duration::from_secs(1),
            root_certificates: None,
            settings: Settings {
                on_unavailable: OnUnavailable::Deny,
                key: Arc::new(|parts| request::api_key(&parts.headers)),
                cost: Arc::new(|_| 1),
                endpoint: Arc::new(request::matched_route),
                denials: None,
            },
        }
    }
}

impl QuotaLayerBuilder {
    /// Sets how long a check may take, including the time to connect. Default: 1 second.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sets what happens to a request if Quota cannot be reached in time. Default: [`OnUnavailable::Deny`].
    pub fn on_unavailable(mut self, on_unavailable: OnUnavailable) -> Self {
        self.settings.on_unavailable = on_unavailable;
        self
    }

    /// Reads the API key only from this header. By default, the key is read from `X-API-Key` and from `Authorization:
    /// Bearer qk_…`. A request with different keys, or with several values of either header, is rejected.
    pub fn key_header(self, name: HeaderName) -> Self {
        self.key(move |parts| request::single(&parts.headers, &name).map(str::to_owned))
    }

    /// Sets the function that reads the API key. A request for which the function returns `None` gets 401.
    pub fn key(mut self, key: impl Fn(&Parts) -> Option<String> + Send + Sync + 'static) -> Self {
        self.settings.key = Arc::new(key);
        self
    }

    /// Sets the cost of a request, by default 1. Quota counts a request with a cost of 5 as five requests. A cost of 0
    /// is treated as 1. A request with a cost above 1,000,000 gets 429.
    pub fn cost(mut self, cost: impl Fn(&Parts) -> u32 + Send + Sync + 'static) -> Self {
        self.settings.cost = Arc::new(cost);
        self
    }

    /// Sets the endpoint under which a request is recorded in usage. By default, the endpoint is the request's method
    /// and route, such as `GET /orders/{id}`. If axum has not matched a route, the request is recorded without an
    /// endpoint.
    ///
    /// Return names from a small set, not paths with IDs: usage reports list at most 256 endpoints per key.
    pub fn endpoint(
        mut self,
        endpoint: impl Fn(&Parts) -> Option<String> + Send + Sync + 'static,
    ) -> Self {
        self.settings.endpoint = Arc::new(endpoint);
        self
    }

    /// Remembers denials for up to `keys` keys. For up to a second after such a denial, further requests with the same
    /// key are denied without a check, unless they cost less than the denied request. Off by default.
    ///
    /// Allowed requests are never remembered, so the cache never allows a request that Quota would deny. A denial is
    /// remembered only if a limit caused it and a retry cannot succeed within a second. Therefore, a request is denied
    /// without a check only if Quota would deny it too. The exception is a request that Quota would allow because the
    /// key or its plan was changed, or tokens were returned, within that second. Denials without a check are not
    /// recorded as usage.
    pub fn cache_denials(mut self, keys: usize) -> Self {
        self.settings.denials = Some(DenialCache::new(keys));
        self
    }

    /// Trusts these certificates (PEM) when connecting to Quota, in addition to those of the system.
    pub fn root_certificates(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.root_certificates = Some(pem.into());
        self
    }

    /// Builds the layer. Does not connect to Quota.
    ///
    /// # Errors
    ///
    /// Fails if the URL, the service token or the certificates are invalid, or if the HTTP client cannot be created.
    pub fn build(self) -> Result<QuotaLayer, BuildError> {
        let check_url = check_url(&self.url).ok_or(BuildError::Url)?;
        let token = bearer(&self.service_token).ok_or(BuildError::ServiceToken)?;
        let mut client = reqwest::Client::builder()
            .timeout(self.timeout)
            .pool_idle_timeout(IDLE_TIMEOUT)
            // A redirected check would send the service token and the API key to another server.
            .redirect(redirect::Policy::none())
            .user_agent(concat!("quota-tower/", env!("CARGO_PKG_VERSION")));
        if let Some(pem) = &self.root_certificates {
            let certificates =
                Certificate::from_pem_bundle(pem).map_err(BuildError::RootCertificates)?;
            client = client.tls_certs_merge(certificates);
        }
        let client = client.build().map_err(BuildError::Client)?;
        Ok(QuotaLayer::new(
            Client::new(client, check_url, token),
            self.settings,
        ))
    }
}

/// Returns the URL of the check API, given the URL of Quota. Quota's URL may have a path, such as `/api` behind a
/// proxy.
fn check_url(base: &str) -> Option<Url> {
    let mut url = Url::parse(base).ok()?;
    let is_plain = matches!(url.scheme(), "http" | "https")
        && url.has_host()
        && url.username().is_empty()
        && url.password().is_none()
        && url.query().is_none()
        && url.fragment().is_none();
    if !is_plain {
        return None;
    }
    let path = format!("{}/v1/check", url.path().trim_end_matches('/'));
    url.set_path(&path);
    Some(url)
}

fn bearer(token: &str) -> Option<HeaderValue> {
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return None;
    }
    let mut value = HeaderValue::from_str(&format!("Bearer {token}")).ok()?;
    value.set_sensitive(true);
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_of_quota_is_kept() {
        let url = |base| check_url(base).map(String::from);
        for (base, check) in [
            ("https://q.example", "https://q.example/v1/check"),
            ("http://q.example:8080/", "http://q.example:8080/v1/check"),
            ("https://q.example/api", "https://q.example/api/v1/check"),
            ("https://q.example/api/", "https://q.example/api/v1/check"),
        ] {
            assert_eq!(url(base).as_deref(), Some(check));
        }
        for base in [
            "",
            "q.example",
            "ftp://q.example",
            "https://user@q.example",
            "https://:secret@q.example",
            "https://q.example/?a=b",
            "https://q.example/#a",
        ] {
            assert_eq!(url(base), None, "{base}");
        }
    }

    #[test]
    fn invalid_settings_are_rejected_when_the_layer_is_built() {
        let build = |url, token| QuotaLayer::builder(url, token).build().map(drop);
        assert!(build("http://q.example", "qs_1").is_ok());
        assert!(matches!(build("q.example", "qs_1"), Err(BuildError::Url)));
        for token in ["", "qs_1\n", "qs 1", "qs_ü"] {
            let error = build("http://q.example", token);
            assert!(matches!(error, Err(BuildError::ServiceToken)), "{token}");
        }
        let certificates = QuotaLayer::builder("http://q.example", "qs_1")
            .root_certificates("-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n")
            .build();
        assert!(certificates.is_err());
    }

    #[test]
    fn debug_output_has_no_secrets() {
        let builder = QuotaLayer::builder("http://q.example", "qs_secret").cache_denials(10);
        let shown = format!("{builder:?}");
        assert!(!shown.contains("qs_secret"), "{shown}");
        let shown = format!("{:?}", builder.build());
        assert!(shown.contains("q.example"), "{shown}");
        assert!(!shown.contains("qs_secret"), "{shown}");
    }
}
