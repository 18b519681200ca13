//! Sorts, counts, and encodes decisions before they are appended.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::{
    usage_request_id,
    usage_rollup::{ALL_ENDPOINTS, EndpointOf, FURTHER_ENDPOINTS, Rollup, Rollups, RowKey, Sums},
    usage_rows::{LogGroup, LogRow, LogRows, encode},
};

/// The length of an interval in the 15-minute rollup, in seconds.
const QUARTER: i64 = 15 * 60;
const HOUR: i64 = 60 * 60;

/// A decision on a known key. The decision also counts as a use of the key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsageRecord<Text = String> {
    pub event_id: Uuid,
    pub tenant_id: Uuid,
    pub key_id: Uuid,
    pub plan_id: Uuid,
    pub at: DateTime<Utc>,
    /// `free` or `paid`.
    pub billing: &'static str,
    /// Empty if the check request did not name an endpoint.
    pub endpoint: Text,
    pub was_rejected: bool,
    /// The policy that denied the request. `None` if the request was allowed, or was denied because limits could not be
    /// checked.
    pub policy: Option<&'static str>,
    /// Seconds until a retry can succeed. Set only for denied requests.
    pub retry_after_seconds: Option<i32>,
    /// At least 1.
    pub cost: i64,
    pub request_id: Text,
}

/// What the records of a group have in common. These records are counted in the same rows of the rollups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct GroupKey {
    tenant: Uuid,
    key: Uuid,
    plan: Uuid,
    /// The index of the endpoint in [`UsageBatchBuilder::endpoints`].
    endpoint: usize,
    /// The start of the quarter hour in which the decisions were made, in seconds since the Unix epoch.
    start: i64,
    was_rejected: bool,
    policy: Option<&'static str>,
    billing: &'static str,
    /// Whether the request ID contains the time of the decision.
    request_id_has_time: bool,
}

impl GroupKey {
    fn contains<Text: AsRef<str>>(
        &self,
        record: &UsageRecord<Text>,
        request_id_has_time: bool,
        endpoints: &[String],
    ) -> bool {
        self.key == record.key_id
            && self.plan == record.plan_id
            && self.tenant == record.tenant_id
            && self.was_rejected == record.was_rejected
            && self.policy == record.policy
            && self.billing == record.billing
            && self.request_id_has_time == request_id_has_time
            && (0..QUARTER).contains(&(record.at.timestamp() - self.start))
            && endpoints[self.endpoint] == record.endpoint.as_ref()
    }

    /// Returns the policy under which rollups count the decisions.
    fn counted_policy(&self) -> &'static str {
        match (self.was_rejected, self.policy) {
            (false, _) => "",
            (true, Some(policy)) => policy,
            (true, None) => "reduced_capacity",
        }
    }
}

/// The cost of a tenant's requests that were allowed on paid plans in one hour.
#[derive(Debug)]
pub(super) struct Charged {
    pub tenant: Uuid,
    /// The start of the hour, in seconds since the Unix epoch.
    pub start: i64,
    pub cost: i64,
}

/// Collects the records of a batch.
#[derive(Debug, Default)]
pub struct UsageBatchBuilder {
    rows: Vec<LogRow>,
    /// The request IDs of all rows, without separators.
    request_ids: String,
    groups: Vec<(GroupKey, Sums)>,
    group_indexes: HashMap<GroupKey, usize>,
    endpoints: Vec<String>,
    endpoint_indexes: HashMap<String, usize>,
    /// The group of the last record. Consecutive records often belong to the same group.
    last_group: usize,
}

impl UsageBatchBuilder {
    pub fn push<Text: AsRef<str>>(&mut self, record: &UsageRecord<Text>) {
        let sums = Sums {
            requests: 1,
            cost: record.cost,
            first_at: record.at,
            last_at: record.at,
        };
        let has_time = usage_request_id::has_time(record.request_id.as_ref(), record.at);
        match self.groups.get_mut(self.last_group) {
            Some((group, total)) if group.contains(record, has_time, &self.endpoints) => {
                total.add(&sums);
            }
            _ => self.last_group = self.count(record, has_time, sums),
        }
        let begin = self.request_ids.len();
        self.request_ids.push_str(record.request_id.as_ref());
        self.rows.push(LogRow {
            at: record.at,
            event_id: record.event_id,
            cost: record.cost,
            retry_after_seconds: record.retry_after_seconds,
            request_id: begin..self.request_ids.len(),
            group: self.last_group,
        });
    }

    /// Adds a record to its group, and returns the group's index.
    fn count<Text: AsRef<str>>(
        &mut self,
        record: &UsageRecord<Text>,
        request_id_has_time: bool,
        sums: Sums,
    ) -> usize {
        let name = record.endpoint.as_ref();
        let endpoint = match self.endpoint_indexes.get(name) {
            Some(index) => *index,
            None => {
                self.endpoints.push(name.to_owned());
                let index = self.endpoint_indexes.len();
                self.endpoint_indexes.insert(name.to_owned(), index);
                index
            }
        };
        let at = record.at.timestamp();
        let key = GroupKey {
            tenant: record.tenant_id,
            key: record.key_id,
            plan: record.plan_id,
            endpoint,
            start: at - at.rem_euclid(QUARTER),
            was_rejected: record.was_rejected,
            policy: record.policy,
            billing: record.billing,
            request_id_has_time,
        };
        let next = self.groups.len();
        let index = *self.group_indexes.entry(key).or_insert(next);
        match self.groups.get_mut(index) {
            Some((_, total)) => total.add(&sums),
            None => self.groups.push((key, sums)),
        }
        index
    }

    /// Returns the usage to charge, sorted by tenant, then by hour.
    fn charged(&self) -> Vec<Charged> {
        let mut costs = BTreeMap::<(Uuid, i64), i64>::new();
        for (group, sums) in &self.groups {
            if group.billing == "paid" && !group.was_rejected {
                let start = group.start - group.start.rem_euclid(HOUR);
                *costs.entry((group.tenant, start)).or_default() += sums.cost;
            }
        }
        costs
            .into_iter()
            .map(|((tenant, start), cost)| Charged {
                tenant,
                start,
                cost,
            })
            .collect()
    }

    /// Sorts and encodes the records.
    pub fn build(self) -> UsageBatch {
        let endpoints = self
            .endpoints
            .iter()
            .map(String::as_str)
            .chain([ALL_ENDPOINTS, FURTHER_ENDPOINTS])
            .collect::<BTreeSet<_>>()
            .into_iter()
            .map(str::to_owned)
            .collect::<Vec<_>>();
        let ranks = endpoints
            .iter()
            .enumerate()
            .map(|(rank, name)| (name.as_str(), rank))
            .collect::<HashMap<_, _>>();
        let mut tenants = BTreeMap::<Uuid, i64>::new();
        let mut counted = Rollup::default();
        for (group, sums) in &self.groups {
            *tenants.entry(group.tenant).or_default() += sums.requests;
            let row = RowKey {
                tenant: group.tenant,
                endpoint: ranks[self.endpoints[group.endpoint].as_str()],
                key: group.key,
                plan: group.plan,
                start: group.start,
                policy: group.counted_policy(),
            };
            counted.add(row, sums);
        }
        let counts = counted.sorted();
        let mut named = HashMap::<EndpointOf, DateTime<Utc>>::new();
        for (row, sums) in &counts {
            for key in [row.key, Uuid::nil()] {
                let of = EndpointOf {
                    tenant: row.tenant,
                    key,
                    endpoint: row.endpoint,
                };
                let first = named.entry(of).or_insert(sums.first_at);
                *first = sums.first_at.min(*first);
            }
        }
        let mut named = named.into_iter().collect::<Vec<_>>();
        named.sort_unstable();
        let tenant_indexes = tenants
            .keys()
            .enumerate()
            .map(|(index, tenant)| (*tenant, index))
            .collect::<HashMap<_, _>>();
        let groups = self
            .groups
            .iter()
            .map(|(group, _)| LogGroup {
                tenant_index: tenant_indexes[&group.tenant],
                tenant: group.tenant,
                key: group.key,
                plan: group.plan,
                was_rejected: group.was_rejected,
                policy: group.policy,
                billing: group.billing,
                request_id_has_time: group.request_id_has_time,
                endpoint: &self.endpoints[group.endpoint],
            })
            .collect::<Vec<_>>();
        UsageBatch {
            len: self.rows.len(),
            oldest: self.groups.iter().map(|(_, sums)| sums.first_at).min(),
            charged: self.charged(),
            rollups: Rollups::new(&counts, &endpoints, &HashSet::new()),
            log: encode(self.rows, &self.request_ids, &groups),
            tenants: tenants.into_iter().collect(),
            endpoints,
            counts,
            named,
        }
    }
}

impl<'a, Text: AsRef<str> + 'a> FromIterator<&'a UsageRecord<Text>> for UsageBatch {
    fn from_iter<I: IntoIterator<Item = &'a UsageRecord<Text>>>(records: I) -> Self {
        let mut batch = UsageBatchBuilder::default();
        for record in records {
            batch.push(record);
        }
        batch.build()
    }
}

/// Records that are ready to be appended.
#[derive(Debug)]
pub struct UsageBatch {
    len: usize,
    /// The time of the oldest record.
    oldest: Option<DateTime<Utc>>,
    /// The rows of the log, in log order.
    pub(super) log: Vec<LogRows>,
    /// The number of records per tenant, in order of tenant ID.
    pub(super) tenants: Vec<(Uuid, i64)>,
    /// The names of endpoints, sorted.
    pub(super) endpoints: Vec<String>,
    /// Counts by quarter hour, key, plan, endpoint, and policy.
    pub(super) counts: Vec<(RowKey, Sums)>,
    /// The endpoints of keys and tenants, each with the time of its first request.
    pub(super) named: Vec<(EndpointOf, DateTime<Utc>)>,
    /// The rollup rows, assuming that every endpoint has rows of its own.
    pub(super) rollups: Rollups,
    /// The usage to charge, sorted by tenant, then by hour.
    pub(super) charged: Vec<Charged>,
}

impl UsageBatch {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn oldest(&self) -> Option<DateTime<Utc>> {
        self.oldest
    }

    /// Returns the rollup rows, assuming that the `folded` endpoints do not have rows of their own.
    pub(super) fn rollups_without(&self, folded: &HashSet<EndpointOf>) -> Rollups {
        Rollups::new(&self.counts, &self.endpoints, folded)
    }
}
