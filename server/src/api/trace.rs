//! The spans of requests.
//!
//! Attributes have the names that the OpenTelemetry conventions for HTTP define, where such names exist. Spans contain
//! neither URLs nor headers, because these may contain secrets. The only exception is the request ID, which is also in
//! the log.

use std::net::IpAddr;

use super::{
    client_ip::is_trusted,
    fields::{Fields, Sent},
    request_context::RequestContext,
};
use crate::{spans::Span, state::AppState};

/// The methods that appear in spans under their own names. A client can send any text as the method, so all other
/// methods appear as `_OTHER`.
const METHODS: [&str; 9] = [
    "CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE",
];

/// Starts the span of a request, if the request is traced. `peer` must be in canonical form.
pub fn begin(
    state: &AppState,
    peer: Option<IpAddr>,
    fields: &impl Fields,
    path: &str,
) -> Option<Span> {
    let traces = state.traces.as_ref()?;
    // Health checks are frequent, and their traces are not useful.
    if path.starts_with("/health/") {
        return None;
    }
    // Only a trusted proxy may decide whether the request is traced. Otherwise, any client could have all its requests
    // traced.
    let is_trusted = peer.is_some_and(|peer| is_trusted(peer, &state.config.trusted_proxies));
    match is_trusted.then(|| Sent::of(fields, "traceparent")) {
        Some(Sent::Once(header)) => traces.begin(Some(header)),
        Some(Sent::Never | Sent::Several) | None => traces.begin(None),
    }
}

/// Ends the span of a request. `route` is the template of the request's path in the OpenAPI document, or the path of
/// the gRPC method, if there is one.
pub fn end(
    mut span: Span,
    context: &RequestContext,
    method: &str,
    route: Option<&str>,
    status: u16,
) {
    let method = METHODS.into_iter().find(|known| *known == method);
    let method = method.unwrap_or("_OTHER");
    span.set("http.request.method", method);
    // The conventions require this name for unknown methods.
    let name = if method == "_OTHER" { "HTTP" } else { method };
    if let Some(route) = route {
        span.rename(format!("{name} {route}"));
        span.set("http.route", route.to_owned());
    } else {
        span.rename(name);
    }
    span.set("http.response.status_code", i64::from(status));
    if status >= 500 {
        span.set("error.type", status.to_string());
        span.fail("");
    }
    context.identify(&mut span);
}
