//! `/admin/decisions`: the log of decisions, as a list and as a stream.

mod position;
mod stream;

use poem::{Request, Result};
use poem_openapi::{
    OpenApi,
    param::{Header, Query},
};
use quota_common::{
    ApiKeyId, PlanId, ProblemCode,
    decision::{Decision, DecisionOutcome, DecisionPage},
};

pub use self::stream::Streams;
use self::{
    position::{read_position, write_position},
    stream::{DecisionStream, StreamSession, Tail},
};
use super::{
    Tag,
    change::{read, read_turn},
    json::Json,
    page::{self, PageSize},
    problem::ApiError,
    request_context::RequestContext,
    tenant_rights::UsageTenant,
    usage::endpoint_filter,
};
use crate::{
    repo::usage_log::{self, DecisionRow, Filter},
    state::AppState,
};

pub struct DecisionApi {
    pub state: AppState,
    pub streams: Streams,
}

impl From<DecisionRow> for Decision {
    fn from(row: DecisionRow) -> Self {
        let (outcome, policy) = if row.was_rejected {
            let policy = row.policy.unwrap_or_else(|| "reduced_capacity".to_owned());
            (DecisionOutcome::Rejected, Some(policy))
        } else {
            (DecisionOutcome::Allowed, None)
        };
        Self {
            id: row.event_id,
            at: row.timestamp.into(),
            key_id: ApiKeyId(row.key_id),
            key_name: row.key_name,
            plan_id: PlanId(row.plan_id),
            endpoint: row.endpoint,
            outcome,
            policy,
            retry_after: row
                .retry_after_seconds
                .and_then(|it| u32::try_from(it).ok()),
            cost: u64::try_from(row.cost).unwrap_or(0),
            request_id: row.request_id,
        }
    }
}

fn filter(
    key_id: Option<ApiKeyId>,
    endpoint: Option<String>,
    outcome: Option<DecisionOutcome>,
    request_id: Option<String>,
) -> Result<Filter, ApiError> {
    Ok(Filter {
        key: key_id.map(Into::into),
        endpoint: endpoint_filter(endpoint)?,
        was_rejected: outcome.map(|it| it == DecisionOutcome::Rejected),
        request_id: page::filter("request_id", request_id)?,
    })
}

#[OpenApi(prefix_path = "/admin", tag = "Tag::Usage")]
impl DecisionApi {
    /// List decisions
    ///
    /// Returns decisions on requests with a known key, newest first: which key called which endpoint, whether the
    /// request was allowed, and if not, which policy denied it. To find out why a request was denied, filter by
    /// `request_id`: the `X-Request-Id` of the response. If matches are rare, a page may have fewer items than `limit`
    /// even though it has a `next_cursor`.
    #[oai(path = "/decisions", method = "get", operation_id = "list_decisions")]
    #[expect(
        clippy::too_many_arguments,
        reason = "a handler has one argument per parameter"
    )]
    async fn list(
        &self,
        caller: UsageTenant,
        /// Include only requests with this key.
        key_id: Query<Option<ApiKeyId>>,
        /// Include only requests to this endpoint.
        endpoint: Query<Option<String>>,
        /// Include only allowed or only denied requests.
        outcome: Query<Option<DecisionOutcome>>,
        /// Include only requests with this ID.
        #[oai(validator(max_length = 128))]
        request_id: Query<Option<String>>,
        /// Page size, 1–100. Default: 20.
        limit: Query<Option<PageSize>>,
        /// `next_cursor` from the previous page.
        cursor: Query<Option<String>>,
    ) -> Result<Json<DecisionPage>, ApiError> {
        let filter = filter(key_id.0, endpoint.0, outcome.0, request_id.0)?;
        let before = cursor
            .0
            .map(|cursor| read_position(&cursor).ok_or_else(malformed));
        let before = before.transpose()?;
        let _turn = read_turn(&self.state, &caller).await?;
        let mut tx = self.state.db.tenant(caller.tenant()).await?;
        // Read the position before the rows, so that no decision is missed between these rows and a stream that starts
        // at this position.
        let newest = usage_log::last_seq(&mut tx).await?;
        let page = usage_log::list(&mut tx, &filter, before, page::size(limit.0)).await?;
        let total = usage_log::total(&mut tx, &filter).await?;
        tx.commit().await?;
        Ok(Json(DecisionPage {
            items: page.rows.into_iter().map(Into::into).collect(),
            next_cursor: page.before.map(write_position),
            total,
            last_event_id: write_position(newest),
        }))
    }

    /// Stream decisions
    ///
    /// Streams the decisions of all replicas as server-sent events. Decisions usually arrive less than a second after
    /// they are made. The `data` field of a `decision` event contains the decision as JSON. To resume the stream on any
    /// replica, send the ID of the last event in the `Last-Event-ID` header, as browsers do automatically, or in the
    /// `last_event_id` parameter. A `dropped` event contains the number of decisions that were skipped because they
    /// could not be sent fast enough, including those that do not match the filters. The stream ends with an `end`
    /// event when the access token expires, the session is revoked or the server stops.
    #[oai(
        path = "/decisions/stream",
        method = "get",
        operation_id = "stream_decisions"
    )]
    #[expect(
        clippy::too_many_arguments,
        reason = "a handler has one argument per parameter"
    )]
    async fn stream(
        &self,
        caller: UsageTenant,
        request: &Request,
        /// Include only requests with this key.
        key_id: Query<Option<ApiKeyId>>,
        /// Include only requests to this endpoint.
        endpoint: Query<Option<String>>,
        /// Include only allowed or only denied requests.
        outcome: Query<Option<DecisionOutcome>>,
        /// Include only requests with this ID.
        #[oai(validator(max_length = 128))]
        request_id: Query<Option<String>>,
        /// The ID of the last event you received, or the `last_event_id` of a page from `GET /admin/decisions`. By
        /// default, only new decisions are sent.
        #[oai(name = "last_event_id")]
        from: Query<Option<String>>,
        /// The ID of the last event you received. Takes precedence over the `last_event_id` parameter.
        #[oai(name = "Last-Event-ID")]
        resumed: Header<Option<String>>,
    ) -> Result<DecisionStream, ApiError> {
        let filter = filter(key_id.0, endpoint.0, outcome.0, request_id.0)?;
        let invalid = |field| ApiError::invalid(field, "must be an event ID");
        let after = match (resumed.0, from.0) {
            (Some(id), _) => Some(read_position(&id).ok_or_else(|| invalid("Last-Event-ID"))?),
            (None, Some(id)) => Some(read_position(&id).ok_or_else(|| invalid("last_event_id"))?),
            (None, None) => None,
        };
        let place = self.streams.begin(caller.tenant())?;
        let token = caller.token(request)?;
        let newest = read(&self.state, &caller, usage_log::last_seq).await?;
        // A position beyond the end of the log dates from before PostgreSQL was restored to an earlier state. In that
        // case, start at the end.
        let after = after.map_or(newest, |it| it.min(newest));
        let tail = Tail {
            session: StreamSession {
                state: self.state.clone(),
                token,
            },
            tenant: caller.tenant(),
            filter,
            after,
        };
        let endless = RequestContext::of(request)?.begin_endless_response();
        Ok(DecisionStream::new(tail, place, endless))
    }
}

fn malformed() -> ApiError {
    ApiError::new(ProblemCode::Malformed, "Invalid cursor for this list.")
}
