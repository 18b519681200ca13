//! `/admin/usage`: the number of allowed and denied requests over time.

mod csv;
pub(super) mod range;

use chrono::{DateTime, Utc};
use poem::{IntoResponse, Request, Response, Result};
use poem_openapi::{
    ApiResponse, OpenApi,
    param::Query,
    registry::{MetaMediaType, MetaResponse, MetaResponses, Registry},
    types::Type,
};
use quota_common::{
    ApiKeyId, PlanId, Timestamp,
    bounds::ENDPOINT_MAX,
    limit::PolicyName,
    usage::{
        MAX_GROUPS, Usage, UsageBucket, UsageBucketSize, UsageCounts, UsageGroup, UsageGroupBy,
    },
};

use self::range::{Buckets, RangeQuery};
use super::{
    Tag,
    change::read_turn,
    json::Json,
    page,
    problem::{ApiError, OrNotFound},
    tenant_rights::UsageTenant,
};
use crate::{
    db::TenantTx,
    limiter::{Policy, Zone},
    repo::{
        account,
        usage::{self, Counts, Filter, GroupBy, Row},
        usage_shipper,
    },
    state::AppState,
};

pub struct UsageApi {
    pub state: AppState,
}

pub enum UsageResponse {
    Json(Json<Usage>),
    Csv(String),
}

impl IntoResponse for UsageResponse {
    fn into_response(self) -> Response {
        match self {
            Self::Json(usage) => usage.into_response(),
            Self::Csv(text) => csv::respond(text),
        }
    }
}

impl ApiResponse for UsageResponse {
    fn meta() -> MetaResponses {
        MetaResponses {
            responses: vec![MetaResponse {
                description: "OK",
                status: Some(200),
                status_range: None,
                content: vec![
                    MetaMediaType {
                        content_type: "application/json",
                        schema: Usage::schema_ref(),
                    },
                    MetaMediaType {
                        content_type: csv::MEDIA_TYPE,
                        schema: csv::schema(),
                    },
                ],
                headers: vec![],
            }],
        }
    }

    fn register(registry: &mut Registry) {
        Usage::register(registry);
    }
}

const fn group_by(by: UsageGroupBy) -> GroupBy {
    match by {
        UsageGroupBy::Key => GroupBy::Key,
        UsageGroupBy::Endpoint => GroupBy::Endpoint,
        UsageGroupBy::Policy => GroupBy::Policy,
        UsageGroupBy::Plan => GroupBy::Plan,
    }
}

/// The fields that identify a group. At most one of them is set.
#[derive(Default)]
struct GroupFields {
    key_id: Option<ApiKeyId>,
    endpoint: Option<String>,
    policy: Option<String>,
    plan_id: Option<PlanId>,
}

impl GroupFields {
    /// Returns the fields that identify a group. None of them is set for `other`, or if requests are not grouped.
    fn new(by: Option<UsageGroupBy>, group: Option<&str>) -> Self {
        let (Some(by), Some(group)) = (by, group) else {
            return Self::default();
        };
        match by {
            UsageGroupBy::Key => Self {
                key_id: group.parse().ok(),
                ..Self::default()
            },
            UsageGroupBy::Endpoint => Self {
                endpoint: Some(group.to_owned()),
                ..Self::default()
            },
            UsageGroupBy::Policy => Self {
                policy: Some(group.to_owned()),
                ..Self::default()
            },
            UsageGroupBy::Plan => Self {
                plan_id: group.parse().ok(),
                ..Self::default()
            },
        }
    }
}

fn bucket(
    start: DateTime<Utc>,
    by: Option<UsageGroupBy>,
    group: Option<&str>,
    other: bool,
    counts: &Counts,
) -> UsageBucket {
    let fields = GroupFields::new(by, group);
    UsageBucket {
        start: start.into(),
        key_id: fields.key_id,
        endpoint: fields.endpoint,
        policy: fields.policy,
        plan_id: fields.plan_id,
        other,
        allowed: counts.allowed,
        rejected: counts.rejected,
        allowed_cost: counts.allowed_cost,
        rejected_cost: counts.rejected_cost,
    }
}

/// Returns the counts of every bucket, including buckets without requests.
pub(super) fn dense(rows: &[Row], buckets: usize) -> Vec<Counts> {
    let mut all = vec![Counts::default(); buckets];
    for row in rows {
        if let Some(counts) = all.get_mut(row.bucket) {
            counts.add(&row.counts);
        }
    }
    all
}

pub(super) fn sum<'a>(counts: impl IntoIterator<Item = &'a Counts>) -> Counts {
    let mut total = Counts::default();
    for it in counts {
        total.add(it);
    }
    total
}

/// The buckets and totals of the largest groups and of `other`.
struct Grouped {
    buckets: Vec<UsageBucket>,
    groups: Vec<UsageGroup>,
}

/// Returns the largest groups, and all other groups combined. `all` contains the counts of each bucket across all
/// groups.
async fn grouped(
    tx: &mut TenantTx,
    filter: &Filter,
    by: UsageGroupBy,
    range: &Buckets,
    all: &[Counts],
) -> Result<Grouped, ApiError> {
    let group = group_by(by);
    let ranked = usage::ranked(tx, filter, group, range.range(), MAX_GROUPS).await?;
    let values: Vec<String> = ranked.iter().map(|it| it.group.clone()).collect();
    let chosen = Some((group, &values[..]));
    let rows = usage::series(tx, filter, chosen, &range.starts, range.to).await?;
    let names = usage::names(tx, group, &values).await?;
    let seen = usage::last_seen(tx, filter, (group, &values), range.range()).await?;

    let mut rest = all.to_vec();
    let mut buckets = Vec::with_capacity(rows.len());
    let mut sums = vec![Counts::default(); values.len()];
    for row in &rows {
        let Some(start) = range.starts.get(row.bucket) else {
            continue;
        };
        if let Some(rest) = rest.get_mut(row.bucket) {
            *rest = rest.without(&row.counts);
        }
        let value = row.group.as_deref();
        if let Some(index) = values.iter().position(|it| Some(it.as_str()) == value) {
            sums[index].add(&row.counts);
        }
        buckets.push(bucket(*start, Some(by), value, false, &row.counts));
    }
    let others = rest.iter().zip(&range.starts);
    buckets.extend(
        others
            .filter(|(counts, _)| !counts.is_zero())
            .map(|(counts, start)| bucket(*start, Some(by), None, true, counts)),
    );
    buckets.sort_by_key(|it| it.start);

    let mut groups: Vec<UsageGroup> = values
        .iter()
        .zip(&sums)
        .map(|(value, counts)| {
            let name = names.iter().find(|(id, _)| id == value);
            let last = seen.iter().find(|(id, at)| id == value && *at < range.to);
            usage_group(
                by,
                Some(value),
                counts,
                name.map(|(_, name)| name.clone()),
                last.map(|(_, at)| *at),
            )
        })
        .collect();
    let rest = sum(&rest);
    if !rest.is_zero() {
        groups.push(usage_group(by, None, &rest, None, None));
    }
    Ok(Grouped { buckets, groups })
}

fn usage_group(
    by: UsageGroupBy,
    value: Option<&str>,
    counts: &Counts,
    name: Option<String>,
    last_seen: Option<DateTime<Utc>>,
) -> UsageGroup {
    let fields = GroupFields::new(Some(by), value);
    UsageGroup {
        key_id: fields.key_id,
        endpoint: fields.endpoint,
        policy: fields.policy,
        plan_id: fields.plan_id,
        name,
        other: value.is_none(),
        allowed: counts.allowed,
        rejected: counts.rejected,
        allowed_cost: counts.allowed_cost,
        rejected_cost: counts.rejected_cost,
        last_seen_at: last_seen.map(Into::into),
    }
}

/// Returns the tenant's time zone, or UTC if this version of Quota does not support that time zone.
pub(super) async fn tenant_zone(tx: &mut TenantTx) -> Result<Zone, ApiError> {
    let name = account::time_zone(tx).await.or_not_found()?;
    Ok(Zone::named(&name).unwrap_or_default())
}

pub(super) const fn policy_name(policy: Policy) -> PolicyName {
    match policy {
        Policy::Rpm => PolicyName::Rpm,
        Policy::Daily => PolicyName::Daily,
        Policy::Monthly => PolicyName::Monthly,
        Policy::TenantMonthly => PolicyName::TenantMonthly,
    }
}

/// Returns the time on PostgreSQL's clock, and the time up to which all recorded requests are counted.
pub(super) async fn times(state: &AppState) -> Result<usage_shipper::Times, ApiError> {
    let mut tx = state.db.system().await?;
    let times = usage_shipper::times(&mut tx).await?;
    tx.commit().await?;
    Ok(times)
}

#[OpenApi(prefix_path = "/admin", tag = "Tag::Usage")]
impl UsageApi {
    /// Get usage
    ///
    /// Returns the number of allowed and denied requests in each hour or day. Without `group_by`, there is one series
    /// with all requests that match the filters. With `group_by`, there is one series for each of the 20 largest groups
    /// and one for all others. `allowed` and `rejected` are request counts; `allowed_cost` and `rejected_cost` are the
    /// total costs of these requests. Send `Accept: text/csv` to get a CSV file.
    ///
    /// At most 256 endpoints per key and 4,096 per tenant are counted separately; requests to additional endpoints
    /// count only toward the totals and `other`.
    #[oai(path = "/usage", method = "get", operation_id = "get_usage")]
    #[expect(
        clippy::too_many_arguments,
        reason = "a handler has one argument per parameter"
    )]
    async fn usage(
        &self,
        caller: UsageTenant,
        request: &Request,
        /// The start of the range, rounded down to the quarter hour. Default: 24 hours before `to`; with `bucket=day`,
        /// 30 days before `to`.
        from: Query<Option<Timestamp>>,
        /// The end of the range, exclusive, rounded up to the quarter hour. Default: now.
        to: Query<Option<Timestamp>>,
        /// The length of the buckets, each of which contains the requests of one hour or day. A series has at most
        /// 1,000 buckets. Default: `hour` for ranges of up to 7 days, `day` for longer ones.
        bucket: Query<Option<UsageBucketSize>>,
        /// The IANA name of the time zone in which hours and days start. Default: the tenant's time zone.
        tz: Query<Option<String>>,
        /// Include only requests with this key.
        key_id: Query<Option<ApiKeyId>>,
        /// Include only requests with keys that were on this plan at the time.
        plan_id: Query<Option<PlanId>>,
        /// Include only requests to this endpoint.
        endpoint: Query<Option<String>>,
        /// How to group the requests. `policy` groups denied requests by the policy that denied them. Allowed requests
        /// are then in no group.
        group_by: Query<Option<UsageGroupBy>>,
    ) -> Result<UsageResponse, ApiError> {
        let filter = Filter {
            key: key_id.0.map(Into::into),
            plan: plan_id.0.map(Into::into),
            endpoint: endpoint_filter(endpoint.0)?,
        };
        let zone = page::filter("tz", tz.0)?
            .map(|name| range::zone(&name))
            .transpose()?;
        let _turn = read_turn(&self.state, &caller).await?;
        let times = times(&self.state).await?;
        let mut tx = self.state.db.tenant(caller.tenant()).await?;
        let zone = match zone {
            Some(zone) => zone,
            None => tenant_zone(&mut tx).await?,
        };
        let range = RangeQuery {
            from: from.0.map(Into::into),
            to: to.0.map(Into::into),
            bucket: bucket.0,
        };
        let range = range.buckets(&zone, times.now)?;
        let rows = usage::series(&mut tx, &filter, None, &range.starts, range.to).await?;
        let all = dense(&rows, range.starts.len());
        let total = sum(&all);
        let by = group_by.0;
        let grouped = match by {
            None => {
                let buckets = range.starts.iter().zip(&all);
                Grouped {
                    buckets: buckets
                        .map(|(start, counts)| bucket_of_all(*start, counts))
                        .collect(),
                    groups: Vec::new(),
                }
            }
            Some(by) => {
                // Only denied requests have a policy.
                let of_groups: Vec<Counts> = match by {
                    UsageGroupBy::Policy => all.iter().map(Counts::only_rejected).collect(),
                    _ => all,
                };
                grouped(&mut tx, &filter, by, &range, &of_groups).await?
            }
        };
        tx.commit().await?;
        let usage = Usage {
            from: range.from.into(),
            to: range.to.into(),
            bucket: range.bucket,
            time_zone: zone.name().to_owned(),
            group_by: by,
            complete_until: times.complete_until.into(),
            total: UsageCounts {
                allowed: total.allowed,
                rejected: total.rejected,
                allowed_cost: total.allowed_cost,
                rejected_cost: total.rejected_cost,
            },
            buckets: grouped.buckets,
            groups: grouped.groups,
        };
        if csv::is_preferred(request.headers()) {
            Ok(UsageResponse::Csv(csv::write(&usage, &zone)?))
        } else {
            Ok(UsageResponse::Json(Json(usage)))
        }
    }
}

fn bucket_of_all(start: DateTime<Utc>, counts: &Counts) -> UsageBucket {
    bucket(start, None, None, false, counts)
}

/// Checks an endpoint filter. An empty filter selects requests without an endpoint.
pub(super) fn endpoint_filter(endpoint: Option<String>) -> Result<Option<String>, ApiError> {
    match endpoint {
        Some(it) if it.chars().count() > ENDPOINT_MAX => Err(ApiError::invalid(
            "endpoint",
            format!("must be at most {ENDPOINT_MAX} characters"),
        )),
        // In the rollups, names with control characters are reserved. One stands for all endpoints, another for the
        // endpoints beyond the limit.
        Some(it) if it.chars().any(char::is_control) => Err(ApiError::invalid(
            "endpoint",
            "must not contain control characters",
        )),
        endpoint => Ok(endpoint),
    }
}
