//! The context of a request: information that its handler and the layers around the handler share.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use poem::{
    Request,
    http::{HeaderValue, header},
};
use quota_common::TenantId;

use super::problem::ApiError;
use crate::{
    auth::session::Origin,
    client_guard::ClientNetwork,
    clock::{Monotonic, Nanos, UnixNanos},
    connection_marks::{ConnectionMarks, EndlessResponse},
    keys::{KeyRecord, LookupCaller},
    spans::Span,
    state::AppState,
    telemetry::{log::AccessLine, request_id::GeneratedId},
};

/// Maximum length of the stored `User-Agent`, in characters. Longer values are truncated.
const USER_AGENT_MAX: usize = 256;

/// The ID of a request, in visible ASCII.
#[derive(Debug, Clone)]
pub enum RequestId {
    /// Stored inline, because most requests have such an ID.
    Generated(GeneratedId),
    Sent(HeaderValue),
}

impl RequestId {
    pub fn as_str(&self) -> &str {
        match self {
            Self::Generated(id) => id.as_str(),
            Self::Sent(id) => id.to_str().unwrap_or_default(),
        }
    }
}

impl From<RequestId> for HeaderValue {
    fn from(id: RequestId) -> Self {
        match id {
            RequestId::Generated(id) => {
                Self::from_str(id.as_str()).unwrap_or_else(|_| Self::from_static("unknown"))
            }
            RequestId::Sent(id) => id,
        }
    }
}

/// A time that may be unknown. `u64::MAX` if it is unknown.
struct OptionalTime(AtomicU64);

impl OptionalTime {
    fn new(time: Option<Monotonic>) -> Self {
        Self(AtomicU64::new(Self::encode(time)))
    }

    fn set(&self, time: Option<Monotonic>) {
        self.0.store(Self::encode(time), Ordering::Relaxed);
    }

    fn encode(time: Option<Monotonic>) -> u64 {
        time.map_or(u64::MAX, |it| it.0)
    }

    fn get(&self) -> Option<Monotonic> {
        let time = self.0.load(Ordering::Relaxed);
        (time < u64::MAX).then_some(Monotonic(time))
    }
}

/// Information about a request.
pub struct RequestContext {
    pub state: AppState,
    pub id: RequestId,
    /// The client's address. `None` for a peer without an address, such as a Unix socket.
    pub ip: Option<IpAddr>,
    /// When the server started to process the request. For some direct responses, this is when the request was read.
    pub arrived: UnixNanos,
    /// The time by which the request had arrived completely. Unknown if its body may still be arriving, or if work on
    /// the request has waited since.
    complete_at: OptionalTime,
    /// When work on the last decision ended: when the decision was made or, if its usage record had to be written to
    /// disk, when that was done. Unknown if there was no decision.
    decision_ended: OptionalTime,
    /// Reports to the listener what happens on the request's connection. `None` if the listener does not need any
    /// reports.
    marks: Option<ConnectionMarks>,
    /// The tenant or API key that the credentials in the request identify, even if the key is inactive or expired.
    caller: Mutex<Option<Identity>>,
}

enum Identity {
    Tenant(TenantId),
    Key(Arc<KeyRecord>),
}

impl RequestContext {
    pub fn new(
        state: &AppState,
        id: RequestId,
        ip: Option<IpAddr>,
        arrived: UnixNanos,
        complete_at: Option<Monotonic>,
        marks: Option<ConnectionMarks>,
    ) -> Self {
        Self {
            state: state.clone(),
            id,
            ip,
            arrived,
            complete_at: OptionalTime::new(complete_at),
            decision_ended: OptionalTime::new(None),
            marks,
            caller: Mutex::default(),
        }
    }

    /// Records that work on the request has waited, so that [`decision_begins`](Self::decision_begins) reads the clock.
    /// Call after each wait that comes before a call of `decision_begins`.
    pub fn has_waited(&self) {
        self.complete_at.set(None);
    }

    /// Returns the time at which work on a decision begins. If the time by which the request had arrived completely is
    /// known, returns that time without reading the clock.
    pub fn decision_begins(&self) -> Monotonic {
        let begins = self.complete_at.get();
        begins.unwrap_or_else(|| self.state.clock.monotonic())
    }

    /// Sets the time at which work on a decision ended. Call after the last wait.
    pub fn set_decision_ended(&self, time: Monotonic) {
        self.decision_ended.set(Some(time));
    }

    /// Returns the time at which work on the last decision ended, without reading the clock. If there was no decision,
    /// returns the time of the first call.
    pub fn decision_ended(&self) -> Monotonic {
        let ended = self.decision_ended.get();
        ended.unwrap_or_else(|| {
            let now = self.state.clock.monotonic();
            self.set_decision_ended(now);
            now
        })
    }

    /// Returns the context that `request_log` has stored with the request.
    pub fn of(request: &Request) -> Result<&Self, ApiError> {
        match request.data::<Arc<Self>>() {
            Some(context) => Ok(context),
            None => Err(ApiError::internal("request_log is not mounted")),
        }
    }

    pub fn id(&self) -> &str {
        self.id.as_str()
    }

    pub fn is_tenant(&self, tenant: TenantId) {
        *self.caller.lock() = Some(Identity::Tenant(tenant));
    }

    /// Returns the tenant of the session or service token that authenticated the request. Returns `None` once an API
    /// key has been identified.
    pub fn tenant(&self) -> Option<TenantId> {
        match &*self.caller.lock() {
            Some(Identity::Tenant(tenant)) => Some(*tenant),
            Some(Identity::Key(_)) | None => None,
        }
    }

    pub fn is_key(&self, key: Arc<KeyRecord>) {
        *self.caller.lock() = Some(Identity::Key(key));
    }

    /// Returns the caller to whom the lookup of a secret in this request is attributed. `tenant` is the owner of the
    /// request's service token, if it has one.
    pub fn source(&self, tenant: Option<TenantId>) -> LookupCaller {
        LookupCaller {
            tenant,
            address: self.ip.map(ClientNetwork::address),
        }
    }

    /// Records that a valid API key or service token was sent on the connection.
    pub fn has_authenticated(&self) {
        if let Some(marks) = &self.marks {
            marks.set_authenticated();
        }
    }

    /// Reports the response as endless until the returned value is dropped. Returns `None` if the listener does not
    /// need any reports.
    pub fn begin_endless_response(&self) -> Option<EndlessResponse> {
        let connection = self.marks.as_ref();
        connection.map(ConnectionMarks::begin_endless_response)
    }

    /// Adds the request's ID and its caller to the request's span. Call before [`log`](Self::log).
    pub fn identify(&self, span: &mut Span) {
        span.set("quota.request_id", self.id().to_owned());
        let caller = self.caller.lock();
        let (tenant, key) = match &*caller {
            Some(Identity::Tenant(tenant)) => (*tenant, None),
            Some(Identity::Key(key)) => (key.tenant(), Some(key)),
            None => return,
        };
        span.set("quota.tenant_id", tenant.to_string());
        if let Some(key) = key {
            span.set("quota.key_id", key.id().to_string());
        }
    }

    /// Writes the access log line. `took` is the time from the request's arrival until it was processed. For a direct
    /// response, this is until the decision ended.
    pub fn log(&self, method: &str, path: &str, status: u16, took: Nanos) {
        let identity = self.caller.lock().take();
        let (tenant, key) = match &identity {
            Some(Identity::Tenant(tenant)) => (Some(tenant.0), None),
            Some(Identity::Key(key)) => (Some(key.tenant().0), Some(key.prefix.as_bytes())),
            None => (None, None),
        };
        self.state.log.access(&AccessLine {
            at: self.arrived.saturating_add(took),
            request_id: self.id(),
            method,
            path,
            status,
            micros: took.0 / 1000,
            ip: self.ip,
            tenant,
            key,
        });
    }
}

/// Returns the origin of a request, as stored with sessions and audit events.
pub fn origin(request: &Request) -> Origin {
    let user_agent = request.headers().get(header::USER_AGENT).map(|agent| {
        String::from_utf8_lossy(agent.as_bytes())
            .chars()
            .filter(|c| !c.is_control())
            .take(USER_AGENT_MAX)
            .collect()
    });
    Origin {
        ip: RequestContext::of(request)
            .ok()
            .and_then(|context| context.ip),
        user_agent,
    }
}
